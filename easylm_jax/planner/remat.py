"""Policies of models/remat.py compared: what each keeps, computes again and needs.

Nothing is trained and no parameter is allocated: the model is traced and compiled for the CPU from
shapes alone. `plan.py --remat` calls it; the planner takes `recomputed_flops` from here.

What a policy keeps is read off the traced program, so it is what happens and not what was meant;
FLOPs are counted by formula, since XLA's own count takes the body of a scan once. Compiled memory
ranks policies; the CPU is not the machine you train on.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from easylm_jax.array_types import Params
from easylm_jax.batch import Batch
from easylm_jax.models.llama import LlamaConfig, init_params, make_forward
from easylm_jax.models.remat import ATTENTION, NAMES, parse_policy
from easylm_jax.objectives import cross_entropy

LAYER_INPUT, UNNAMED = "input", "rest"
VOCABULARY = 512  # of the compiled block: the head and its loss must not drown the layers
MIB, GFLOP = 2**20, 1e9


# ---- what is kept ------------------------------------------------------------------------------


class Saved(NamedTuple):
    """One array per layer that the forward pass leaves for the backward pass."""

    name: str  # of models/remat.py, or "input" of the layer, or the untagged "rest"
    shape: tuple[int, ...]
    num_bytes: int
    on_host: bool


def saved_arrays(config: LlamaConfig, policy: str, *, batch: int, seq_len: int) -> list[Saved]:
    """What each layer keeps under `policy`, for `batch` rows of `seq_len` tokens, no dropout.

    Read from the scan over layers of the traced gradient: whatever its body gives out besides the
    carry is stacked over layers, and that is what "saved" means. The same program is later
    compiled. A name that a policy keeps but no gradient reads, such as `down`, is not there.
    """
    config = dataclasses.replace(config, remat=policy)
    traced = jax.make_jaxpr(gradient(config))(*_shapes(config, batch, seq_len))
    scan = next(e for e in traced.eqns if e.primitive.name == "scan" and _names(_body(e)))
    body = _body(scan)
    made_by = {id(var): eqn for eqn in body.eqns for var in eqn.outvars}
    saved = {}
    for stacked, var in zip(scan.outvars, body.outvars, strict=True):
        if stacked.aval.ndim == var.aval.ndim:
            continue  # the carry
        aval = var.aval
        num_bytes = aval.size * aval.dtype.itemsize
        on_host = aval.memory_space == jax.memory.Space.Host
        saved[id(var)] = Saved(_origin(var, body, made_by), aval.shape, num_bytes, on_host)
    return list(saved.values())


def saved_bytes(arrays: Iterable[Saved]) -> int:
    """Bytes of one layer's saved arrays that lie on the device."""
    return sum(array.num_bytes for array in arrays if not array.on_host)


def _body(scan: Any) -> Any:
    return scan.params["jaxpr"].jaxpr


def _names(body: Any) -> list[str]:
    return [eqn.params["name"] for eqn in body.eqns if eqn.primitive.name == "name"]


def _origin(var: Any, body: Any, made_by: dict[int, Any]) -> str:
    """The name an array was tagged with. JAX may round or move a saved array after the tag."""
    eqn = made_by.get(id(var))
    if eqn is None:
        return LAYER_INPUT if any(var is x for x in body.invars) else UNNAMED
    if eqn.primitive.name in ("reduce_precision", "device_put"):
        return _origin(eqn.invars[0], body, made_by)
    return eqn.params["name"] if eqn.primitive.name == "name" else UNNAMED


# ---- what is computed again --------------------------------------------------------------------


def forward_flops(config: LlamaConfig, *, batch: int, seq_len: int) -> dict[str, float]:
    """FLOPs of one layer's forward pass: 2 per weight and token, attention over half the square.

    Matrix products only, like `metrics.flops_per_token`. "attention" is its two products.
    """
    tokens, d_model = batch * seq_len, config.d_model
    q_width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    width = {"q": q_width, "k": kv_width, "v": kv_width, "o": q_width}
    width |= dict.fromkeys(("gate", "up", "down"), config.d_ff)
    flops = {name: 2.0 * tokens * d_model * w for name, w in width.items()}
    window = min(seq_len, config.attention.sliding_window or seq_len)
    pairs = batch * (seq_len * window - window**2 / 2)  # of a query and a key that it sees
    return flops | {"attention": 4.0 * pairs * q_width}


