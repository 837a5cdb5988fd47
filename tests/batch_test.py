"""`check_batch` accepts what the reference's generator draws and names every broken invariant."""

import jax
import numpy as np
import pytest

from easylm_jax.batch import Batch, check_batch
from tests.tiny import VOCAB, tiny_batch


@pytest.fixture
def batch() -> Batch:
    return jax.tree.map(np.array, tiny_batch(1))


@pytest.mark.parametrize("seed", range(5))
def test_random_packed_rows_pass(seed):
    check_batch(jax.tree.map(np.array, tiny_batch(seed)), vocab_size=VOCAB)


def test_every_broken_invariant_is_named(batch):
    end = int(np.flatnonzero(batch.segment_ids[0] == 2)[0])  # the first token of document 2

    def broken(field, index, value):
        array = getattr(batch, field).copy()
        array[index] = value
        return batch.replace(**{field: array})

    for changed, words in (
        (batch.replace(weights=batch.weights[:, 1:]), "batch.weights has shape .* like tokens"),
        (broken("tokens", (0, 3), VOCAB), f"batch.tokens holds ids .* vocabulary is {VOCAB}"),
        (broken("targets", (1, 0), -1), "batch.targets holds ids -1"),
        (broken("segment_ids", (0, 0), 9), "segment_ids decrease"),
        (broken("positions", (0, end + 1), 7), "positions do not count up"),
        (broken("weights", (0, -1), 0.5), "weights are not 0 on padding"),
    ):
        with pytest.raises(ValueError, match=words):
            check_batch(changed, vocab_size=VOCAB)
