"""Rows of tokens to a Batch, what they ask of a tokenizer, and the hash that seeds their order.

What it is not: where rows come from. Called by the other files of `data/`.
"""

import hashlib

import numpy as np
from jaxtyping import Int

from easylm_jax.batch import Batch
from easylm_jax.text.tokenizer import Tokenizer


def check_joins_documents(tokenizer: Tokenizer) -> None:
    """Documents are joined as BOS ... EOS and found again by their BOS, so both must exist."""
    if tokenizer.bos_id is None or tokenizer.bos_id == tokenizer.eos_id:
        raise ValueError(
            "joining documents needs a tokenizer with a BOS and an EOS token that differ, got ids "
            f"{tokenizer.bos_id} and {tokenizer.eos_id}: name two different ones in the "
            "tokenizer_config.json beside its tokenizer.json"
        )


def rows_to_batch(rows: Int[np.ndarray, "B T_plus_1"], *, bos_id: int) -> Batch:
    """Rows cut from a stream BOS doc EOS BOS doc EOS: each BOS starts a segment.

    With BOS = 1, EOS = 2 and T = 6, the row 8 9 2 1 7 2 1 gives

        tokens       8 9 2 1 7 2
        targets      9 2 1 7 2 1
        weights      1 1 0 1 1 0     nothing is to predict a BOS
        segment_ids  1 1 1 2 2 2
        positions    0 1 2 0 1 2
    """
    tokens, targets = rows[:, :-1], rows[:, 1:]
    is_bos = tokens == bos_id
    index = np.arange(tokens.shape[1], dtype=np.int32)
    started = np.maximum.accumulate(np.where(is_bos, index, 0), axis=1)
    earlier = ~is_bos[:, :1]  # the row begins inside a document
    return Batch(
        tokens=np.ascontiguousarray(tokens, np.int32),
        targets=np.ascontiguousarray(targets, np.int32),
        weights=(targets != bos_id).astype(np.float32),
        segment_ids=(np.cumsum(is_bos, axis=1) + earlier).astype(np.int32),
        positions=(index - started).astype(np.int32),
    )


def stable_hash(*parts: object) -> int:
    """64 bits that depend on the parts alone, not on the process or the Python version."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
