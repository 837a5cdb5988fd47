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

from easylm_jax.chips import Chip
from easylm_jax.mesh import AXES, parse_mesh
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.remat import parse_policy
from easylm_jax.optim_state import bytes_per_parameter
from easylm_jax.planner.case import Case
from easylm_jax.planner.memory import BYTES, saved_per_token, weights
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
DEFAULT_EFFICIENCY = (0.55, "no run of this chip: the middle of the others")
LIKE = {"h200": "h100"}  # the same compute
HOST_BANDWIDTH = 16e9  # bytes/s of one chip to its host's memory and back: PCIe, an assumption
ATTENTION_SLOWER = 2.0  # times as long per FLOP as other products: softmax between them, diagonals
GPUS_PER_NODE = 8
WRAPS_FROM = {2: 16, 3: 4}  # a torus dim is closed to a ring from so many chips, by its dims


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


class Traffic(NamedTuple):
    """What a chip sends in a step along one mesh axis."""

    axis: str
    num_bytes: float
    hidden: bool  # under the matrix products
    what: str


def roofline(case: Case, topology: Topology) -> Estimate:
    """The estimate of `case` on `topology`.

    Raises:
      ValueError: nothing is known of the speed of this chip (a CPU), or the mesh does not fit.
    """
    chip = topology.chip
    if not chip.peak_flops:
        raise ValueError(
            f"no roofline for {topology}: the speed of {chip.name!r} is not in chips.py; measure it"
            " with `python -m easylm_jax.bench`"
        )
    sizes = parse_mesh(case.mesh, topology.num_chips)
    efficiency, fitted_to = EFFICIENCY.get(LIKE.get(chip.name, chip.name), DEFAULT_EFFICIENCY)
    flops = model_flops(case)
    again, attention = _recomputed(case)
    hardware = flops + again
    slowed = hardware + (ATTENTION_SLOWER - 1) * attention
    compute_s = slowed / topology.num_chips / (chip.peak_flops * efficiency)
    memory_s = _memory_bytes(case, sizes) / chip.hbm_bandwidth
    update_s = _update_bytes(case, sizes) / chip.hbm_bandwidth

    within, across = _split_over_slices(case.mesh, sizes, topology)
    seconds = {"ici": 0.0, "dcn": 0.0, "hidden": 0.0, "exposed": 0.0}
    for traffic in traffics(case, sizes):
        ici_s, dcn_s = _send_seconds(traffic, within, across, topology)
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
        ),
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


def traffics(case: Case, sizes: Mapping[str, int]) -> list[Traffic]:
    """What a chip sends in a step, by mesh axis, counted as rings send it."""
    model, micro = case.model, case.micro_batches
    size, tensor = BYTES[model.dtype], sizes["tensor"]
    whole = weights(model).total / tensor  # of the model, over fsdp
    share = {axis: (n - 1) / n for axis, n in sizes.items()}
    tokens = case.tokens_per_step / math.prod(sizes[a] for a in AXES if a != "tensor")
    stream = size * tokens * model.d_model * model.num_layers
    actions = parse_policy(model.remat)
    redone = actions is not None and actions["o"] == "recompute"
    kv = size * tokens * 2 * model.num_kv_heads * model.head_dim / tensor * model.num_layers
    ring = model.attention.across_sequence == "ring"
    again = actions is not None and "recompute" in (actions["attention_out"], actions["k"])
    gradients = 4 * whole / sizes["fsdp"]
    sent = [
        Traffic("fsdp", 2 * size * whole * micro * share["fsdp"], True, "weights, gathered twice"),
        Traffic("fsdp", 4 * whole * micro * share["fsdp"], True, "gradients, scattered"),
        # An all-reduce sends everything twice. Two a layer forward, two backward.
        Traffic("tensor", 2 * stream * (4 + redone) * share["tensor"], False, "activations"),
        Traffic(
            "sequence",
            (3 + again) * kv * (sizes["sequence"] - 1),
            ring,
            "keys and values, and their gradients",
        ),
        Traffic("sequence", 2 * gradients * micro * share["sequence"], False, "gradients"),
        Traffic("replica", 2 * gradients * share["replica"], False, "gradients, once a step"),
    ]
    return [traffic for traffic in sent if traffic.num_bytes]


def _split_over_slices(
    mesh: str, sizes: Mapping[str, int], topology: Topology
) -> tuple[dict[str, int], dict[str, int]]:
    """Axis sizes within a slice and across slices: as written after "@", else outer axes first."""
    across = dict.fromkeys(AXES, 1)
    if "@" in mesh:
        across = parse_mesh(mesh.removeprefix("!").partition("@")[2], topology.num_slices)
    else:
        left = topology.num_slices
        for axis in AXES:
            across[axis] = math.gcd(sizes[axis], left)
            left //= across[axis]
    return {axis: sizes[axis] // across[axis] for axis in AXES}, across


def _send_seconds(
    traffic: Traffic, within: Mapping[str, int], across: Mapping[str, int], topology: Topology
) -> tuple[float, float]:
    """Seconds on the fast network and on the slow one.

    Over both, the collective runs within slices first: only 1/within of it crosses.
    """
    axis, chip = traffic.axis, topology.chip
    ici_s = dcn_s = 0.0
    if chip.ici_dims == 0:
        return _gpu_seconds(traffic, within, chip)
    if within[axis] > 1:
        ici_s = traffic.num_bytes / torus_bandwidth(axis, within, topology)
    if across[axis] > 1:
        dcn_s = traffic.num_bytes / within[axis] / chip.dcn_bandwidth
    return ici_s, dcn_s


def _gpu_seconds(traffic: Traffic, sizes: Mapping[str, int], chip: Chip) -> tuple[float, float]:
    """NVLink within a node of 8, one network card per GPU between nodes; inner axes lie together.

    The members of a group that share a node share the work of their cards.
    """
    inner = math.prod(sizes[a] for a in AXES[AXES.index(traffic.axis) + 1 :])
    together = max(1, min(sizes[traffic.axis], GPUS_PER_NODE // inner))
    if together == sizes[traffic.axis]:
        return traffic.num_bytes / chip.ici_bandwidth, 0.0
    fast_s = traffic.num_bytes / chip.ici_bandwidth if together > 1 else 0.0
    return fast_s, traffic.num_bytes / together / chip.dcn_bandwidth


def torus_bandwidth(axis: str, sizes: Mapping[str, int], topology: Topology) -> float:
    """Bytes/s that a chip sends along a mesh axis: all links of the torus dims that it takes.

    A torus dim that is not closed to a ring counts half. An axis that is no product of dims shares
    one with others, as an open line.
    """
    chip = topology.chip
    per_dim = chip.ici_bandwidth / chip.ici_dims
    dims = _torus_dims(topology.shape, sizes).get(axis)
    if dims is None:
        return per_dim / 2
    wraps_from = WRAPS_FROM[chip.ici_dims]
    return per_dim * sum(1.0 if topology.shape[d] >= wraps_from else 0.5 for d in dims)


def _torus_dims(shape: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Which torus dims each mesh axis takes, inner axes first: those whose product is its size."""
    free, taken = set(range(len(shape))), {}
    for axis in reversed(AXES):
        if sizes[axis] == 1:
            continue
        for count in range(1, len(free) + 1):
            fits = [
                dims
                for dims in itertools.combinations(sorted(free), count)
                if math.prod(shape[d] for d in dims) == sizes[axis]
            ]
            if fits:
                taken[axis] = fits[0]
                free -= set(fits[0])
                break
    return taken
