"""How long a training step takes on a topology: an estimate from FLOPs and bytes, never measured.

    roofline(case, topology) -> Estimate

The step is the longest of three things that run at the same time (matrix products; reading and
writing memory; gathering weights and scattering gradients along `fsdp`) plus what nothing hides.
`assumptions` says so in words beside every figure. One number per chip family is fitted, the share
of the peak at which products run: on ONE published run each (EFFICIENCY). The other published runs
are predicted, not fitted; the errors are in experiments/plan_accuracy. Called by plan.py and
search.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from easylm_jax.mesh import AXES, parse_mesh
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.models.remat import ATTENTION, parse_policy
from easylm_jax.optim_state import bytes_per_parameter
from easylm_jax.planner.case import Case
from easylm_jax.planner.memory import BYTES, WINDOWED_WAYS, saved_per_token, weights
from easylm_jax.planner.remat import forward_flops, recomputed_flops
from easylm_jax.planner.topology import Topology

# Share of the bf16 peak that the products of a whole step reach, all that is not modelled included,
# and the run that it was fitted to (see experiments/plan_accuracy).
EFFICIENCY: dict[str, tuple[float, str]] = {
    "v4": (0.734, "MaxText's synthetic 22B, v4-128"),
    "v5e": (0.795, "MaxText's synthetic 16B, v5e-256"),
    "v5p": (0.80, "MaxText Llama2-70B, v5p-512"),
    "v6e": (0.59, "MaxText Llama3.1-70B, v6e-256"),
    "a100": (0.556, "IBM fms-fsdp 7B, 128 A100"),
    "h100": (0.535, "MaxText Llama2-7B, 8 H100"),
}
DEFAULT_EFFICIENCY = (0.55, "none of this chip, so the middle of the others")
LIKE = {"h200": "h100"}  # the same compute
HOST_BANDWIDTH = 16e9  # bytes/s of one chip to its host's memory and back: PCIe, an assumption
ATTENTION_SLOWER = 2.0  # times as long per FLOP as other products: softmax between them, diagonals
GPUS_PER_NODE = 8
WRAPS_FROM = 16  # on a 2D slice a dim is closed to a ring from so many chips
TILE = 128  # columns of an array on a TPU
# Along two dims of a torus, of so many chips or more, the compiler scatters a gradient only where
# its columns, in tiles, have no prime factor above this (read off single compiled collectives).
LARGEST_PRIME = ((256, 5), (64, 23), (0, math.inf))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step; seconds of a chip, FLOPs of all chips."""

    flops_per_step: float  # of the model: causal, forward and backward, nothing twice
    hardware_flops: float  # with what the remat policy computes again
    compute_s: float
    memory_s: float
    ici_s: float  # all of it, hidden or not
    dcn_s: float
    step_s: float
    tokens_per_s_per_chip: float
    mfu: float
    assumptions: tuple[str, ...]


class AllReduced(NamedTuple):
    """Parameters of a chip's share along `tensor` for which the TPU compiler sends an all-reduce
    along `fsdp`, twice the bytes: where they should be gathered, and their gradients scattered."""

    gathered: float = 0.0
    summed: float = 0.0


NOTHING = AllReduced()


class Traffic(NamedTuple):
    """What a chip sends in a step along one mesh axis."""

    axis: str
    num_bytes: float
    hidden: bool  # under the matrix products
    what: str


