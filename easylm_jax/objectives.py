"""Objectives: what a batch says about the parameters, always as sums with their weights.

    objective(params, frozen, batch, rng) -> {name: (sum, weight)}

An objective cannot return a mean. The step adds sums and weights over micro-batches and devices and
divides once, so that no loss depends on how tokens were laid out. The entry "loss" is what is
differentiated.

Full logits [B, T, V] never exist: the output head is applied to `CHUNK` tokens at a time. Letters
here: C tokens of a chunk, M = B * T tokens of one device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from easylm_jax.array_types import Hidden, Params, PRNGKey, Scalar, TokenFloats, Tokens
from easylm_jax.batch import Batch
from easylm_jax.dots import dot_f32, transposed_dot_f32
from easylm_jax.mesh import AXES, BATCH_AXES
from easylm_jax.sharding import BATCH_SPEC, per_device

Sums = dict[str, tuple[Scalar, Scalar]]
Objective = Callable[[Params, Any, Batch, PRNGKey | None], Sums]
Head = Float[Array, "D V"]
Forward = Callable[[Params, Batch, PRNGKey | None], tuple[Hidden, Head]]

CHUNK = 1024


def cross_entropy(
    forward: Forward, whole: Callable[[Params, Any], Params] = lambda params, frozen: params
) -> Objective:
    """Next-token prediction: the weighted sum of -log p(target), and of right guesses.

    `whole` makes the model's parameters of those that train and those that do not.
    """

    def objective(params: Params, frozen: Any, batch: Batch, rng: PRNGKey | None) -> Sums:
        hidden_BTD, head_DV = forward(whole(params, frozen), batch, rng)
        loss, correct = cross_entropy_sums(hidden_BTD, head_DV, batch.targets, batch.weights)
        weight = batch.weights.sum()
        return {"loss": (loss, weight), "accuracy": (correct, weight)}

    return objective


@jax.named_scope("loss")  # as profiles call it
def cross_entropy_sums(
    hidden_BTD: Hidden, head_DV: Head, targets: Tokens, weights: TokenFloats
) -> tuple[Scalar, Scalar]:
    """Sums over tokens of weight * -log p(target) and of weight * (target is the best guess).

    Only the first is differentiable, in `hidden_BTD` and `head_DV`. Its gradient is made during the
    forward pass, while the logits of a chunk are at hand: three products with the head, not four.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        loss, correct = _sums(None, hidden_BTD, head_DV, targets, weights)
        return loss[0], correct[0]
    # Every device sums over its own tokens and its own slice of the vocabulary, and the gradient of
    # the head is added up over devices once, not per chunk.
    loss, correct = per_device(
        functools.partial(_sums, "tensor"),
        in_specs=(P(BATCH_AXES, "sequence", None), P(None, "tensor"), BATCH_SPEC, BATCH_SPEC),
        out_specs=(P(AXES), P(AXES)),
    )(hidden_BTD, head_DV, targets, weights)
    return loss.sum(), correct.sum()


def token_losses(
    hidden_BTD: Hidden, head_DV: Head, targets: Tokens
) -> tuple[TokenFloats, TokenFloats]:
    """-log p(target) of every token, and 1.0 where the target is the best guess. For evaluation."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _token_losses(None, hidden_BTD, head_DV, targets)
    return per_device(
        functools.partial(_token_losses, "tensor"),
        in_specs=(P(BATCH_AXES, "sequence", None), P(None, "tensor"), BATCH_SPEC),
        out_specs=(BATCH_SPEC, BATCH_SPEC),
    )(hidden_BTD, head_DV, targets)


# ---- on one device; `axis` is the mesh axis that splits the vocabulary, or None ------------------


def _token_losses(axis, hidden_BTD, head_DV, targets_BT):
    B, T, _ = hidden_BTD.shape
    head_DV = head_DV.astype(hidden_BTD.dtype)

    def chunk(args):
        loss, correct, *_ = _chunk_losses(axis, args[0], head_DV, args[1])
        return loss, correct

    per_token = lax.map(chunk, _chunks(hidden_BTD, targets_BT))
    return tuple(x.reshape(-1)[: B * T].reshape(B, T) for x in per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(axis, hidden_BTD, head_DV, targets_BT, weights_BT):
    """This device's part of the two sums, each [1]. Devices that share tokens share the sum."""
    loss_BT, correct_BT = _token_losses(axis, hidden_BTD, head_DV, targets_BT)
    return _share(axis, (loss_BT * weights_BT).sum(), (correct_BT * weights_BT).sum())