def recomputed_flops(
    config: LlamaConfig, policy: str, *, batch: int, seq_len: int
) -> dict[str, float]:
    """FLOPs of one layer that the backward pass does again, by name; empty for `none`.

    The gradients of a layer read every named array but `down`, which only adds to the stream. So a
    name that is not kept is computed again, whether it is wanted itself or as another's input: the
    attention forward runs again unless both its output and its log-sum-exp are kept, also under
    `linear_outputs`, where the weight gradient of `o` and the attention backward want them. Norms,
    rope, silu and sums are computed again too and, like everywhere, not counted. Stated for
    attention that leaves no more than these two; `reference` redoes it in any case.
    """
    if (actions := parse_policy(policy)) is None:
        return {}
    again = {name for name, action in actions.items() if action == "recompute"} - {"down"}
    if again & set(ATTENTION) or config.attention.implementation == "reference":
        again.add("attention")
    flops = forward_flops(config, batch=batch, seq_len=seq_len)
    return {name: flops[name] for name in flops if name in again}


# ---- what the compiled program needs ------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes of a compiled gradient; arguments and outputs are parameters and their gradients."""

    temporary: int
    arguments: int
    outputs: int

    @property
    def peak(self) -> int:
        return sum(self)


def gradient(config: LlamaConfig) -> Any:
    """(params, batch) -> loss and its gradient, as the training step takes it."""
    objective = cross_entropy(make_forward(config))

    def loss(params: Params, batch: Batch) -> jax.Array:
        return objective(params, None, batch, None)["loss"][0]

    return jax.value_and_grad(loss)


def compiled_memory(config: LlamaConfig, policy: str, *, batch: int, seq_len: int) -> Memory:
    """Memory of the gradient of the whole model `config`, compiled for this machine's backend."""
    config = dataclasses.replace(config, remat=policy)
    compiled = jax.jit(gradient(config)).lower(*_shapes(config, batch, seq_len)).compile()
    stats = compiled.memory_analysis()
    return Memory(
        stats.temp_size_in_bytes, stats.argument_size_in_bytes, stats.output_size_in_bytes
    )


def _shapes(config: LlamaConfig, batch: int, seq_len: int) -> tuple[Params, Batch]:
    params = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    ids = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, seq_len), jnp.float32)
    return params, Batch(ids, ids, weights, ids, ids)


# ---- the report ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One policy of the report; per layer, in bytes and FLOPs, but for `memory`."""

    policy: str
    saved: list[Saved]
    recomputed: dict[str, float]
    recomputed_share: float  # of the layer's forward pass
    memory: Memory


def compare_policies(
    config: LlamaConfig, policies: Sequence[str], *, batch: int, seq_len: int
) -> list[Row]:
    """A row for each policy."""
    size = dict(batch=batch, seq_len=seq_len)
    forward = sum(forward_flops(config, **size).values())
    rows = []
    for policy in policies:
        again = recomputed_flops(config, policy, **size)
        saved = saved_arrays(config, policy, **size)
        memory = compiled_memory(config, policy, **size)
        rows.append(Row(policy, saved, again, sum(again.values()) / forward, memory))
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """Two aligned tables and what their words mean."""
    columns = [LAYER_INPUT, *NAMES, UNNAMED]
    kept = [["kept per layer, MiB", *columns, "device"]]
    again = [["computed again per layer", "GFLOP", "of forward", "temp MiB", "peak MiB"]]
    for row in rows:
        cells = [_cell([s for s in row.saved if s.name == column]) for column in columns]
        kept.append([row.policy, *cells, f"{saved_bytes(row.saved) / MIB:,.1f}"])
        sizes = [f"{x / MIB:,.0f}" for x in (row.memory.temporary, row.memory.peak)]
        flops = f"{sum(row.recomputed.values()) / GFLOP:,.1f}"
        again.append([row.policy, flops, f"{row.recomputed_share:.1%}", *sizes])
    what = ["", *(" ".join(row.recomputed) for row in rows)]
    second = [f"{line}  {names}".rstrip() for line, names in zip(table(again), what, strict=True)]
    return "\n".join([*table(kept), "", *second, "", LEGEND])


LEGEND = """\
. nothing is stored; h on the host. `down` is never stored: no gradient reads it. GFLOP: the matrix
products named on the right, attention over the causal half. temp and peak (temp + parameters +
gradients) are of the compiled gradient of all these layers. A CPU backend may store bfloat16 as
float32 (jax 0.10 does) and has no host memory of its own: read an order, not absolute needs."""


def _cell(arrays: Sequence[Saved]) -> str:
    if not arrays:
        return "."
    host = "h" if any(array.on_host for array in arrays) else ""
    return f"{sum(array.num_bytes for array in arrays) / MIB:,.1f}{host}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with columns as wide as their widest cell; the first to the left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [c.rjust(w) for c, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return lines


def as_json(rows: Sequence[Row], **head: Any) -> str:
    """The same in one line, in bytes and FLOPs."""
    policies = [
        row._asdict()
        | {"saved": [s._asdict() for s in row.saved], "memory": row.memory._asdict()}
        | {"peak": row.memory.peak}
        for row in rows
    ]
    return json.dumps(head | {"policies": policies})
