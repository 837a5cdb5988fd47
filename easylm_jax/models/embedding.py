"""The embedding lookup: a vocabulary that may be split over the mesh, a gradient in float32.

Left to autodiff and the compiler, the gradients of all places of one token would be added up in the
type of the activations: in bfloat16 the sum of 4,096 ones is 256. The price: a float32 gradient of
the whole table on every device until it is summed (1 GB for LLaMA 65B). Called by llama.py alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Float

from easylm_jax.array_types import Hidden, Tokens
from easylm_jax.mesh import BATCH_AXES
from easylm_jax.sharding import check_spec, per_device


def look_up(table_VD: Float[Array, "V D"], tokens: Tokens, dtype: DTypeLike) -> Hidden:
    """The rows of `tokens`, in `dtype`; the gradient of the table comes out in its own type.

    Each device looks up its own tokens in its own part of the vocabulary, and those that share
    tokens add up what they found (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _rows(dtype, table_VD, tokens)
    check_spec("embed/embedding", table_VD.shape, P("tensor", None), mesh)

    def local(table_VD, tokens_BT):
        ids_BT = tokens_BT - lax.axis_index("tensor") * table_VD.shape[0]
        here_BT = (ids_BT >= 0) & (ids_BT < table_VD.shape[0])
        found_BTD = _rows(dtype, table_VD, jnp.where(here_BT, ids_BT, 0))
        return lax.psum(jnp.where(here_BT[..., None], found_BTD, 0), "tensor")

    along = "sequence" if tokens.shape[1] % mesh.shape["sequence"] == 0 else None
    specs = (P("tensor", None), P(BATCH_AXES, along))
    return per_device(local, in_specs=specs, out_specs=P(BATCH_AXES, along, None))(table_VD, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rows(dtype, table_VD, ids_BT):
    return jnp.take(table_VD.astype(dtype), ids_BT, axis=0)


def _rows_fwd(dtype, table_VD, ids_BT):
    # An empty slice of the table carries its shape and type to the backward pass.
    return _rows(dtype, table_VD, ids_BT), (table_VD[:, :0], ids_BT)


def _rows_bwd(dtype, residuals, grad_BTD):
    del dtype
    like_V0, ids_BT = residuals
    zeros_VD = jnp.zeros((like_V0.shape[0], grad_BTD.shape[-1]), jnp.float32)
    return zeros_VD.at[ids_BT].add(grad_BTD.astype(jnp.float32)).astype(like_V0.dtype), None


_rows.defvjp(_rows_fwd, _rows_bwd)