def _sums_fwd(axis, hidden_BTD, head_DV, targets_BT, weights_BT):
    head = head_DV.astype(hidden_BTD.dtype)

    def chunk(carry, args):
        loss_sum, correct_sum, d_head_DV = carry
        hidden_CD, target_C, weight_C = args
        loss_C, correct_C, p_CV, is_target_CV = _chunk_losses(axis, hidden_CD, head, target_C)
        d_logits_CV = (p_CV - is_target_CV) * weight_C[:, None]
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = dot_f32(d_logits_CV, head, (1,), (1,)).astype(hidden_CD.dtype)
        carry = (
            loss_sum + (loss_C * weight_C).sum(),
            correct_sum + (correct_C * weight_C).sum(),
            d_head_DV + transposed_dot_f32(hidden_CD, d_logits_CV),
        )
        return carry, d_hidden_CD

    zero = jnp.zeros((), jnp.float32)
    start = (zero, zero, jnp.zeros(head.shape, jnp.float32))
    chunks = _chunks(hidden_BTD, targets_BT, weights_BT)
    (loss, correct, d_head_DV), d_hidden = lax.scan(chunk, start, chunks)
    # XLA on CPU would fold the transposition of a tied head into the product, and fail in bfloat16.
    d_head_DV = lax.optimization_barrier(d_head_DV)
    M = targets_BT.size
    d_hidden_BTD = d_hidden.reshape(-1, d_hidden.shape[-1])[:M].reshape(hidden_BTD.shape)
    return _share(axis, loss, correct), (d_hidden_BTD, d_head_DV.astype(head_DV.dtype))


def _sums_bwd(axis, residuals, grads):
    del axis
    d_hidden_BTD, d_head_DV = residuals
    grad = grads[0][0]
    d_hidden_BTD = d_hidden_BTD * grad.astype(d_hidden_BTD.dtype)
    return d_hidden_BTD, d_head_DV * grad.astype(d_head_DV.dtype), None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _share(axis, *sums):
    """Each of the devices that hold the same tokens contributes an equal part, shape [1]."""
    ways = 1 if axis is None else lax.axis_size(axis)
    return tuple((x / ways).reshape(1) for x in sums)


def _chunks(*arrays):
    """[B, T, ...] to [M / C, C, ...], padded with zeros (so with weight 0) to a multiple of C."""
    M = arrays[0].shape[0] * arrays[0].shape[1]
    size = min(CHUNK, M)
    padding = -M % size

    def cut(x):
        x = x.reshape(M, *x.shape[2:])
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, size, *x.shape[1:])

    return tuple(map(cut, arrays))


def _chunk_losses(axis, hidden_CD, head_DV, target_C):
    """(loss [C], correct [C], probabilities [C, V], is target [C, V]), logits in float32."""
    logits_CV = dot_f32(hidden_CD, head_DV, (1,), (0,))
    C, V = logits_CV.shape
    local_C = target_C if axis is None else target_C - lax.axis_index(axis) * V
    is_target_CV = lax.broadcasted_iota(jnp.int32, (C, V), 1) == local_C[:, None]
    top_C = logits_CV.max(-1)
    top_C = top_C if axis is None else lax.pmax(top_C, axis)
    total_C = jnp.exp(logits_CV - top_C[:, None]).sum(-1)
    target_logit_C = jnp.take_along_axis(logits_CV, jnp.clip(local_C, 0, V - 1)[:, None], 1)[:, 0]
    if axis is not None:
        target_logit_C = jnp.where((local_C >= 0) & (local_C < V), target_logit_C, 0)
        total_C, target_logit_C = lax.psum((total_C, target_logit_C), axis)
    lse_C = top_C + jnp.log(total_C)
    p_CV = jnp.exp(logits_CV - lse_C[:, None])
    correct_C = (target_logit_C >= top_C).astype(jnp.float32)
    return lse_C - target_logit_C, correct_C, p_CV, is_target_CV
