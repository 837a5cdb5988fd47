"""Segment and Example: text with loss weights, and the one function that makes ids of it.

What it is not: a template language (that renders messages to segments) or a packer (that lays
encoded examples into rows). Loss weights are born here and travel with each token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from easylm_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of text, tokenised alone, whose tokens share one loss weight.

    Give `text`, or `ids` that are tokenised already (a sampled response). `special` makes `text`
    the name of one special token ("bos", "eos", or as the vocabulary spells it); text of any other
    segment never yields special ids. A `joined` text goes on where the segment before it ended: no
    tokenizer puts a space before it. `role` says who speaks and is not tokenised.
    """

    text: str | None = None
    weight: float = 0.0
    special: bool = False
    role: str = ""
    ids: tuple[int, ...] | None = None
    joined: bool = False


@dataclasses.dataclass(frozen=True)
class Example:
    """Segments in order, and whatever the data set said about them."""

    segments: tuple[Segment, ...]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def document_example(text: str, meta: Mapping[str, Any] | None = None) -> Example:
    """A pretraining document: BOS (nothing predicts it), the text, EOS."""
    bos = Segment("bos", weight=0.0, special=True)
    eos = Segment("eos", weight=1.0, special=True)
    return Example((bos, Segment(text, weight=1.0), eos), meta or {})


def encode_segment(segment: Segment, tokenizer: Tokenizer) -> list[int]:
    if segment.ids is not None:
        return list(segment.ids)
    if segment.special and segment.text == "bos" and tokenizer.bos_id is None:
        return []  # a model without BOS expects none
    if segment.special:
        return [tokenizer.special_id(segment.text)]
    encode = tokenizer.encode_continuation if segment.joined else tokenizer.encode
    return encode(segment.text)


def encode_example(
    example: Example, tokenizer: Tokenizer
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The example's ids, and for each the loss weight it has as a target."""
    pieces = [encode_segment(segment, tokenizer) for segment in example.segments]
    weights = [segment.weight for segment in example.segments]
    ids = np.array([i for piece in pieces for i in piece], np.int32)
    return ids, np.repeat(np.array(weights, np.float32), [len(piece) for piece in pieces])