def roofline(case: Case, topology: Topology) -> Estimate:
    """The estimate of `case` on `topology`.

    Raises:
      ValueError: the speed of this topology is not known (a CPU), or the mesh does not fit.
    """
    chip = topology.chip
    if why := unknown_speed(topology):
        raise ValueError(why)
    sizes = parse_mesh(case.mesh, topology.num_chips)
    efficiency, fitted_to = EFFICIENCY.get(LIKE.get(chip.name, chip.name), DEFAULT_EFFICIENCY)
    flops = model_flops(case)
    again, attention = _recomputed(case)
    hardware = flops + again
    slowed = hardware + (ATTENTION_SLOWER - 1) * attention
    compute_s = slowed / topology.num_chips / (chip.peak_flops * efficiency)
    memory_s = _memory_bytes(case, sizes) / chip.hbm_bandwidth
    update_s = _update_bytes(case, sizes) / chip.hbm_bandwidth

    fast, slow = _by_network(case.mesh, sizes, topology)
    whole = all_reduced(case.model, fast, topology)
    seconds = {"ici": 0.0, "dcn": 0.0, "hidden": 0.0, "exposed": 0.0}
    for traffic in traffics(case, sizes, whole):
        ici_s, dcn_s = _send_seconds(traffic, fast, slow, topology)
        seconds["ici"] += ici_s
        seconds["dcn"] += dcn_s
        seconds["hidden" if traffic.hidden else "exposed"] += ici_s + dcn_s
    host_s = _host_bytes(case, sizes) / HOST_BANDWIDTH
    step_s = max(compute_s, memory_s, host_s, seconds["hidden"]) + update_s + seconds["exposed"]
    return Estimate(
        flops_per_step=flops,
        hardware_flops=hardware,
        compute_s=compute_s,
        memory_s=memory_s + update_s,
        ici_s=seconds["ici"],
        dcn_s=seconds["dcn"],
        step_s=step_s,
        tokens_per_s_per_chip=case.tokens_per_step / step_s / topology.num_chips,
        mfu=flops / (step_s * chip.peak_flops * topology.num_chips),
        assumptions=(
            f"products run at {efficiency:.0%} of the peak, fitted to one run: {fitted_to}; "
            f"those of the attention take {ATTENTION_SLOWER:g} times as long",
            "gathering weights and scattering gradients along fsdp, reading memory, and offloading "
            f"at {HOST_BANDWIDTH / 1e9:.0f} GB/s run under the products; collectives along tensor "
            "and sequence (ring: hidden) and replica, and the optimiser's update, run alone",
            "rows hold one document each; reading data and checkpoints cost nothing",
            *_whole_texts(whole, weights(case.model).total / sizes["tensor"]),
        ),
    )


def _whole_texts(whole: AllReduced, total: float) -> list[str]:
    if not whole.summed:
        return []
    what = "of the weights and gradients" if whole.gathered else "of the gradients"
    return [
        f"{whole.summed / total:.0%} {what} have a shape and a mesh for which the TPU compiler "
        "sends the whole arrays along fsdp, by all-reduces: twice the bytes"
    ]


def unknown_speed(topology: Topology) -> str | None:
    """Why there can be no estimate, in a sentence; None where there can."""
    chip = topology.chip
    if not chip.peak_flops:
        missing = f"the speed of {chip.name!r}"
    elif topology.num_chips > 1 and not chip.ici_bandwidth:
        missing = f"the bandwidth between chips of {chip.name!r}"
    else:
        return None
    return (
        f"no roofline for {topology}: {missing} is not in chips.py; measure it with "
        "`python -m easylm_jax.bench`"
    )


# ---- work --------------------------------------------------------------------------------------


def model_flops(case: Case) -> float:
    """FLOPs of a step, causal, as MFU counts them."""
    m = case.model
    per_token = flops_per_token(
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        d_model=m.d_model,
        d_ff=m.d_ff,
        vocab_size=m.vocab_size,
        seq_len=case.seq_len,
        window=m.attention.sliding_window,
    )
    return per_token["causal"] * case.tokens_per_step


def _recomputed(case: Case) -> tuple[float, float]:
    """FLOPs of a step that the policy does again, and of all its attention, again included."""
    model, size = case.model, dict(batch=case.batch_size, seq_len=case.seq_len)
    again = recomputed_flops(model, model.remat, **size)
    attention = 3 * forward_flops(model, **size)["attention"] + again.get("attention", 0.0)
    return float(model.num_layers * sum(again.values())), model.num_layers * attention


def _memory_bytes(case: Case, sizes: Mapping[str, int]) -> float:
    """Read and written by the layers: kernels three times a micro-batch, activations.

    Of each token: what is kept, written and read; and about as much again by norms, rope, sums and
    the attention, at the width of the stream and of the MLP, forward, again and backward.
    """
    model, tensor = case.model, sizes["tensor"]
    size = BYTES[model.dtype]
    tokens = case.tokens_per_step / math.prod(sizes[a] for a in AXES if a != "tensor")
    kept, _ = saved_per_token(model, tensor)
    passing = size * (8 * model.d_model + 4 * model.d_ff / tensor)
    kernels = 3 * size * case.micro_batches * weights(model).total / tensor
    return kernels + model.num_layers * tokens * (2 * kept + 3 * passing)


def _host_bytes(case: Case, sizes: Mapping[str, int]) -> float:
    """Offloaded activations, there and back."""
    tokens = case.tokens_per_step / math.prod(sizes[a] for a in AXES if a != "tensor")
    return 2 * case.model.num_layers * tokens * saved_per_token(case.model, sizes["tensor"])[1]


