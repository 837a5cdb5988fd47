"""Ring attention: a row split over devices, whose keys and values travel around them.

Liu et al. 2023 (arXiv:2310.01889), with the causal load balanced as in striped and zigzag rings:
the row is cut in 2P halves and device d works on halves d and 2P-1-d, an early and a late one, so
that in every turn every device has the same number of tiles below the diagonal. Packed documents
and windows empty further tiles, which are skipped, though not equally on all devices.

Each turn, the queries of a device see the keys of one other, tile by tile as in blockwise.py, while
these keys go on to the next device. In the backward pass the gradients of k and v travel with them.
No device ever holds more than its part, and the part that comes next. Called by attention_mesh.py
inside `shard_map`; letters as in blockwise.py.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int

from easylm_jax.array_types import Keys, PRNGKey, Queries, Tokens
from easylm_jax.models import blockwise as tile
from easylm_jax.models.remat import tag


class _Ring(NamedTuple):
    """The static facts of one call."""

    axis: str
    part: int  # rows of a device
    half: int  # of these, rounded up
    tiles: Any


def ring(
    q_BTNH: Queries,
    k_BSKH: Keys,
    v_BSKH: Keys,
    q_segments: Tokens,
    k_segments: Int[Array, "B S"],
    q_positions: Tokens,
    k_positions: Int[Array, "B S"],
    key: PRNGKey | None,
    *,
    axis: str,
    block_q: int,
    block_k: int,
    window: int | None,
    dropout: float,
) -> Queries:
    """Attention over the whole rows, of which each argument is this device's part along `axis`.

    `key` shall differ between devices.
    """
    B, T, N, _ = q_BTNH.shape
    K, half = k_BSKH.shape[2], (T + 1) // 2
    rate = 0.0 if key is None else dropout
    tiles = tile.choose_tiles(half, half, block_q, block_k, window, rate)

    def halves_as_rows(x):  # [B, T, ...] to [2 * B, T / 2, ...]: no tile may span two halves
        x = jnp.pad(x, [(0, 0), (0, T % 2)] + [(0, 0)] * (x.ndim - 2))  # 0 is padding for ids
        return _to_zigzag(x, axis).reshape(2 * B, half, *x.shape[2:])

    def joined(tiles_of_halves):
        return tiles_of_halves.reshape(B, -1, *tiles_of_halves.shape[2:])

    ids = jnp.stack([q_segments, k_segments, q_positions, k_positions], axis=-1)
    q, k, v, ids = (halves_as_rows(x) for x in (q_BTNH, k_BSKH, v_BSKH, ids))
    q, k, v = tile.query_tiles(tiles, q, K), tile.key_tiles(tiles, k), tile.key_tiles(tiles, v)
    ids = tile.id_tiles(tiles, *jnp.unstack(ids, axis=-1))
    arrays = jax.tree.map(joined, (q, k, v, ids))
    out = _attend(_Ring(axis, T, half, tiles), *arrays, key)
    out = tile.from_query_tiles(tiles, out.reshape(2 * B, -1, *out.shape[2:]), N)
    return _from_zigzag(out[:, :half].reshape(B, 2 * half, *out.shape[2:]), axis)[:, :T]


# ---- who holds what ----------------------------------------------------------------------------


def _owner(half: int, P: int) -> int:
    return min(half, 2 * P - 1 - half)


def _to_zigzag(x: Array, axis: str) -> Array:
    """Halves 2d and 2d+1 of the row, which device d holds, for halves d and 2P-1-d.

    Of the 2P halves, the even ones go one to each device, and so do the odd ones.
    """
    P = lax.axis_size(axis)
    even, odd = (
        lax.ppermute(x_half, axis, [(d, _owner(2 * d + side, P)) for d in range(P)])
        for side, x_half in enumerate(jnp.split(x, 2, axis=1))
    )
    swap = lax.axis_index(axis) % 2 == 1
    return jnp.concatenate([jnp.where(swap, odd, even), jnp.where(swap, even, odd)], axis=1)


def _from_zigzag(x: Array, axis: str) -> Array:
    """The inverse of `_to_zigzag`."""
    P = lax.axis_size(axis)
    early, late = jnp.split(x, 2, axis=1)
    swap = lax.axis_index(axis) % 2 == 1
    sides = jnp.where(swap, late, early), jnp.where(swap, early, late)
    sides = (
        lax.ppermute(x_half, axis, [(_owner(2 * d + side, P), d) for d in range(P)])
        for side, x_half in enumerate(sides)
    )
    return jnp.concatenate(list(sides), axis=1)


def _first_rows(ring: _Ring, device: Array, size: int, count: int) -> Array:
    """The rows of the whole row at which the `count` tiles of a device begin."""
    halves = jnp.stack([device, 2 * lax.axis_size(ring.axis) - 1 - device])
    first = halves // 2 * ring.part + halves % 2 * ring.half
    return (first[:, None] + jnp.arange(count // 2)[None] * size).ravel()


# ---- the turns ---------------------------------------------------------------------------------


def _to_next(tree, axis: str):
    P = lax.axis_size(axis)
    return jax.tree.map(lambda x: lax.ppermute(x, axis, [(d, (d + 1) % P) for d in range(P)]), tree)


def _around(ring: _Ring, turn, keys, state):
    """state = turn(r, keys, state) for each of P turns; `keys` go on to the next device between.

    They are sent before the work on them begins, so that the one can hide behind the other.
    """

    def step(carry, r):
        keys, state = carry
        coming = _to_next(keys, ring.axis)
        return (coming, turn(r, keys, state)), None

    last = lax.axis_size(ring.axis) - 1
    (keys, state), _ = lax.scan(step, (keys, state), jnp.arange(last))
    return turn(last, keys, state)


def _meet(ring: _Ring, q_BIKRH, q_ids, keys, key, r):
    """What the tile functions need in turn r: arrays, which tiles to touch, a key for dropout."""
    (q_seg, q_pos), (k, v, k_seg, k_pos) = q_ids, keys
    mine = lax.axis_index(ring.axis)
    theirs = (mine - r) % lax.axis_size(ring.axis)
    first_q = _first_rows(ring, mine, ring.tiles.q, q_BIKRH.shape[1])
    first_k = _first_rows(ring, theirs, ring.tiles.c, k.shape[1])
    bounds = tile.tile_bounds(ring.tiles, q_seg, k_seg, first_q, first_k, ring.tiles.window)
    key = None if key is None else jax.random.fold_in(key, r)
    return q_BIKRH, k, v, (q_seg, k_seg, q_pos, k_pos), bounds, key


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring, q_BIKRH, k_BJKCH, v_BJKCH, ids, key):
    """Attention on tiles in zigzag order; q is scaled already. See `_forward` and `_backward`."""
    return _forward(ring, q_BIKRH, k_BJKCH, v_BJKCH, ids, key)[0]


def _forward(ring, q_BIKRH, k_BJKCH, v_BJKCH, ids, key):
    """An online softmax that goes on from turn to turn."""
    B, I, K, R, H = q_BIKRH.shape
    q_seg, k_seg, q_pos, k_pos = ids

    def turn(r, keys, seen):
        arrays = _meet(ring, q_BIKRH, (q_seg, q_pos), keys, key, r)

        def query_tile(n, seen):
            one = tile.forward_tile(ring.tiles, *arrays, n, tuple(x[n] for x in seen))
            return tuple(x.at[n].set(x_n) for x, x_n in zip(seen, one, strict=True))

        return lax.fori_loop(0, B * I, query_tile, seen)

    keys = (k_BJKCH, v_BJKCH, k_seg, k_pos)
    out, lse = tile.normalise(_around(ring, turn, keys, tile.nothing_seen(B * I, K, R, H)))
    out = tag(out.astype(q_BIKRH.dtype).reshape(q_BIKRH.shape), "attention_out")
    lse = tag(lse.reshape(B, I, K, R), "attention_lse")
    return out, (q_BIKRH, k_BJKCH, v_BJKCH, ids, key, out, lse)


def _backward(ring, residuals, d_out):
    """The keys go round again, and their gradients go with them, home in the end."""
    q_BIKRH, k_BJKCH, v_BJKCH, (q_seg, k_seg, q_pos, k_pos), key, out, lse = residuals
    B, I, K, R, H = q_BIKRH.shape
    rows = (d_out, lse, tile.delta(out, d_out))
    zeros = jnp.zeros((*k_BJKCH.shape[:3], H, k_BJKCH.shape[3]), jnp.float32)

    def turn(r, keys, gradients):
        d_q, d_kv = gradients
        d_kv = _to_next(d_kv, ring.axis)  # added only after the work, so that it can hide it too
        arrays = _meet(ring, q_BIKRH, (q_seg, q_pos), keys, key, r)

        def query_tile(n, gradients):
            d_q, *d_kv = gradients
            one, *d_kv = tile.backward_tile(ring.tiles, *arrays, rows, n, (d_q[n], *d_kv))
            return d_q.at[n].set(one), *d_kv

        d_q, *d_kv_here = lax.fori_loop(0, B * I, query_tile, (d_q, zeros, zeros))
        return d_q, jax.tree.map(jnp.add, d_kv, tuple(d_kv_here))

    start = (jnp.zeros((B * I, K, R, H), jnp.float32), (zeros, zeros))
    d_q, d_kv = _around(ring, turn, (k_BJKCH, v_BJKCH, k_seg, k_pos), start)
    d_k, d_v = (d.swapaxes(3, 4).astype(k_BJKCH.dtype) for d in _to_next(d_kv, ring.axis))
    return d_q.astype(q_BIKRH.dtype).reshape(q_BIKRH.shape), d_k, d_v, None, None


_attend.defvjp(_forward, _backward)
