"""Ids and loss weights of an example are born together."""

import random

import numpy as np

from easylm_jax.text.example import Example, Segment, document_example, encode_example
from easylm_jax.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")


def test_a_document_has_one_bos_that_nothing_predicts():
    text = "<s>bos</s>\n" + "".join(random.Random(0).choices("abc \u00e9", k=50))
    ids, weights = encode_example(document_example(text), TOKENIZER)
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    assert ids[0] == TOKENIZER.bos_id and np.sum(ids == TOKENIZER.bos_id) == 1
    assert ids[-1] == TOKENIZER.eos_id and np.sum(ids == TOKENIZER.eos_id) == 1
    np.testing.assert_array_equal(weights, [0] + [1] * (len(ids) - 1))
    assert TOKENIZER.decode(ids) == text


def test_each_segment_is_tokenised_alone_with_its_own_weight():
    rng = random.Random(1)
    parts = ["".join(rng.choices("xyz<>s ", k=rng.randint(0, 9))) for _ in range(8)]
    weights = [rng.random() for _ in parts]
    segments = [Segment(text, weight=w) for text, w in zip(parts, weights, strict=True)]
    segments.insert(3, Segment(ids=(5, 6, 7), weight=0.5, role="assistant"))
    segments.insert(0, Segment("<s>", special=True))
    ids, got = encode_example(Example(tuple(segments)), TOKENIZER)
    expected_ids, expected = [TOKENIZER.bos_id], [0.0]
    for segment in segments[1:]:
        piece = list(segment.ids or TOKENIZER.encode(segment.text))
        expected_ids += piece
        expected += [segment.weight] * len(piece)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
