"""The one matrix product of the model, with the types of its two passes spelled out.

Operands are in the compute type, every product accumulates *and comes out* in float32, and the
result is cast afterwards, forward and backward. Plain autodiff of a cast product would multiply
float32 by bfloat16 in the backward pass, and round the weight gradient to bfloat16 before it is
summed over devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from easylm_jax.dots import dot_f32, transposed_dot_f32
from easylm_jax.models.quantized import dequantize, is_quantized
from easylm_jax.models.regularizers import dropout


@jax.custom_vjp
def dot(x: Float[Array, "*R D"], kernel: Float[Array, "D F"]) -> Float[Array, "*R F"]:
    """`x @ kernel` over the last dimension of x, in the type of x; the kernel is cast to it.

    The gradient of the kernel comes out in the kernel's own type, unrounded on the way.
    """
    return dot_f32(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


def _dot_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return dot(x, kernel), (x, kernel)


def _dot_bwd(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    d_x = dot_f32(grad, kernel.astype(x.dtype), (x.ndim - 1,), (1,)).astype(x.dtype)
    if x.ndim == 3 and x.shape[0] > 1:
        # Rows and tokens as they are: merged, a split of both is no sharding, and XLA gathers one.
        d_kernel = dot_f32(x, grad, (0, 1), (0, 1))
    else:
        d_kernel = transposed_dot_f32(x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1]))
    return d_x, d_kernel.astype(kernel.dtype)


dot.defvjp(_dot_fwd, _dot_bwd)


class Linear(nn.Module):
    """y = x @ kernel (+ bias), kernel [in, out].

    What else it finds beside the kernel it adds, an adapter (lora.py), or reads instead of it, a
    quantised kernel (quantized.py). Dropout of an adapter acts when there is a "lora" key.
    """

    features: int
    kernel_init: nn.initializers.Initializer
    use_bias: bool = False
    param_dtype: DTypeLike = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*R D"]) -> Float[Array, "*R F"]:
        leaves = self.variables.get("params", {})
        init = (self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        quantized = is_quantized(leaves)
        y = dot(x, dequantize(leaves, x.dtype) if quantized else self.param("kernel", *init))
        if "lora_a" in leaves:
            drops = self.lora_dropout > 0 and self.has_rng("lora")
            x = dropout(x, self.lora_dropout, self.make_rng("lora") if drops else None)
            y = y + dot(dot(x, leaves["lora_a"]), leaves["lora_b"])
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return y
