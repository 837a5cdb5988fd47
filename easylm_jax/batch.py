"""Batch: the one pytree that every data source makes and every objective reads.

What it is not: a dataset, a loader or a loss. `data/` builds batches from tokenised text (as NumPy
arrays), `train.py` places them on the mesh, `objectives.py` reads them.

The invariants, checked by `check_batch` in tests and once at the start of a run:
  - `targets[b, t]` is the token that follows `tokens[b, t]` in the same segment. Where there is
    none (last token of a segment, padding) the weight is 0 and the target is any valid id.
  - `segment_ids` number the documents of a row from 1, never decreasing along the row; 0 is
    padding.
  - `positions` count from 0 within a segment (or within the part of a document in this row).
  - `weights` are the loss weights of the *targets*; they were born with the text and travelled.
"""

import typing
from collections.abc import Mapping

import flax.struct
import numpy as np
from jax import Array
from jaxtyping import Float, Int

ArrayLike = Array | np.ndarray


@typing.no_type_check  # JAX unflattens it with shapes, shardings and cut arrays as leaves
@flax.struct.dataclass
class Batch:
    """Packed rows of tokens. B rows of T tokens; S segments at most per row.

    `per_token` holds further arrays [B, T] (old_logp, advantage, ...) and `per_segment` arrays
    [B, S] (end_index, reward, ...), by name; both are empty in pretraining.
    """

    tokens: Int[ArrayLike, "B T"]
    targets: Int[ArrayLike, "B T"]
    weights: Float[ArrayLike, "B T"]
    segment_ids: Int[ArrayLike, "B T"]
    positions: Int[ArrayLike, "B T"]
    per_token: Mapping[str, ArrayLike] = flax.struct.field(default_factory=dict)
    per_segment: Mapping[str, ArrayLike] = flax.struct.field(default_factory=dict)


def check_batch(batch: Batch, *, vocab_size: int) -> None:
    """Raise ValueError when a host batch (NumPy) breaks an invariant of this file."""
    shape = batch.tokens.shape
    for name in ("targets", "weights", "segment_ids", "positions"):
        if getattr(batch, name).shape != shape:
            raise ValueError(
                f"batch.{name} has shape {getattr(batch, name).shape}, expected {shape} like tokens"
            )
    for name in ("tokens", "targets"):
        ids = getattr(batch, name)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"batch.{name} holds ids {ids.min()} to {ids.max()}, but the model's vocabulary is "
                f"{vocab_size}: the data was made with another tokenizer"
            )
    step = np.diff(batch.segment_ids, axis=1)
    in_tail = batch.segment_ids[:, 1:] == 0
    if np.any((step < 0) & ~in_tail):
        raise ValueError("batch.segment_ids decrease along a row before its padding")
    same = (step == 0) & ~in_tail
    if np.any(np.diff(batch.positions, axis=1)[same] != 1):
        raise ValueError("batch.positions do not count up by one within a segment")
    if np.any(batch.weights[batch.segment_ids == 0] != 0):
        raise ValueError("batch.weights are not 0 on padding")
