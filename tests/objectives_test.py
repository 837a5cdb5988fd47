"""Cross-entropy in chunks against a float64 log-softmax over all logits. Letters as in the file."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from easylm_jax import objectives
from easylm_jax.models.llama import make_forward
from easylm_jax.objectives import cross_entropy, cross_entropy_sums, token_losses
from tests.tiny import assert_close, tiny_batch, tiny_config, tiny_params

# Chunks that are one, that divide the tokens (3 * 35 = 105), that do not, that exceed them.
CHUNKS = pytest.mark.parametrize("chunk", [1, 21, 32, 1024])


def draw(dtype="float32", *, B=3, T=35, D=16, V=37):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    head = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)
    weights = rng.uniform(0.5, 2, size=(B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return hidden, head, targets, jnp.asarray(weights, jnp.float32)


def by_log_softmax(hidden, head, targets, weights):
    """Per token loss and hit, and the gradients of the weighted sum in hidden and head; float64."""
    h, w, weights = (np.asarray(x, np.float64) for x in (hidden, head, weights))
    logits = h @ w
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    one_hot = np.eye(w.shape[1])[np.asarray(targets)]
    d_logits = (np.exp(log_p) - one_hot) * weights[..., None]
    loss = -(log_p * one_hot).sum(-1)
    hit = (logits.argmax(-1) == np.asarray(targets)).astype(float)
    return loss, hit, (d_logits @ w.T, np.einsum("btd,btv->dv", h, d_logits))


@CHUNKS
def test_sums_and_gradients_equal_float64(chunk, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    args = hidden, head, targets, weights = draw()
    loss, hit, grads = by_log_softmax(*args)

    def scaled(hidden, head):  # by -3, as a caller's own loss may be
        sums = cross_entropy_sums(hidden, head, targets, weights)
        return -3 * sums[0], sums

    value = jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)
    (_, sums), got = jax.jit(value)(hidden, head)
    w = np.asarray(weights, np.float64)
    np.testing.assert_allclose(sums, ((loss * w).sum(), (hit * w).sum()), rtol=1e-6)
    np.testing.assert_allclose(cross_entropy_sums(*args), sums, rtol=1e-6)  # without a gradient
    assert_close(got, tuple(-3 * g for g in grads), rtol=1e-6)
    assert_close(token_losses(hidden, head, targets), (loss, hit), rtol=1e-6)


def test_bfloat16_hidden_states_and_a_float32_head():
    """The head's gradient comes out float32 and errs by what bfloat16 takes from each summand."""
    args = hidden, head, targets, weights = draw("bfloat16")
    loss, _, grads = by_log_softmax(hidden, head.astype(jnp.bfloat16), targets, weights)

    def loss_sum(hidden, head):
        return cross_entropy_sums(hidden, head, targets, weights)[0]

    value, got = jax.value_and_grad(loss_sum, argnums=(0, 1))(hidden, head)
    assert [g.dtype for g in got] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(value, (loss * np.asarray(args[3])).sum(), rtol=1e-6)
    assert_close(got, grads, rtol=2**-8)


def test_tokens_of_weight_zero_change_nothing_however_large():
    hidden, head, targets, weights = draw()
    ignored = weights == 0
    noise = 1e20 * jax.random.normal(jax.random.key(0), hidden.shape)
    garbage = jnp.where(ignored[..., None], noise, hidden)

    def loss_sum(hidden, targets):
        return jax.value_and_grad(lambda *a: cross_entropy_sums(*a, targets, weights)[0], (0, 1))(
            hidden, head
        )

    expected, (d_hidden, d_head) = loss_sum(hidden, targets)
    got, (d_hidden_1, d_head_1) = loss_sum(garbage, jnp.where(ignored, 0, targets))
    assert ignored.sum() > 20 and got == expected
    assert (d_hidden_1 == d_hidden).all() and (d_head_1 == d_head).all()
    assert (d_hidden[ignored] == 0).all()


@pytest.mark.slow
def test_tied_heads_add_both_gradients():
    """The gradient in a tied table is that of an untied embedding plus that of an untied head."""
    params, batch = tiny_params(), tiny_batch()
    table = params["embed"]["embedding"]
    rest = {k: v for k, v in params.items() if k != "lm_head"}
    tied = cross_entropy(make_forward(tiny_config(tie_embeddings=True)))
    untied = cross_entropy(make_forward(tiny_config()))

    def loss(objective, params):
        return objective(params, None, batch, None)["loss"][0]

    grad_tied = jax.jit(jax.grad(functools.partial(loss, tied)))(rest)
    pair = rest | {"lm_head": {"kernel": table.T}}
    grad_pair = jax.jit(jax.grad(functools.partial(loss, untied)))(pair)
    both = grad_pair["embed"]["embedding"] + grad_pair["lm_head"]["kernel"].T
    assert_close(grad_tied["embed"]["embedding"], both, rtol=1e-6)


def test_a_tied_head_has_its_gradient_in_bfloat16():
    """The head's gradient, transposed: a product that XLA on CPU once refused to make."""
    table = jax.random.normal(jax.random.key(0), (48, 16))
    hidden = jax.random.normal(jax.random.key(1), (2, 32, 16), jnp.bfloat16)
    targets, weights = jnp.zeros((2, 32), jnp.int32), jnp.ones((2, 32))

    def loss(table, hidden):
        return cross_entropy_sums(hidden, table.T, targets, weights)[0]

    rounded = jax.jit(jax.grad(loss))(table, hidden)
    exact = jax.jit(jax.grad(loss))(table, hidden.astype(jnp.float32))
    assert_close(rounded, exact, rtol=0.02)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a jaxpr or one inside it computes."""
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
    inner = [largest_array(j) for eqn in jaxpr.eqns for j in jaxprs_in_params(eqn.params)]
    return max(sizes + inner, default=0)


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK", 16)
    hidden, head, targets, weights = draw(B=4, T=64, D=8, V=500)

    def grads(hidden, head):
        return jax.grad(lambda *a: cross_entropy_sums(*a, targets, weights)[0], (0, 1))(
            hidden, head
        )

    assert largest_array(jax.make_jaxpr(grads)(hidden, head).jaxpr) == 16 * 500
    losses = jax.make_jaxpr(lambda *a: token_losses(*a, targets))(hidden, head)
    assert largest_array(losses.jaxpr) == 16 * 500
    compiled = jax.jit(grads).lower(hidden, head).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * 64 * 500
