"""Attention by the Pallas kernel for TPUs that ships with JAX, "splash".

A flash-attention kernel that skips the tiles above the diagonal or out of the window, forward and
backward. It compares segment ids inside a tile, so memory is linear in T; tiles between different
documents are computed and masked, not skipped. Of a document it knows the row numbers, not the
positions: a document must be one run of rows whose positions rise by one, as packing makes them.
Called through attention_choice.py, on each device's part of rows and heads.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries, Tokens


def splash(
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
    block_q: int,
    block_k: int,
    window: int | None,
    interpret: bool = False,
) -> Queries:
    """Rows of keys whole, queries whole or one of S / T parts. Any T and S: both are padded.

    `first_row` is where the first query lies in the row of keys. `interpret` runs the kernel's
    program on any platform, slowly: for tests.
    """
    del q_positions, k_positions, key
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    block_q, block_k = (min(block, -(-n // 128) * 128) for block, n in ((block_q, T), (block_k, S)))
    kernel = _kernel(q_BTNH.shape[2], T, S, block_q, block_k, window, interpret)
    kernel = _part(kernel, first_row // T, S // T)

    q, k, v = (
        _padded(x, block).swapaxes(1, 2)
        for x, block in ((q_BTNH * _scale(q_BTNH), block_q), (k_BSKH, block_k), (v_BSKH, block_k))
    )
    ids = kernels.SegmentIds(_padded(q_segments, block_q), _padded(k_segments, block_k))
    out = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=ids))(q, k, v, ids)
    # The kernel gives a query that sees nothing the mean of what it skipped.
    seen_BT = _sees_something(q_segments, k_segments, first_row, window)
    return jnp.where(seen_BT[..., None, None], out.swapaxes(1, 2)[:, :T], 0)


def _scale(q: Queries) -> Array:
    return jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _padded(x: Array, block: int) -> Array:
    """[B, T, ...] with T padded to a multiple of `block` by zeros, the padding segment."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))


def _kernel(N, T, S, block_q, block_k, window, interpret) -> kernels.SplashAttentionKernel:
    """The kernel for all S / T parts of a row, with tables of the tiles that each shall visit.

    Its output and log-sum-exp are both called `attention_out` before remat policies.
    """
    parts, padded_T, padded_S = S // T, T + -T % block_q, S + -S % block_k
    shape = (parts * padded_T, padded_S)
    if window is None:
        mask = masks.CausalMask(shape)
    else:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    # The row of each query, where every part is padded at its end.
    mask.q_sequence = np.concatenate(
        [np.arange(i * T, i * T + padded_T, dtype=np.int32) for i in range(parts)]
    )
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * N),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name="attention_out",
        interpret=interpret,
    )


def _part(kernel, index: Array | int, parts: int):
    """The kernel of one part of the queries: its share of the tables, whose row dim is split."""
    if parts == 1:
        return kernel

    def share(x: Array) -> Array:
        dim = 0 if x.ndim == 1 else 1  # row numbers [T]; tables of tiles [heads, tiles, width]
        size = x.shape[dim] // parts
        return lax.dynamic_slice_in_dim(x, index * size, size, axis=dim)

    return jax.tree.map(share, kernel)


def _sees_something(q_seg_BT, k_seg_BS, first_row, window) -> Array:
    """Whether query t sees any key: the last key up to its row is of its own document, and near."""
    T, S = q_seg_BT.shape[1], k_seg_BS.shape[1]
    rows_S = jnp.broadcast_to(jnp.arange(S), k_seg_BS.shape)
    last_BS = lax.cummax(jnp.where(k_seg_BS > 0, rows_S, -1), axis=1)
    last_BT = lax.dynamic_slice_in_dim(last_BS, first_row, T, axis=1)
    found_BT = jnp.take_along_axis(k_seg_BS, jnp.maximum(last_BT, 0), axis=1)
    seen_BT = (q_seg_BT > 0) & (last_BT >= 0) & (found_BT == q_seg_BT)
    if window is not None:
        seen_BT &= (first_row + jnp.arange(T))[None] - last_BT < window
    return seen_BT
