"""The definition of attention, which all kernels are tested against: the whole [T, S] matrix.

Differentiated by JAX. The mask alone decides what is seen. attention.py says what it means.
"""

import jax
import jax.numpy as jnp

from easylm_jax.models.attention_mask import MASKED, visible
from easylm_jax.models.remat import tag


def reference(
    q_BTNH, k_BSKH, v_BSKH, q_seg, k_seg, q_pos, k_pos, first_row, key, *, window, dropout
):
    """Attention output [B, T, N, H]; `first_row` is for kernels that count rows."""
    del first_row
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H) * H**-0.5
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    mask = visible(q_seg, k_seg, q_pos, k_pos, window)[:, None, None]
    probs = jax.nn.softmax(jnp.where(mask, scores, MASKED)) * mask
    if key is not None:
        keep = jax.random.bernoulli(key, 1 - dropout, probs.shape)
        probs = probs * keep / (1 - dropout)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH", probs.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    out_BTNH = out.reshape(B, T, N, H).astype(q_BTNH.dtype)
    return tag(out_BTNH, "attention_out")
