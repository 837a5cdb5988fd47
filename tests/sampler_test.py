"""Generating with a cache against forward passes without one, and against the softmax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.models.llama import Llama, init_cache, output_logits
from easylm_jax.sampler import generate, pad_prompts
from tests.tiny import BLOCKS, VOCAB, assert_close, tiny_config, tiny_params

WINDOW = dataclasses.replace(BLOCKS, sliding_window=4)
NEVER = -1  # an EOS that is no id
PROMPTS = [[5, 9, 2, 40, 33], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


WINDOWED = pytest.param(WINDOW, marks=pytest.mark.slow, id="window")


@pytest.fixture(scope="module", params=[pytest.param(BLOCKS, id="full"), WINDOWED])
def full_forward(request):
    """(config, function from rows of ids to their logits [B, T, V], without a cache)."""
    config = tiny_config(attention=request.param)

    @jax.jit
    def logits(tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        hidden, _ = Llama(config).apply(
            {"params": tiny_params()}, tokens, jnp.ones_like(tokens), positions
        )
        return output_logits(tiny_params(), hidden)

    return config, logits


def test_greedy_equals_the_argmax_of_full_forwards_for_ragged_prompts(full_forward):
    config, logits = full_forward
    tokens, lengths = pad_prompts(PROMPTS)
    got = generate(
        tiny_params(),
        tokens,
        lengths,
        jax.random.key(0),
        config=config,
        max_new_tokens=6,
        eos_id=NEVER,
        vocab_size=VOCAB,
        temperature=0.0,
    )
    rows = np.pad(tokens, ((0, 0), (0, 6)))
    for step in range(6):
        at = (np.arange(3), lengths + step)
        rows[at] = np.asarray(logits(jnp.asarray(rows)).argmax(-1))[
            np.arange(3), lengths + step - 1
        ]
    expected = [row[n : n + 6] for row, n in zip(rows, lengths, strict=True)]
    np.testing.assert_array_equal(got, expected)


def test_logits_from_the_cache_equal_those_of_a_full_forward(full_forward):
    """Two rows in pieces of 7, 1, 1, 3 tokens into a cache longer than needed."""
    config, logits = full_forward
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, size=(2, 12)), jnp.int32)
    cache, seen, start = init_cache(config, 2, 20), [], 0
    for size in (7, 1, 1, 3):
        piece = tokens[:, start : start + size]
        positions = jnp.broadcast_to(jnp.arange(start, start + size)[None], piece.shape)
        hidden, cache = jax.jit(Llama(config).apply)(
            {"params": tiny_params()}, piece, jnp.ones_like(piece), positions, cache=cache
        )
        seen.append(output_logits(tiny_params(), hidden))
        start += size
    assert cache.index == 12
    assert_close(jnp.concatenate(seen, axis=1), logits(tokens), rtol=2e-6)


def sample(*, max_new_tokens, eos_id=NEVER, rows=4096):
    """Continuations of one prompt by a tokenizer of 4 ids; the embedding has 64."""
    tokens, lengths = pad_prompts([PROMPTS[0]], rows_multiple=rows)
    key, config = jax.random.key(1), tiny_config()
    length = dict(eos_id=eos_id, max_new_tokens=max_new_tokens, vocab_size=4)
    ids = (tokens, lengths, key)
    out = generate(tiny_params(), *ids, config=config, temperature=0.7, **length)
    return np.asarray(out)


def test_frequencies_of_pairs_are_those_of_the_softmax(full_forward):
    """Chi-square of 16 cells: mean 15, deviation 5.5."""
    if full_forward[0].attention.sliding_window:
        pytest.skip("the model without a window is enough")
    pairs = sample(max_new_tokens=2)
    assert pairs.max() < 4
    contexts = jnp.asarray([PROMPTS[0] + [first] for first in range(4)], jnp.int32)
    logits = np.asarray(full_forward[1](contexts), np.float64)[:, :, :4] / 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = len(pairs) * p[0, -2][:, None] * p[:, -1]
    counts = np.zeros((4, 4))
    np.add.at(counts, tuple(pairs.T), 1)
    assert expected.min() > 4
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * 5.5


def test_after_an_eos_only_eos_and_before_it_nothing_changes():
    endless, ended = (
        sample(max_new_tokens=10, rows=64),
        sample(max_new_tokens=10, rows=64, eos_id=2),
    )
    past = np.cumsum(endless == 2, axis=1) - (endless == 2) > 0
    assert 100 < past.sum() < 500
    np.testing.assert_array_equal(ended, np.where(past, 2, endless))


def test_padding_of_prompts():
    tokens, lengths = pad_prompts([[1, 2], [3]], rows_multiple=4)
    np.testing.assert_array_equal(tokens, [[1, 2], [3, 0], [3, 0], [3, 0]])
    np.testing.assert_array_equal(lengths, [2, 1, 1, 1])
