"""Memory-efficient attention: tiles of the score matrix, with a backward pass of its own.

Forward as Rabe & Staats 2021 (arXiv:2112.05682, which LLaMA used), backward as FlashAttention-2
(arXiv:2307.08691). Only the output and the log-sum-exp of each row are kept, and a tile that the
mask empties is never touched: those above the diagonal, those between different documents, those
outside the window. Written for XLA on CPU, right everywhere. attention.py says what attention
means. ring.py, whose keys come one part at a time, makes its tiles of the public pieces here.

Further letters here: Q rows of a query tile, C columns of a key tile, I and J tiles of queries and
of keys, R = G * Q.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries, Tokens
from easylm_jax.dots import dot_f32, transposed_dot_f32
from easylm_jax.models.attention_mask import MASKED, visible
from easylm_jax.models.remat import tag


class _Tiles(NamedTuple):
    """The static facts of one call."""

    q: int
    c: int
    window: int | None
    dropout: float


def blockwise(
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
    cached: bool,
    block_q: int,
    block_k: int,
    window: int | None,
    dropout: float,
) -> Queries:
    """Cut into tiles, attend, undo the layout. Any T and S: the last tiles are padded.

    `first_row` is where the first query lies in the row of keys. `cached` keys may have gaps, rows
    of padding between tokens that are neighbours by their positions.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    tiles = choose_tiles(T, S, block_q, block_k, window, 0.0 if key is None else dropout)
    q = query_tiles(tiles, q_BTNH, K)
    k, v = key_tiles(tiles, k_BSKH), key_tiles(tiles, v_BSKH)
    ids = id_tiles(tiles, q_segments, k_segments, q_positions, k_positions)
    first_q = first_row + jnp.arange(q.shape[1]) * tiles.q
    first_k = jnp.arange(k.shape[1]) * tiles.c
    bounds = tile_bounds(tiles, *ids[:2], first_q, first_k, None if cached else window)
    out_BIKRH = _tiled(tiles, q, k, v, ids, bounds, key)
    return from_query_tiles(tiles, out_BIKRH, N)[:, :T]


# ---- layout ------------------------------------------------------------------------------------


def choose_tiles(T: int, S: int, block_q: int, block_k: int, window: int | None, dropout: float):
    """Tiles no longer than what they tile."""
    return _Tiles(min(block_q, _round_up(T, 8)), min(block_k, _round_up(S, 8)), window, dropout)


