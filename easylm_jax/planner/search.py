"""The meshes, remat policies and micro-batches with which a case would run fastest, and fit.

    search(case, topology, compile=compile_step, keep=3) -> [Candidate, ...], the fastest first

Every combination is judged by memory.estimate and roofline.roofline, in microseconds each; only the
best few are compiled. The model, the optimiser, the rows and their length stay as they are. Called
by plan.py, which also prints `what_would_fit` where a config does not.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from easylm_jax.mesh import AXES, BATCH_AXES, parse_mesh
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.models.remat import POLICIES, parse_policy
from easylm_jax.planner import memory
from easylm_jax.planner.case import Case
from easylm_jax.planner.compiled import Compiled
from easylm_jax.planner.memory import Parts
from easylm_jax.planner.roofline import GPUS_PER_NODE, Estimate, roofline
from easylm_jax.planner.topology import Topology

RESERVE = 0.15  # of the memory: how far the compiler may need more than estimated
LONG_ROWS = 16_384  # tokens; shorter rows are split over chips only where nothing else fits
LEAST_SHARD = 16  # rows of a kernel on a TPU chip: fewer are padded to the tile, in memory and time
GIB = 2**30
# The named policies, and between them: projections kept and the MLP computed again; the same with
# gate kept; projections sent to the host.
PROJECTIONS = "q:keep,k:keep,v:keep,attention_out:keep,attention_lse:keep"
OFFLOADED = PROJECTIONS.replace("keep", "offload").replace("lse:offload", "lse:keep")
REMATS = (*POLICIES, PROJECTIONS, f"{PROJECTIONS},gate:keep", OFFLOADED)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step; `compiled` is None where it was not among the best few."""

    case: Case
    parts: Parts
    estimate: Estimate
    awkward: bool  # slower or larger than the estimates know
    compiled: Compiled | None = None

    def __str__(self) -> str:
        case = self.case
        return (
            f"mesh {case.mesh}, remat {case.model.remat}, micro_batches {case.micro_batches}: "
            f"{self.parts.total / GIB:.2f} GiB, {self.estimate.step_s:.2f} s per step (estimated)"
        )


def search(
    case: Case,
    topology: Topology,
    *,
    compile: Callable[[Case, Topology], Compiled] | None,
    keep: int = 3,
) -> list[Candidate]:
    """The `keep` fastest candidates that the compiler confirms to fit; fewer where there are not.

    At most twice as many are compiled. One that is compiled and does not fit is left out. Without
    `compile` the estimate decides.

    Raises:
      ValueError: nothing fits; says what might.
    """
    confirmed: list[Candidate] = []
    refused: dict[Case, float] = {}
    for candidate in _fastest(candidates(case, topology), topology)[: 2 * keep]:
        compiled = compile(candidate.case, topology) if compile else None
        if compiled and not fits(compiled, topology):
            refused[candidate.case] = float(compiled.peak_bytes)
        else:
            confirmed.append(dataclasses.replace(candidate, compiled=compiled))
        if len(confirmed) == keep:
            break
    if not confirmed:
        raise ValueError(what_would_fit(case, topology, refused))
    return confirmed


def fits(compiled: Compiled, topology: Topology) -> bool:
    return not compiled.ran_out_of_memory and compiled.peak_bytes <= topology.chip.hbm_bytes


def what_would_fit(case: Case, topology: Topology, refused: Mapping[Case, float]) -> str:
    """One sentence: what would, by the estimate, or the least need.

    `refused` are the cases known not to fit, with their bytes per chip. By as much as these exceed
    their estimates, the others are taken to.
    """
    room, chips = topology.chip.hbm_bytes, topology.num_chips
    need = refused.get(case, memory.estimate(case, parse_mesh(case.mesh, chips)).total)
    settings = f"mesh {case.mesh}, remat {case.model.remat} and micro_batches {case.micro_batches}"
    into = f"fit into {room / GIB:.2f} GiB per chip of {topology}"
    if need > room:
        head = f"about {need / GIB:.1f} GiB with {settings} do not {into}"
    elif refused:
        head = f"the {len(refused)} settings that look fastest do not {into}, by the compiler"
    else:
        head = f"{settings} are not sure to {into}"
    known = {_settings(one, chips) for one in refused}
    found = [c for c in candidates(case, topology) if _settings(c.case, chips) not in known]
    if not found:
        return f"{head}, and no other mesh divides the model and {case.batch_size} rows"
    missed = (
        size / memory.estimate(one, parse_mesh(one.mesh, chips)).total
        for one, size in refused.items()
    )
    if fastest := _fastest(found, topology, factor=max([1.0, *missed])):
        return f"{head}; {fastest[0]} would"
    least = min(found, key=lambda c: c.parts.total)
    return (
        f"{head}, nor is any other sure to: the least is {least}; use more chips, or shorter rows"
    )


