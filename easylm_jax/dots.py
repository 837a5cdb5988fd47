"""Matrix products whose operands may be bfloat16 and whose results are float32, nothing more."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

Dims = tuple[int, ...]


def dot_f32(
    a: Float[Array, "..."], b: Float[Array, "..."], dims_a: Dims, dims_b: Dims, *, batch: Dims = ()
) -> Float[Array, "..."]:
    """Contract `dims_a` of a with `dims_b` of b, over the `batch` dims of both.

    Accumulated in float32 and given out in float32: casting the result is the caller's choice. On
    XLA's CPU backend this is also the fast path; asking for bfloat16 out is up to six times slower.
    """
    dims = ((dims_a, dims_b), (batch, batch))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
