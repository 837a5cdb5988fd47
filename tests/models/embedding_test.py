"""The embedding lookup against plain indexing and adding up in float64, on one device and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.embedding import look_up

V, D = 16, 8


def draw(B, T):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(V, D)).astype(np.float32)
    return table, rng.integers(0, V, (B, T)), rng.normal(size=(B, T, D)).astype(np.float32)


def value_and_gradient(table, tokens, grad, dtype):
    def run(table):
        return look_up(table, jnp.asarray(tokens, jnp.int32), dtype)

    out, vjp = jax.vjp(run, jnp.asarray(table))
    return out, vjp(jnp.asarray(grad, dtype))[0]


@pytest.mark.parametrize("spec", [None, "1,8,1,1", "2,1,2,2", "1,1,1,8", "1,1,8,1"])
@pytest.mark.parametrize("T", [24, 1])
def test_rows_and_the_sum_of_their_gradients(spec, T):
    if T == 1 and spec == "1,1,8,1":
        spec = "4,1,2,1"  # one token cannot be split along the sequence: every device has it
    table, tokens, grad = draw(8, T)
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, grad.astype(np.float64))
    if spec is None:
        out, got = value_and_gradient(table, tokens, grad, jnp.float32)
    else:
        with jax.set_mesh(make_mesh(spec)):
            out, got = jax.jit(value_and_gradient, static_argnums=3)(
                table, tokens, grad, jnp.float32
            )
    np.testing.assert_array_equal(out, table[tokens])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_frequent_token_gets_the_whole_of_its_gradient_in_bfloat16():
    """4,096 ones are 4,096. Added up in bfloat16 they would stay at 256."""
    table, tokens = np.ones((V, D), np.float32), np.zeros((2, 2048), np.int32)
    out, got = value_and_gradient(table, tokens, np.ones((2, 2048, D)), jnp.bfloat16)
    assert out.dtype == jnp.bfloat16 and got.dtype == jnp.float32
    np.testing.assert_array_equal(got[0], np.full(D, 4096))
