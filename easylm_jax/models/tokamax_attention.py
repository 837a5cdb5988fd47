"""Attention by Tokamax's Mosaic kernel for Hopper GPUs (H100, H200). Optional: extra `hopper`.

Each query is given the range of keys that it sees: from the first row of its document, or of the
window, to itself. So memory is linear in T, and tiles before the document are skipped. Keys that a
query forgets inside its range have no place in this: forgetful masking is refused (llama.py). A
document must be one run of rows whose positions rise by one, as packing makes them.

The kernels have never been run on a GPU by this project: what is tested, on CPU, is this adapter
around Tokamax's own XLA implementation. The mask type and the choice of a kernel are private
modules of Tokamax, the same in 0.0.12 (the last for Python 3.11) and 0.0.17.
Called through attention_choice.py, on each device's part of rows and heads.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries, Tokens
from easylm_jax.models.remat import tag

TILE = 256  # T is padded to a multiple of this, which every tile size of the kernel divides


def tokamax_attention(
    q_BTNH: Queries,
    k_BSKH: Keys,
    v_BSKH: Keys,
    q_segments: Tokens,
    k_segments: Int[Array, "B S"],
    q_positions: Tokens,
    k_positions: Int[Array, "B S"],
    first_row: Int[Array, ""] | int,
    key: PRNGKey | None,
    *,
    window: int | None,
    kernel: str = "mosaic_gpu",
) -> Queries:
    """Rows of keys whole, queries whole or from `first_row` on. Another `kernel` is for tests.

    Tokamax keeps its softmax sums to itself, so a remat policy other than `none` runs the forward
    kernel again in the backward pass.
    """
    del q_positions, k_positions, key
    try:
        from tokamax._src.ops.attention import api, base
    except ImportError as error:
        raise ValueError(
            "attention implementation 'tokamax' needs the package tokamax (0.0.12 for Python 3.11, "
            f"0.0.17 for 3.12), which cannot be imported: {error}; install the extra 'hopper' or "
            "set attention.implementation = 'blockwise'"
        ) from error
    if kernel not in api.IMPLEMENTATIONS:
        raise ValueError(
            f"this tokamax has no kernel {kernel!r}, but {', '.join(api.IMPLEMENTATIONS)}; install "
            "jax with CUDA or set attention.implementation = 'blockwise'"
        )
    T = q_BTNH.shape[1]
    q_BTNH = _padded(q_BTNH)
    start_BT, end_BT = _range_seen(k_segments, first_row, T, window)
    mask = base.Mask(k_start=_padded(start_BT)[:, None], k_end=_padded(end_BT)[:, None])
    try:
        out = api.IMPLEMENTATIONS[kernel](q_BTNH, k_BSKH, v_BSKH, mask=mask)
    except NotImplementedError as error:
        raise ValueError(
            f"tokamax's kernel {kernel!r} cannot compute this: {error}; it needs a Hopper GPU and "
            "model.dtype = 'bfloat16', otherwise set attention.implementation = 'blockwise'"
        ) from error
    out_BTNH = jnp.where((q_segments > 0)[..., None, None], out[:, :T], 0)
    return tag(out_BTNH, "attention_out")


def _range_seen(k_seg_BS, first_row, T, window):
    """The first row of keys that each query sees, and the one after its last: two [B, T]."""
    rows_S = jnp.arange(k_seg_BS.shape[1])[None]
    begins_BS = jnp.diff(k_seg_BS, axis=1, prepend=k_seg_BS[:, :1]) != 0
    start_BS = lax.cummax(jnp.where(begins_BS, rows_S, 0), axis=1)
    if window is not None:
        start_BS = jnp.maximum(start_BS, rows_S - window + 1)
    end_BS = jnp.broadcast_to(rows_S + 1, start_BS.shape)
    return (lax.dynamic_slice_in_dim(x, first_row, T, axis=1) for x in (start_BS, end_BS))


def _padded(x):
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % TILE)] + [(0, 0)] * (x.ndim - 2))
