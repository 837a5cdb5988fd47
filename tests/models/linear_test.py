"""`dot` against float64, value and both gradients, and the types that come out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.models.linear import dot
from tests.tiny import assert_close


def draw(dtype):
    """x [3, 5, 64] and the gradient of the result in `dtype`; a float32 kernel [64, 48]."""
    rng = np.random.default_rng(0)
    x, grad = (jnp.asarray(rng.normal(size=(3, 5, n)), dtype) for n in (64, 48))
    return x, jnp.asarray(rng.normal(size=(64, 48)), jnp.float32), grad


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_value_and_gradients_equal_float64(dtype, rtol):
    """2**-8 is the rounding of the result to bfloat16; the operands are exact in float64."""
    x, kernel, grad = draw(dtype)
    y, vjp = jax.vjp(dot, x, kernel)
    d_x, d_kernel = vjp(grad)
    x64, w64, g64 = (np.asarray(a.astype(dtype), np.float64) for a in (x, kernel, grad))
    assert_close((y, d_x), (x64 @ w64, g64 @ w64.T), rtol=rtol)
    assert_close(d_kernel, np.einsum("bti,bto->io", x64, g64), rtol=1e-6)
    assert y.dtype == d_x.dtype == dtype


def test_the_gradient_of_a_float32_kernel_is_never_rounded_to_bfloat16():
    x, kernel, grad = draw("bfloat16")
    d_kernel = jax.vjp(dot, x, kernel)[1](grad)[1]
    assert d_kernel.dtype == jnp.float32
    rounded = d_kernel.astype(jnp.bfloat16).astype(jnp.float32)
    assert (rounded != d_kernel).mean() > 0.9
