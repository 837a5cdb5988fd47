"""The model: initialisation, no leakage between documents or from the future, packing, dropout.

That it computes what the NumPy reference and transformers compute is llama_reference_test's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.batch import Batch
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import (
    Llama,
    init_params,
    make_forward,
    output_logits,
)
from easylm_jax.models.regularizers import forget_keys, noisy_embeddings
from easylm_jax.objectives import cross_entropy, token_losses
from easylm_jax.tree import named_leaves
from tests.tiny import (
    REFERENCE,
    VOCAB,
    as_batch,
    assert_close,
    tiny_batch,
    tiny_config,
    tiny_params,
)

CONFIGS = {"blockwise": tiny_config(), "reference": tiny_config(attention=REFERENCE)}
BOTH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# ---- initialisation ----------------------------------------------------------------------------


@functools.cache
def fresh_leaves():
    cfg = tiny_config(
        d_model=128, d_ff=256, num_layers=3, qkv_bias=True, init_std=0.03, attention=REFERENCE
    )
    return named_leaves(jax.jit(lambda: init_params(cfg, jax.random.key(0)))())


def test_initial_values():
    """Standard deviations to within five of their own errors, std / sqrt(2 n)."""
    assert tiny_config().init_std == 0.02
    small = ("layers/attention/o/kernel", "layers/mlp/down/kernel")
    assert set(small) < set(fresh_leaves())
    for name, value in fresh_leaves().items():
        if name.endswith(("scale", "bias")):
            assert (value == (1.0 if name.endswith("scale") else 0.0)).all()
            continue
        std = 0.03 / np.sqrt(2 * 3) if name in small else 0.03
        assert abs(value.std() / std - 1) < 5 / np.sqrt(2 * value.size), name
        assert abs(value.mean()) < 5 * std / np.sqrt(value.size), name


def test_no_two_parameters_share_a_key():
    """Neither embedding and head, nor two layers, nor two kernels of a layer, start alike."""
    starts = []
    for name, value in fresh_leaves().items():
        if not name.endswith(("scale", "bias")):
            parts = value if name.startswith("layers") else value[None]
            starts += [np.asarray(part).ravel()[:256] for part in parts]
    assert len(starts) == 2 + 3 * 7
    correlations = np.corrcoef(starts) - np.eye(len(starts))
    assert np.abs(correlations).max() < 0.4  # chance gives 0.06 per pair


# ---- leakage -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="config")
def logits_and_losses(params, batch, *, config):
    hidden, head = make_forward(config)(params, batch, None)
    return output_logits(params, hidden), token_losses(hidden, head, batch.targets)[0]


@functools.partial(jax.jit, static_argnames="config")
def d_loss_d_embeddings(params, batch: Batch, *, config):
    """The gradient of the loss in the embedding of each token by itself, [B, T, D].

    Every token gets a row of the table of its own, so its gradient is its own.
    """
    B, T = batch.tokens.shape
    table = params["embed"]["embedding"][batch.tokens].reshape(B * T, -1)
    own = batch.replace(tokens=jnp.arange(B * T, dtype=jnp.int32).reshape(B, T))
    own_config = dataclasses.replace(config, vocab_size=B * T)

    def loss(table):
        objective = cross_entropy(make_forward(own_config))
        return objective(params | {"embed": {"embedding": table}}, None, own, None)["loss"][0]

    return jax.grad(loss)(table).reshape(B, T, -1)


def assert_one_document_changes_alone(config):
    """Another first token of the middle document of row 2: exactly nothing changes elsewhere."""
    params, batch = tiny_params(), tiny_batch(1)
    segments = np.asarray(batch.segment_ids)
    inside = (np.arange(4)[:, None] == 2) & (segments == 2)
    t = int(np.flatnonzero(inside[2])[0])
    assert segments[2, 8:16].tolist() == [1] + [2] * 5 + [3] * 2  # all three in one tile
    other = batch.replace(tokens=batch.tokens.at[2, t].set((batch.tokens[2, t] + 1) % VOCAB))
    before, after = (logits_and_losses(params, b, config=config) for b in (batch, other))
    for old, new in zip(before, after, strict=True):
        changed = np.asarray(old != new).reshape(*segments.shape, -1).any(-1)
        later = inside & (np.arange(segments.shape[1]) >= t)
        np.testing.assert_array_equal(changed, later)


@BOTH
def test_a_changed_token_changes_its_own_document_from_there_on(config):
    assert_one_document_changes_alone(config)


@pytest.mark.slow
def test_a_changed_token_changes_its_own_document_alone_on_a_mesh():
    with jax.set_mesh(make_mesh("2,2,1,2")):
        assert_one_document_changes_alone(CONFIGS["blockwise"])


@BOTH
def test_a_loss_sends_gradient_to_its_own_document_and_its_past_only(config):
    batch = tiny_batch(2)
    segments, positions = np.asarray(batch.segment_ids), np.asarray(batch.positions)
    weights = np.zeros(segments.shape, np.float32)
    at = [int(np.flatnonzero(row == 2)[2]) for row in segments]  # one token of every row
    weights[np.arange(4), at] = 1.0
    batch = batch.replace(weights=jnp.asarray(weights))
    grads = d_loss_d_embeddings(tiny_params(), batch, config=config)
    reached = np.asarray(jnp.abs(grads).max(-1))
    past = (segments == 2) & (np.arange(segments.shape[1]) <= np.array(at)[:, None])
    assert (reached[past] > 1e-6).all() and (reached[~past] == 0).all()
    assert positions[past].max() >= 2


# ---- packing -----------------------------------------------------------------------------------


def one_document_per_row(batch: Batch) -> Batch:
    """The documents of `batch`, each from the start of a row of its own, padded."""
    T = batch.tokens.shape[1]
    documents = []
    for row in range(len(batch.tokens)):
        segments = np.asarray(batch.segment_ids[row])
        for s in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == s)
            spread = {}
            for field in ("tokens", "targets", "weights", "segment_ids", "positions"):
                values = np.asarray(getattr(batch, field)[row])[where]
                values = np.minimum(values, 1) if field == "segment_ids" else values
                spread[field] = np.pad(values, (0, T - len(where)))
            documents.append(spread)
    return as_batch({k: np.stack([d[k] for d in documents]) for k in documents[0]})


def test_packed_equals_separate():
    packed = tiny_batch(4)
    separate = one_document_per_row(packed)
    assert len(separate.tokens) > len(packed.tokens)
    objective = cross_entropy(make_forward(tiny_config()))

    @jax.jit
    def value_and_grads(params, batch):
        return jax.value_and_grad(lambda p: objective(p, None, batch, None)["loss"][0])(params)

    params = tiny_params()
    loss, grads = value_and_grads(params, packed)
    loss_1, grads_1 = value_and_grads(params, separate)
    np.testing.assert_allclose(loss, loss_1, rtol=1e-6)
    assert_close(grads, grads_1, rtol=5e-6)


# ---- regularisers ------------------------------------------------------------------------------

REGULARISERS = {
    "embedding": {"embedding_dropout": 0.5},
    "residual": {"residual_dropout": (0.5, 0.5)},
    "feedforward": {"feedforward_dropout": (0.5, 0.5)},
    "attention": {"attention": dataclasses.replace(tiny_config().attention, dropout=0.5)},
    "neftune": {"neftune_alpha": 5.0},
    "forgetful": {"fcm_min_ratio": 0.3, "fcm_max_ratio": 0.6},
}


@pytest.mark.parametrize("name", REGULARISERS)
def test_each_regulariser_acts_with_a_key_and_only_then(name):
    cfg, params, batch = tiny_config(**REGULARISERS[name]), tiny_params(), tiny_batch()
    objective = cross_entropy(make_forward(cfg))

    def loss(key):
        return objective(params, None, batch, key)["loss"][0]

    assert "random_bits" not in str(jax.make_jaxpr(lambda: loss(None))())
    first, again, other = map(jax.jit(loss), map(jax.random.key, (0, 0, 1)))
    assert first == again != other


@pytest.mark.slow
def test_all_regularisers_together_have_finite_gradients():
    cfg = tiny_config(**{k: v for changes in REGULARISERS.values() for k, v in changes.items()})
    objective = cross_entropy(make_forward(cfg))
    batch, key = tiny_batch(), jax.random.key(0)
    grads = jax.jit(jax.grad(lambda p: objective(p, None, batch, key)["loss"][0]))(tiny_params())
    for grad in jax.tree.leaves(grads):
        assert jnp.isfinite(grad).all() and (grad != 0).any()


def test_rates_of_dropout_go_linearly_from_the_first_layer_to_the_last():
    """Seen in the gradient of `down` for a single token, an outer product of [F] and [D].

    Its rows are zero exactly where the feed-forward array was dropped, and its columns where the
    residual was.
    """
    L, feedforward, residual = 4, (0.1, 0.9), (0.8, 0.2)
    cfg = tiny_config(
        num_layers=L,
        d_model=512,
        d_ff=512,
        attention=REFERENCE,
        residual_dropout=residual,
        feedforward_dropout=feedforward,
    )
    one = jnp.ones((1, 1), jnp.int32)

    @jax.jit
    def d_down():
        def total(params):
            key = jax.random.key(1)
            hidden, _ = Llama(cfg).apply({"params": params}, one, one, one, dropout_key=key)
            return (hidden * jnp.arange(512.0)[None, None]).sum()

        return jax.grad(total)(init_params(cfg, jax.random.key(0)))["layers"]["mlp"]["down"]

    zeros_LFD = np.asarray(d_down()["kernel"]) == 0
    for rates, dropped in ((feedforward, zeros_LFD.all(2)), (residual, zeros_LFD.all(1))):
        expected = np.linspace(*rates, L)
        np.testing.assert_allclose(dropped.mean(-1), expected, atol=0.09)  # 4 std of 512 draws


def test_forgetful_masking_forgets_the_right_share_and_never_a_first_key():
    B, T = 64, 2048
    segments = np.repeat(np.arange(1, 9), T // 8)[None].repeat(B, 0)
    positions = np.tile(np.arange(T // 8), 8)[None].repeat(B, 0)
    segments[:, -100:] = 0
    seg, pos = jnp.asarray(segments, jnp.int32), jnp.asarray(positions, jnp.int32)
    kept = np.asarray(forget_keys(seg, pos, ratios=(0.2, 0.5), key=jax.random.key(0)))
    forgotten = kept != segments
    assert (kept[forgotten] == -1).all() and not forgotten[:, positions[0] == 0].any()
    shares = forgotten[:, positions[0] > 0].mean(axis=1)
    assert 0.2 - 0.04 < shares.min() < 0.24 and 0.46 < shares.max() < 0.5 + 0.04  # 4 std of 2048
    assert abs(shares.mean() - 0.35) < 4 * 0.3 / np.sqrt(12 * B)


def test_noise_on_embeddings_fills_the_bound_of_each_document_and_never_padding():
    """NEFTune: uniform within alpha / sqrt(n * D), n the tokens of the document, not the row."""
    alpha, D, lengths = 5.0, 256, (4, 9, 30)
    row = np.repeat((1, 2, 3, 0), (*lengths, 7))
    segments = jnp.asarray(np.stack([row, np.ones_like(row)]), jnp.int32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, D)), jnp.float32)
    noisy = noisy_embeddings(x, segments, alpha=alpha, key=jax.random.key(0))
    noise = np.asarray(noisy, np.float64) - np.asarray(x, np.float64)
    assert (noise[0, 43:] == 0).all()
    parts = [(noise[0, row == i + 1], n) for i, n in enumerate(lengths)] + [(noise[1], 50)]
    for part, n in parts:
        unit = part / (alpha / np.sqrt(n * D))
        assert 0.99 < np.abs(unit).max() <= 1 + 1e-5
        assert abs(unit.mean()) < 4 / np.sqrt(3 * unit.size)
        assert abs(unit.std() * np.sqrt(3) - 1) < 0.1
    assert noisy_embeddings(x, segments, alpha=alpha, key=None) is x


def test_forgetful_masking_is_the_same_in_both_attentions():
    params, batch, key = tiny_params(), tiny_batch(), jax.random.key(5)
    hidden = [
        jax.jit(make_forward(dataclasses.replace(cfg, **REGULARISERS["forgetful"])))(
            params, batch, key
        )[0]
        for cfg in CONFIGS.values()
    ]
    assert_close(*hidden, rtol=1e-5)
