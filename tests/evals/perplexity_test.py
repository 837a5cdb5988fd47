"""Loss, accuracy and bits per byte against NumPy in float64, for any layout of the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from easylm_jax.batch import Batch
from easylm_jax.evals.perplexity import evaluate, make_eval_sums
from tests.tiny import VOCAB, tiny_batch

RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.normal(size=(VOCAB, 8)), jnp.float32) for name in ("embed", "head")}
TOKEN_BYTES = RNG.integers(0, 7, size=VOCAB)  # a seventh are special tokens, of 0 bytes


def bigram(params, batch, key):
    """A model that looks at nothing but the token itself, so that rows can be cut anywhere."""
    assert key is None
    return params["embed"][batch.tokens], params["head"].T


def by_numpy(batch: Batch) -> dict[str, float]:
    embed, head = (np.asarray(PARAMS[name], np.float64) for name in ("embed", "head"))
    tokens, targets, weights = (
        np.asarray(x).ravel() for x in (batch.tokens, batch.targets, batch.weights)
    )
    logits = embed[tokens] @ head.T
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -log_p[np.arange(len(targets)), targets]
    text = (weights > 0) & (TOKEN_BYTES[targets] > 0)
    return {
        "loss": (loss * weights).sum() / weights.sum(),
        "accuracy": ((logits.argmax(-1) == targets) * weights).sum() / weights.sum(),
        "bits_per_byte": loss[text].sum() / np.log(2) / TOKEN_BYTES[targets[text]].sum(),
    }


def run(batches) -> dict[str, float]:
    return evaluate(jax.jit(make_eval_sums(bigram, TOKEN_BYTES)), PARAMS, batches)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_equal_to_numpy_for_uneven_weights_and_any_layout():
    batch = tiny_batch(rows=12, length=24)
    weights = batch.weights * jnp.linspace(0.1, 9, 12)[:, None]
    batch = batch.replace(weights=weights)
    expected = by_numpy(batch)
    assert_equal(run([batch]), expected)
    assert_equal(run(jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 4, 8)), expected)
    order = np.random.default_rng(1).permutation(24 * 12)
    cut = jax.tree.map(lambda x: x.ravel()[order].reshape(36, 8), batch)
    assert_equal(run([jax.tree.map(lambda x, i=i: x[i::2], cut) for i in (1, 0)]), expected)


def test_uniform_guesses_over_bytes_cost_eight_bits():
    params = {"embed": jnp.zeros((256, 8)), "head": jnp.ones((256, 8))}
    ones = jnp.ones((2, 8), jnp.int32)
    batch = Batch(ones, ones, jnp.ones((2, 8)), ones, ones)
    sums = make_eval_sums(bigram, np.ones(256, int))
    np.testing.assert_allclose(evaluate(sums, params, [batch])["bits_per_byte"], 8.0, rtol=1e-6)


def test_nothing_to_count_is_zero_and_not_nan():
    batch = tiny_batch()
    assert set(run([batch.replace(weights=jnp.zeros_like(batch.weights))]).values()) == {0.0}
