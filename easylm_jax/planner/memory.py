"""What one chip must hold during a training step, by parts, worked out in microseconds.

Nothing is traced or compiled: plain sums over the shapes of a `Case`. What the compiler makes of
the same case is in compiled.py; how far the two lie apart is in experiments/plan_accuracy. Called
by `plan.py` and, thousands of times, by `search.py`.

A step is fullest at one of three moments, and the parts are those of the fullest:

- in the loss, when all of the forward pass is kept and a chunk of logits is open;
- in the backward pass of a layer, when in addition the gradients of the layers are being made;
- after the layers, when the gradient of the input table is whole on each chip before it is split.

The constants below were read off the buffer assignment of programs compiled for TPU v5e.
Letters: D, F, V of the model; M tokens of a micro-batch on one chip.
"""

import dataclasses
from collections.abc import Mapping

from easylm_jax.mesh import BATCH_AXES
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.models.remat import parse_policy
from easylm_jax.objectives import CHUNK
from easylm_jax.optim_state import bytes_per_parameter
from easylm_jax.planner.case import Case

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
IDS_PER_TOKEN = 5  # arrays of a Batch, 4 bytes each

# The sum that the TPU compiler holds against its limit exceeds what is alive at once. Nothing in
# the shapes says why; in eight programs of 7B to 65B by 2.5 to 4.8 float32 gradients of the head,
# mostly 3. Less where memory is short. experiments/plan_accuracy has the table.
FRAGMENTS = 2.75
# Where `tensor` or `sequence` split a layer that sum holds so many float32 arrays of the stream's
# width more. Under tensor they are the gradients of the inputs of q, k, v, gate and up, partial
# sums until they are added up over chips; under sequence the number was measured and no more, as
# was that of the layers' gradients held again, with micro-batches and without (-2 to +7 %).
STREAMS = 5
GRADIENTS_AGAIN = (3, 1)
# Up to so many ways the compiler turns "gather, then multiply" into a ring of partial products,
# and holds fewer whole gradients of kernels at once (see `_layer_gradients`).
WINDOWED_WAYS = 16


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes on one chip at the fullest moment of the step. `on_host` is not on the chip."""

    parameters: float = 0.0
    optimiser: float = 0.0
    batch: float = 0.0
    gradients: float = 0.0
    activations_saved: float = 0.0
    loss: float = 0.0  # a chunk of logits, the head and its gradient, whole over fsdp
    gathered_parameters: float = 0.0  # of a layer, and the own share in the compute type
    temporaries: float = 0.0  # of one layer's backward pass
    fragmentation: float = 0.0  # of what the compiler asks for, beyond what is alive at once
    activations_on_host: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self)) - self.activations_on_host


@dataclasses.dataclass(frozen=True)
class Weights:
    """How many numbers the matrices of a model have."""

    attention: int  # q, k, v, o of one layer
    mlp: int  # gate, up, down of one layer
    layers: int  # all layers, norms included
    embedding: int
    head: int  # 0 where it is tied to the embedding

    @property
    def total(self) -> int:
        return self.layers + self.embedding + self.head


def weights(model: LlamaConfig) -> Weights:
    """The sizes by formula; `models.llama.num_params` counts the same by tracing."""
    D, q_width = model.d_model, model.num_heads * model.head_dim
    kv_width = model.num_kv_heads * model.head_dim
    attention = 2 * D * (q_width + kv_width)
    mlp = 3 * D * model.d_ff
    small = 2 * D + model.qkv_bias * (q_width + 2 * kv_width)
    table = model.vocab_size * D
    return Weights(
        attention=attention,
        mlp=mlp,
        layers=model.num_layers * (attention + mlp + small),
        embedding=table + D,  # with the last norm
        head=0 if model.tie_embeddings else table,
    )


def saved_per_token(model: LlamaConfig, tensor: int = 1) -> tuple[float, float]:
    """Bytes that one layer keeps per token under its policy: on the chip, and on the host.

    The layer's input is not split over `tensor`; the named arrays are, but for those of the width
    of the stream. `down` is never kept: no gradient reads it.
    """
    size, D = BYTES[model.dtype], model.d_model
    q_width, kv_width = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    widths = {"q": q_width, "k": kv_width, "v": kv_width, "gate": model.d_ff, "up": model.d_ff}
    widths["attention_out"] = q_width
    num_bytes = {name: size * width / tensor for name, width in widths.items()}
    num_bytes |= {"o": size * D, "attention_lse": 4 * model.num_heads / tensor}
    layer_input = float(size * D)
    if (actions := parse_policy(model.remat)) is None:
        # Autodiff keeps what it reads: normed inputs, rotated q and k, silu and its product too.
        more = 2 * D + (q_width + kv_width + 2 * model.d_ff) / tensor
        return layer_input + sum(num_bytes.values()) + size * more, 0.0
    kept, on_host = (
        sum((num for name, num in num_bytes.items() if actions[name] == action), 0.0)
        for action in ("keep", "offload")
    )
    return layer_input + kept, on_host


def estimate(case: Case, sizes: Mapping[str, int], *, on_cpu: bool = False) -> Parts:
    """The parts of `case` on a mesh of these axis sizes (`mesh.parse_mesh`).

    A CPU holds every step from logits to their gradient in an array of its own, float32.
    """
    return max(moments(case, sizes, on_cpu=on_cpu).values(), key=lambda parts: parts.total)


def moments(case: Case, sizes: Mapping[str, int], *, on_cpu: bool = False) -> dict[str, Parts]:
    """The parts at each of the three moments named at the top."""
    model, all_weights = case.model, weights(case.model)
    size, master = BYTES[model.dtype], BYTES[model.param_dtype]
    tensor, fsdp = sizes["tensor"], sizes["fsdp"]
    ways = fsdp * tensor
    rows_ways = 1
    for axis in BATCH_AXES:
        rows_ways *= sizes[axis]
    tokens = case.tokens_per_step / (rows_ways * sizes["sequence"])  # of a step on one chip
    M = tokens / case.micro_batches
    kept, on_host = saved_per_token(model, tensor)
    table = model.vocab_size * model.d_model / tensor

    # Micro-batches are added up in float32, beside the gradient of the present one.
    added_up = 4 * all_weights.total / ways if case.micro_batches > 1 else 0.0
    stream = 4 * M * model.d_model
    splits_layer = tensor * sizes["sequence"] > 1
    again = GRADIENTS_AGAIN[case.micro_batches == 1] * (sizes["sequence"] > 1)
    base = Parts(
        fragmentation=FRAGMENTS * 4 * table * (fsdp > 1)
        + STREAMS * stream * splits_layer
        + again * 4 * all_weights.layers / ways,
        parameters=master * all_weights.total / ways,
        optimiser=bytes_per_parameter(case.optim) * all_weights.total / ways,
        batch=4 * IDS_PER_TOKEN * tokens,
        gradients=added_up,
    )
    own_cast = size * all_weights.layers / ways if size != master else 0.0
    forward = dict(
        activations_saved=kept * model.num_layers * M,
        activations_on_host=on_host * model.num_layers * M,
    )
    head_gradient = 4 * table
    head = size * table if fsdp > 1 or size != master else 0.0
    per_logit = 4 * 4 if on_cpu else 4 + size  # the logit and its gradient
    logits = per_logit * min(CHUNK, M) * model.vocab_size / tensor
    in_loss = dataclasses.replace(
        base,
        **forward,
        loss=head_gradient + head + logits,
        gathered_parameters=own_cast,
        temporaries=2 * size * M * model.d_model,
    )
    in_layer = dataclasses.replace(
        base,
        **forward,
        gradients=added_up
        + master * all_weights.layers / ways
        + _layer_gradients(model, tensor=tensor, fsdp=fsdp),
        loss=head_gradient,  # is split over fsdp only after the layers
        gathered_parameters=own_cast + _gathered(model, tensor=tensor, fsdp=fsdp),
        temporaries=_layer_temporaries(case, sizes, M) + stream * (tensor > 1),
    )
    after_layers = dataclasses.replace(
        base,
        gradients=added_up + master * all_weights.total / ways + (4 + size) * table,
    )
    return {"loss": in_loss, "layer": in_layer, "after the layers": after_layers}


def _layer_gradients(model: LlamaConfig, *, tensor: int, fsdp: int) -> float:
    """Gradients of kernels, float32, not yet added up over fsdp: the widest four at once."""
    if fsdp == 1:
        return 0.0
    held = 2 if fsdp <= WINDOWED_WAYS else 4
    return 4 * held * model.d_model * model.d_ff / tensor


def _gathered(model: LlamaConfig, *, tensor: int, fsdp: int) -> float:
    """Whole kernels of a layer: two of the MLP and two of the attention, one used, one coming."""
    if fsdp == 1:
        return 0.0
    widths = 2 * model.d_ff + 2 * model.num_heads * model.head_dim
    return BYTES[model.dtype] * model.d_model * widths / tensor


def _layer_temporaries(case: Case, sizes: Mapping[str, int], M: float) -> float:
    """What the backward pass of one layer computes again or makes on its way."""
    model, tensor = case.model, sizes["tensor"]
    size = BYTES[model.dtype]
    q_width, kv_width = (n * model.head_dim / tensor for n in (model.num_heads, model.num_kv_heads))
    in_layer = size * M * (3 * model.d_ff / tensor + 3 * model.d_model + 4 * q_width)
    row_parts = sizes["sequence"]
    if row_parts > 1 and model.attention.across_sequence == "ring":
        row_parts = 1
        in_layer += 2 * (size + 4) * M * kv_width  # keys, values and their gradients that arrive
    attended = M * row_parts if sizes["sequence"] > 1 else 0.0  # keys and values from other chips
    if model.attention.implementation == "blockwise":  # float32 sums for q, k and v
        attended_here = max(attended, M)
        return in_layer + 4 * (M * q_width + 2 * attended_here * kv_width)
    return in_layer + 4 * size * attended * kv_width