def _update_bytes(case: Case, sizes: Mapping[str, int]) -> float:
    """The optimiser reads the gradient twice (its norm) and reads and writes all of the state."""
    master = BYTES[case.model.param_dtype]
    state = master + bytes_per_parameter(case.optim)
    share = weights(case.model).total / (sizes["fsdp"] * sizes["tensor"])
    return share * (2 * state + 2 * master)


# ---- what is sent ------------------------------------------------------------------------------


def traffics(case: Case, sizes: Mapping[str, int], whole: AllReduced = NOTHING) -> list[Traffic]:
    """What a chip sends in a step, by mesh axis, counted as rings send it."""
    model, micro = case.model, case.micro_batches
    size, tensor = BYTES[model.dtype], sizes["tensor"]
    total = weights(model).total / tensor  # of the model, over fsdp
    share = {axis: (n - 1) / n for axis, n in sizes.items()}
    tokens = case.tokens_per_step / math.prod(sizes[a] for a in AXES if a != "tensor")
    stream = size * tokens * model.d_model
    actions = parse_policy(model.remat)
    redone = actions is not None and actions["o"] == "recompute"
    gradients = 4 * total / sizes["fsdp"]
    sums = micro if model.has_dropout else 1  # over replicas in a step: see step.py
    # All-reduces of the stream, which send everything twice. A layer: o and down forward; q, k, v,
    # gate and up backward, each apart. Then the embedding, there and back, and the head.
    all_reduces = model.num_layers * (7 + redone) + 3
    gathered, scattered = (micro * (total + more) for more in whole)
    sent = [
        Traffic("fsdp", 2 * size * gathered * share["fsdp"], True, "weights, gathered twice"),
        Traffic("fsdp", 4 * scattered * share["fsdp"], True, "gradients"),
        Traffic("tensor", 2 * stream * all_reduces * share["tensor"], False, "activations"),
        *_attention_traffics(case, sizes, tokens * size / tensor * model.num_layers),
        Traffic("sequence", 2 * gradients * micro * share["sequence"], False, "gradients"),
        Traffic("replica", 2 * gradients * sums * share["replica"], False, "gradients"),
    ]
    return [traffic for traffic in sent if traffic.num_bytes]


def _attention_traffics(case: Case, sizes: Mapping[str, int], per_width: float) -> list[Traffic]:
    """What the attention sends along `sequence`; `per_width`: bytes of arrays one number wide.

    Arrays pass forward and backward, and once more under any remat policy: what arrived has no
    name that a policy could keep.
    """
    model, n = case.model, sizes["sequence"]
    if n == 1:
        return []
    q, kv = (per_width * h * model.head_dim for h in (model.num_heads, 2 * model.num_kv_heads))
    actions = parse_policy(model.remat)
    passes = 2 if actions is None else 3
    across = model.attention.across_sequence
    if across == "gather":
        gathered = passes * (n - 1) * kv
        return [Traffic("sequence", gathered, False, "keys and values, and their gradients")]
    exchanged = passes * (2 * q + kv)  # q, k, v, and the output
    if across == "all_to_all":
        return [Traffic("sequence", exchanged * (n - 1) / n, False, "rows for heads, and back")]
    again = actions is not None and "recompute" in {actions[name] for name in ATTENTION}
    turns = (2 + again) * (n - 1) * kv
    float32 = 4 / BYTES[model.dtype] * n * kv
    return [
        Traffic("sequence", turns + float32 + kv, True, "keys, values, their gradients: the ring"),
        Traffic("sequence", exchanged, False, "halves of rows, to where they are attended"),
    ]


def all_reduced(model: LlamaConfig, fast: Mapping[str, int], topology: Topology) -> AllReduced:
    """What the TPU compiler of `setup.py` neither gathers nor scatters.

    It does both along one torus dim, and where the products are rings of partial ones, and neither
    along three dims. Along a square 2D slice it scatters nothing; along other two dims it depends
    on the number of columns. A kernel split along D is laid out by its other dim where the part of
    a chip is no whole tile.
    """
    dims = [topology.shape[d] for d in _torus_dims(topology.shape, fast).get("fsdp", ())]
    ways, tensor, D = math.prod(dims), fast["tensor"], model.d_model
    total = weights(model).total / tensor
    if len(dims) < 2 or ways <= WINDOWED_WAYS:
        return NOTHING
    if len(dims) == 3:
        return AllReduced(total, total)
    if topology.chip.ici_dims == 2 and dims[0] == dims[1]:
        return AllReduced(summed=total)
    limit = next(prime for least, prime in LARGEST_PRIME if ways >= least)
    q_width, kv_width = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    L, V = model.num_layers, 0 if model.tie_embeddings else model.vocab_size
    by_rows = [(L, q_width), (2 * L, kv_width), (2 * L, model.d_ff), (1, V)]  # q; k, v; ...; head
    by_columns = [(L, q_width), (L, model.d_ff), (1, model.vocab_size)]  # o; down; the embedding
    kernels = [(times, width, width / tensor) for times, width in by_rows]
    kernels += [
        (times, width, width / tensor if D / ways % TILE else D) for times, width in by_columns
    ]
    summed = [
        times * D * width
        for times, width, columns in kernels
        if _largest_prime(math.ceil(columns / TILE)) > limit
    ]
    return AllReduced(summed=sum(summed) / tensor)