def _settings(case: Case, num_chips: int) -> tuple[Any, ...]:
    """What tells the candidates of one search apart, however it is written."""
    actions = parse_policy(case.model.remat)
    mesh = tuple(parse_mesh(case.mesh, num_chips).values())
    return mesh, actions and tuple(actions.values()), case.micro_batches


def _fastest(
    found: Iterable[Candidate], topology: Topology, *, factor: float = 1.0
) -> list[Candidate]:
    """Those that fit if they need `factor` times the estimate, the fastest first. Awkward meshes
    only where no other fits."""
    room = (1 - RESERVE) * topology.chip.hbm_bytes
    fitting = [c for c in found if c.parts.total * factor <= room]
    usual = [c for c in fitting if not c.awkward]
    return sorted(usual or fitting, key=lambda c: c.estimate.step_s)


def candidates(case: Case, topology: Topology) -> list[Candidate]:
    """Every combination that divides, judged; those that do not fit too."""
    found = []
    for mesh in meshes(case, topology):
        sizes = parse_mesh(mesh, topology.num_chips)
        awkward = _is_awkward(case, topology, sizes)
        ways = math.prod(sizes[axis] for axis in BATCH_AXES)
        for micro, remat in itertools.product(_divisors(case.batch_size // ways), REMATS):
            model = dataclasses.replace(case.model, remat=remat)
            one = dataclasses.replace(case, mesh=mesh, micro_batches=micro, model=model)
            parts, speed = memory.estimate(one, sizes), roofline(one, topology)
            found.append(Candidate(one, parts, speed, awkward))
    return found


def meshes(case: Case, topology: Topology) -> list[str]:
    """Meshes that `make_mesh` can build on the topology and that divide the model and the batch."""
    across = f"@{topology.num_slices},1,1,1" if topology.num_slices > 1 else ""
    found = {}
    for within in _sizes_within(topology):
        sizes = within | {"replica": within["replica"] * topology.num_slices}
        if _divides(case.model, case.batch_size, case.seq_len, sizes):
            found[",".join(str(within[axis]) for axis in AXES) + across] = None
    return list(found)


def _is_awkward(case: Case, topology: Topology, sizes: Mapping[str, int]) -> bool:
    """Whether a mesh splits short rows, or kernels so far that a TPU pads them."""
    padded = topology.chip.ici_dims and case.model.d_model < LEAST_SHARD * sizes["fsdp"]
    return bool(padded) or (sizes["sequence"] > 1 and case.seq_len < LONG_ROWS)


def _sizes_within(topology: Topology) -> Iterator[dict[str, int]]:
    """Axis sizes within a slice: on a torus each of its dims goes to one axis, whole, so that every
    collective is on rings of its own; elsewhere any sizes, `tensor` within a node."""
    if topology.chip.ici_dims:
        for axes in itertools.product(AXES, repeat=len(topology.shape)):
            sizes = dict.fromkeys(AXES, 1)
            for axis, size in zip(axes, topology.shape, strict=True):
                sizes[axis] *= size
            yield sizes
        return
    n = math.prod(topology.shape)
    for tensor in _divisors(math.gcd(n, GPUS_PER_NODE)):
        for sequence in _divisors(n // tensor):
            for fsdp in _divisors(n // (tensor * sequence)):
                replica = n // (tensor * sequence * fsdp)
                yield dict(zip(AXES, (replica, fsdp, sequence, tensor), strict=True))


def _divides(model: LlamaConfig, rows: int, seq_len: int, sizes: dict[str, int]) -> bool:
    tensor, fsdp, sequence = (sizes[axis] for axis in ("tensor", "fsdp", "sequence"))
    split_over_tensor = math.gcd(model.num_kv_heads, model.d_ff, model.vocab_size)
    return (
        rows % (sizes["replica"] * fsdp) == 0
        and model.d_model % fsdp == 0
        and split_over_tensor % tensor == 0
        and seq_len % (2 * sequence) == 0
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