def query_tiles(tiles: _Tiles, q_BTNH: Queries, K: int) -> Array:
    """Scaled and cut, [B, I, K, R, H]: the G heads of a kv head are rows of one product."""
    B, _, N, H = q_BTNH.shape
    q = _cut(q_BTNH * jnp.asarray(H**-0.5, q_BTNH.dtype), tiles.q)  # B, I, Q, N, H
    I = q.shape[1]
    q = q.reshape(B, I, tiles.q, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
    return q.reshape(B, I, K, -1, H)


def from_query_tiles(tiles: _Tiles, out_BIKRH: Array, N: int) -> Array:
    """The layout of `query_tiles` undone; the rows of padding are still there."""
    B, I, K, _, H = out_BIKRH.shape
    out = out_BIKRH.reshape(B, I, K, N // K, tiles.q, H).transpose(0, 1, 4, 2, 3, 5)
    return out.reshape(B, I * tiles.q, N, H)


def key_tiles(tiles: _Tiles, k_BSKH: Keys) -> Array:
    """Keys or values, cut: [B, J, K, C, H]."""
    return _cut(k_BSKH, tiles.c).swapaxes(2, 3)


def id_tiles(tiles: _Tiles, q_seg: Array, k_seg: Array, q_pos: Array, k_pos: Array):
    """The four arrays of ids, cut as the queries and the keys that they belong to."""
    return (
        _cut(q_seg, tiles.q),
        _cut(k_seg, tiles.c),
        _cut(q_pos, tiles.q),
        _cut(k_pos, tiles.c),
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _cut(x: Array, size: int) -> Array:
    """[B, T, ...] to [B, ceil(T / size), size, ...], zero-padded; zero is the padding segment."""
    padding = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


# ---- which tiles, and the work of one ----------------------------------------------------------


def tile_bounds(
    tiles: _Tiles,
    q_seg_BIQ: Array,
    k_seg_BJC: Array,
    first_q_I: Array,
    first_k_J: Array,
    window: int | None,
) -> tuple[Array, Array]:
    """For each query tile, the range [low, high) of key tiles that the mask does not empty.

    `first_q_I` and `first_k_J`, ascending, are the rows at which the tiles begin. Conservative and
    cheap: segments are compared by their range in a tile, and the diagonal and the window by row
    numbers. Returns two int32 arrays [B, I].
    """
    J = k_seg_BJC.shape[1]
    far = jnp.iinfo(jnp.int32).max
    q_least = jnp.where(q_seg_BIQ > 0, q_seg_BIQ, far).min(-1)[:, :, None]
    k_least = jnp.where(k_seg_BJC > 0, k_seg_BJC, far).min(-1)[:, None, :]
    q_most, k_most = q_seg_BIQ.max(-1)[:, :, None], k_seg_BJC.max(-1)[:, None, :]
    needed = (k_most >= q_least) & (k_least <= q_most)  # [B, I, J]
    first_q, first_k = first_q_I[:, None], first_k_J[None, :]
    causal = first_k < first_q + tiles.q
    if window is not None:
        causal &= first_k + tiles.c > first_q - window + 1
    needed &= causal[None]
    low = jnp.argmax(needed, axis=-1)
    high = jnp.where(needed.any(-1), J - jnp.argmax(needed[..., ::-1], axis=-1), low)
    return low.astype(jnp.int32), high.astype(jnp.int32)


def _dot(a: Array, b: Array, dim_a: int, dim_b: int) -> Array:
    """Product of two [K, ., .] arrays over one dim of each, batched over K."""
    return dot_f32(a, b, (dim_a,), (dim_b,), batch=(0,))


def _tile_scores(tiles, q_KRH, k_KCH, ids, b, i, j):
    """Masked scores [K, R, C] of tile (i, j) of row b."""
    q_seg, k_seg, q_pos, k_pos = ids
    mask_QC = visible(q_seg[b, i], k_seg[b, j], q_pos[b, i], k_pos[b, j], tiles.window)
    scores = _dot(q_KRH, k_KCH, 2, 2)
    K, R, C = scores.shape
    scores = scores.reshape(K, -1, tiles.q, C)
    return jnp.where(mask_QC[None, None], scores, MASKED).reshape(K, R, C)


def _tile_keep(tiles, key, n, j, shape):
    """The dropout factors of a tile: 0 or 1 / (1 - rate). The same in both passes."""
    key = jax.random.fold_in(jax.random.fold_in(key, n), j)
    return jax.random.bernoulli(key, 1 - tiles.dropout, shape) / (1 - tiles.dropout)


def nothing_seen(*shape: int) -> tuple[Array, Array, Array]:
    """Where an online softmax starts, for queries [..., R, H]: sum of values, maximum, total.

    The maximum starts above MASKED, so that exp(MASKED - maximum) is 0, never exp(0).
    """
    rows = shape[:-1]
    f32 = jnp.float32
    return jnp.zeros(shape, f32), jnp.full(rows, MASKED / 2, f32), jnp.zeros(rows, f32)


def forward_tile(tiles: _Tiles, q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key, n, start):
    """Query tile n of B * I sees the key tiles within its bounds; `start` is what it saw before."""
    b, i = n // q_BIKRH.shape[1], n % q_BIKRH.shape[1]
    q_KRH = q_BIKRH[b, i]

    def key_tile(j, carry):
        out_KRH, top_KR, total_KR = carry
        scores = _tile_scores(tiles, q_KRH, k_BJKCH[b, j], ids, b, i, j)
        new_top = jnp.maximum(top_KR, scores.max(-1))
        p_KRC = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top_KR - new_top)
        total_KR = total_KR * shrink + p_KRC.sum(-1)
        if tiles.dropout:
            p_KRC = p_KRC * _tile_keep(tiles, key, n, j, p_KRC.shape)
        v_KCH = v_BJKCH[b, j]
        out_KRH = out_KRH * shrink[..., None] + _dot(p_KRC.astype(v_KCH.dtype), v_KCH, 2, 1)
        return out_KRH, new_top, total_KR

    return lax.fori_loop(bounds[0][b, i], bounds[1][b, i], key_tile, start)


def normalise(seen: tuple[Array, Array, Array]) -> tuple[Array, Array]:
    """The output, and the log-sum-exp of the scores; both 0 for a query that saw nothing."""
    out, top, total = seen
    any_key = total > 0
    total = jnp.where(any_key, total, 1.0)
    return out / total[..., None], jnp.where(any_key, top + jnp.log(total), 0.0)


def backward_tile(tiles: _Tiles, q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key, rows, n, start):
    """Probabilities again from the log-sum-exp, then the five products of each tile.

    `rows` holds, for each query, the gradient of the output [B, I, K, R, H], the log-sum-exp, and
    delta [B, I, K, R], the product of the output and its gradient. `start` holds the gradients so
    far: of query tile n, and of all k and v, transposed, [B, J, K, H, C], so that the product that
    makes them transposes the narrow operand, not the scores.
    """
    b, i = n // q_BIKRH.shape[1], n % q_BIKRH.shape[1]
    q_KRH, (g_KRH, lse_KR, delta_KR) = q_BIKRH[b, i], (x[b, i] for x in rows)

    def key_tile(j, carry):
        d_q, d_k, d_v = carry
        k_KCH, v_KCH = k_BJKCH[b, j], v_BJKCH[b, j]
        scores = _tile_scores(tiles, q_KRH, k_KCH, ids, b, i, j)
        p_KRC = jnp.exp(scores - lse_KR[..., None])
        d_p = _dot(g_KRH, v_KCH, 2, 2)
        dropped = p_KRC
        if tiles.dropout:
            keep = _tile_keep(tiles, key, n, j, p_KRC.shape)
            dropped, d_p = p_KRC * keep, d_p * keep
        d_s = (p_KRC * (d_p - delta_KR[..., None])).astype(q_KRH.dtype)
        d_v = d_v.at[b, j].add(transposed_dot_f32(g_KRH, dropped.astype(g_KRH.dtype)))
        d_k = d_k.at[b, j].add(transposed_dot_f32(q_KRH, d_s))
        return d_q + _dot(d_s, k_KCH, 2, 1), d_k, d_v

    return lax.fori_loop(bounds[0][b, i], bounds[1][b, i], key_tile, start)


def delta(out: Array, d_out: Array) -> Array:
    """Product of the output and its gradient, summed over H: what softmax takes off each score."""
    return (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)


# ---- all tiles of a row ------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled(tiles, q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key):
    """Attention on tiles; q is scaled already. See `_forward` and `_backward`."""
    return _forward(tiles, q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key)[0]


def _forward(tiles, q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key):
    B, I, K, R, H = q_BIKRH.shape
    arrays = (q_BIKRH, k_BJKCH, v_BJKCH, ids, bounds, key)

    def query_tile(n):
        out_KRH, lse_KR = normalise(forward_tile(tiles, *arrays, n, nothing_seen(K, R, H)))
        return out_KRH.astype(q_BIKRH.dtype), lse_KR

    out, lse = lax.map(query_tile, jnp.arange(B * I))
    out = tag(out.reshape(B, I, K, R, H), "attention_out")
    lse = tag(lse.reshape(B, I, K, R), "attention_lse")
    return out, (arrays, out, lse)


def _backward(tiles, residuals, d_out):
    arrays, out, lse = residuals
    (q_BIKRH, k_BJKCH), (B, I, K, R, H) = arrays[:2], out.shape
    rows = (d_out, lse, delta(out, d_out))

    def query_tile(carry, n):
        start = (jnp.zeros((K, R, H), jnp.float32), *carry)
        d_q, *carry = backward_tile(tiles, *arrays, rows, n, start)
        return tuple(carry), d_q.astype(q_BIKRH.dtype)

    zeros = jnp.zeros((*k_BJKCH.shape[:3], H, k_BJKCH.shape[3]), jnp.float32)
    (d_k, d_v), d_q = lax.scan(query_tile, (zeros, zeros), jnp.arange(B * I))
    d_k, d_v = (d.swapaxes(3, 4).astype(k_BJKCH.dtype) for d in (d_k, d_v))
    return d_q.reshape(q_BIKRH.shape), d_k, d_v, None, None, None


_tiled.defvjp(_forward, _backward)