def _largest_prime(n: int) -> int:
    """The largest prime factor of n; 1 of 1."""
    factor = 2
    while factor * factor <= n:
        n, factor = (n // factor, factor) if n % factor == 0 and n > factor else (n, factor + 1)
    return n


def _by_network(
    mesh: str, sizes: Mapping[str, int], topology: Topology
) -> tuple[dict[str, int], dict[str, int]]:
    """Axis sizes over the fast network and over the slow one.

    Of TPU slices as written after "@", else outer axes across. A node has 8 GPUs whatever is
    written, and inner axes lie together.
    """
    slow = dict.fromkeys(AXES, 1)
    if topology.chip.ici_dims == 0:
        left = min(GPUS_PER_NODE, math.prod(topology.shape))
        for axis in reversed(AXES):
            together = sizes[axis] if sizes[axis] <= left else math.gcd(sizes[axis], left)
            slow[axis] = sizes[axis] // together
            left //= together
    elif "@" in mesh:
        try:
            slow = parse_mesh(mesh.removeprefix("!").partition("@")[2], topology.num_slices)
        except ValueError as error:
            raise ValueError(
                f"mesh {mesh!r} does not fit {topology}; let the sizes after the @ multiply to "
                f"{topology.num_slices}, its number of slices"
            ) from error
    else:
        left = topology.num_slices
        for axis in AXES:
            slow[axis] = math.gcd(sizes[axis], left)
            left //= slow[axis]
    return {axis: sizes[axis] // slow[axis] for axis in AXES}, slow


def _send_seconds(
    traffic: Traffic, fast: Mapping[str, int], slow: Mapping[str, int], topology: Topology
) -> tuple[float, float]:
    """Seconds on the fast network and on the slow one.

    Over both, the collective runs on the fast one first: only 1/fast of it crosses, through the
    cards of all that have a part of it.
    """
    axis = traffic.axis
    fast_s = slow_s = 0.0
    if fast[axis] > 1:
        fast_s = traffic.num_bytes / bandwidth_along(axis, fast, topology)
    if slow[axis] > 1:
        slow_s = traffic.num_bytes / fast[axis] / topology.chip.dcn_bandwidth
    return fast_s, slow_s


def bandwidth_along(axis: str, fast: Mapping[str, int], topology: Topology) -> float:
    """Bytes/s that a chip sends along a mesh axis: all links of the torus dims that it takes.

    A torus dim that is not closed to a ring counts half: of a 3D slice all are, if each is a
    multiple of 4. An axis that is no product of dims shares one with others, as an open line.
    """
    chip, shape = topology.chip, topology.shape
    if chip.ici_dims == 0:
        return chip.ici_bandwidth  # NVLink
    per_dim = chip.ici_bandwidth / chip.ici_dims
    dims = _torus_dims(shape, fast).get(axis)
    if dims is None:
        return per_dim / 2
    if chip.ici_dims == 3:
        return per_dim * len(dims) * (1.0 if all(n % 4 == 0 for n in shape) else 0.5)
    return per_dim * sum(1.0 if shape[d] >= WRAPS_FROM else 0.5 for d in dims)


def _torus_dims(shape: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Which torus dims each mesh axis takes, as jax lays a mesh: inner axes first, and each as many
    dims as multiply to its size."""
    free, taken = {d for d, size in enumerate(shape) if size > 1}, {}
    for axis in reversed(AXES):
        fits = [
            dims
            for count in range(len(free), 0, -1)
            for dims in itertools.combinations(sorted(free), count)
            if math.prod(shape[d] for d in dims) == sizes[axis]
        ]
        if fits:
            taken[axis] = fits[0]
            free -= set(fits[0])
    return taken
