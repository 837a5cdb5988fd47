"""Attention: blockwise and reference against a loop over queries; rows split over devices.

Further letters as in attention.py: Q rows of a query tile, C columns of a key tile.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.attention_choice import check_forgetting
from easylm_jax.models.attention_mask import visible
from easylm_jax.models.blockwise import _tile_keep, _Tiles
from tests.tiny import assert_close

BLOCKS = AttentionConfig(block_q=8, block_k=16)
REFERENCE = AttentionConfig(implementation="reference")
BOTH = pytest.mark.parametrize("config", [BLOCKS, REFERENCE], ids=["blockwise", "reference"])


def draw(seed: int, T: int, *, B=2, N=4, K=2, H=8, starts=0.1):
    """q, k, v and ids: documents of random lengths that start at random positions, a padded tail,
    and a tenth of the keys forgotten (-1)."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=(B, T, heads, H)), jnp.float32) for heads in (N, K, K)]
    starts = rng.uniform(size=(B, T)) < starts
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    first = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    offsets = rng.integers(0, 50, size=(B, T + 1))
    positions = np.arange(T) - first + np.take_along_axis(offsets, segments, axis=1)
    segments[:, T - T // 6 :] = 0
    k_segments = np.where(rng.uniform(size=(B, T)) < 0.1, -1, segments)
    return arrays, ids(segments, k_segments, positions, positions)


def ids(q_segments, k_segments, q_positions, k_positions) -> dict:
    names = ("q_segments", "k_segments", "q_positions", "k_positions")
    values = (q_segments, k_segments, q_positions, k_positions)
    return {n: jnp.asarray(x, jnp.int32) for n, x in zip(names, values, strict=True)}


def by_loops(q, k, v, *, q_segments, k_segments, q_positions, k_positions, window):
    """The docstring of attention.py, one query and one head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        back = int(q_positions[b, t]) - np.asarray(k_positions[b])
        seen = (np.asarray(k_segments[b]) == int(q_segments[b, t])) & (back >= 0)
        seen &= back < (window or np.inf)
        if q_segments[b, t] == 0 or not seen.any():
            continue
        scores = k[b, seen, n // group] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


@functools.partial(jax.jit, static_argnames="config")
def value_and_grads(arrays, ids, d_out, key=None, *, config):
    def run(arrays):
        return attention(*arrays, **ids, config=config, dropout_key=key)

    out, vjp = jax.vjp(run, arrays)
    return out, vjp(d_out)[0]


def random_like(x, seed: int = 9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), x.dtype)


@pytest.mark.parametrize("T, window", [(1, None), (7, 5), (64, None), (65, 5)])
def test_both_equal_the_definition_forward_and_blockwise_backward(T, window):
    arrays, where = draw(T, T)
    d_out = random_like(arrays[0])
    expected = by_loops(*arrays, **where, window=window)
    with_window = functools.partial(dataclasses.replace, sliding_window=window)
    out, grads = value_and_grads(arrays, where, d_out, config=with_window(BLOCKS))
    out_ref, grads_ref = value_and_grads(arrays, where, d_out, config=with_window(REFERENCE))
    assert_close(out, expected, rtol=1e-6)
    assert_close(out_ref, expected, rtol=1e-6)
    # Measured against the largest gradient of all, since those of a single token are almost zero.
    assert_close(*(jnp.concatenate([g.ravel() for g in x]) for x in (grads, grads_ref)), rtol=2e-6)


@BOTH
def test_a_query_that_sees_nothing_gives_zero_and_passes_nothing_back(config):
    """Padding, and a document all of whose keys are forgotten."""
    arrays, where = draw(3, 48)
    forgotten = where["q_segments"] == 2
    where["k_segments"] = jnp.where(forgotten, -1, where["k_segments"])
    out, (d_q, d_k, d_v) = value_and_grads(arrays, where, random_like(arrays[0]), config=config)
    blind = forgotten | (where["q_segments"] == 0)
    unseen = where["k_segments"] <= 0
    assert blind.sum() > 16 and forgotten.any() and (~blind).sum() > 16
    for array, rows in ((out, blind), (d_q, blind), (d_k, unseen), (d_v, unseen)):
        assert (array[rows] == 0).all() and (array[~rows] != 0).any()


def test_tiles_that_the_mask_empties_are_never_read():
    """NaN in them would spread: 0 * NaN is NaN. Four tiles of 16; documents of two tiles each."""
    T, config = 64, dataclasses.replace(BLOCKS, block_q=16)
    (q, k, v), _ = draw(0, T)
    segments = np.repeat([[1, 2]] * 2, T // 2, axis=1)
    where = ids(segments, segments, *[np.tile(np.arange(T // 2), (2, 2))] * 2)

    def rows_with_nan(poisoned, config, where):
        bad = [x.at[:, poisoned].set(jnp.nan) for x in (k, v)]
        d_out = jnp.ones_like(q)
        out, (d_q, *_) = value_and_grads((q, *bad), where, d_out, config=config)
        nan = [set(np.flatnonzero(np.isnan(x).any((0, 2, 3)))) for x in (out, d_q)]
        assert nan[0] == nan[1]
        return nan[0]

    first, second = set(range(32)), set(range(32, 64))
    assert rows_with_nan(slice(0, 32), config, where) == first  # another document
    assert rows_with_nan(slice(32, 64), config, where) == second
    assert rows_with_nan(slice(16, 32), config, where) == set(range(16, 32))  # the future
    one = ids(np.ones((2, T)), np.ones((2, T)), *[np.tile(np.arange(T), (2, 1))] * 2)
    window = dataclasses.replace(config, sliding_window=8)
    assert rows_with_nan(slice(0, 16), window, one) <= set(range(32))  # out of the window


@BOTH
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("T", [1, 3])
def test_decoding_against_a_padded_cache(T, window, config):
    """Rows of different lengths; the queries lie in the last slots before the empty ones.

    The window is counted in positions, so slots of padding do not use it up.
    """
    B, S, written = 3, 40, 33
    (_, k, v), _ = draw(1, S, B=B)
    (q, *_), _ = draw(2, T, B=B)
    lengths = np.array([30, 7, 19])  # prompts, padded to 30 slots; then generated tokens
    slots = np.tile(np.arange(S), (B, 1))
    k_segments = (slots < lengths[:, None]) | ((slots >= 30) & (slots < written))
    k_positions = np.where(slots < 30, slots, lengths[:, None] + slots - 30)
    q_positions = k_positions[:, written - T : written]
    where = ids(np.ones((B, T)), k_segments, q_positions, k_positions)
    config = dataclasses.replace(config, sliding_window=window)
    out = attention(q, k, v, **where, config=config, cache_index=jnp.int32(written - T))
    assert_close(out, by_loops(q, k, v, **where, window=window), rtol=1e-6)


# ---- dropout -----------------------------------------------------------------------------------

RATE = 0.3
DROPPING = dataclasses.replace(BLOCKS, dropout=RATE)


def dense_keep(key, *, B, T, N, K):
    """The factors of every tile that `_tiled` draws, laid out as one array [B, N, T, S]."""
    Q, C, G = 8, 16, N // K
    tiles = _Tiles(q=Q, c=C, window=None, dropout=RATE)
    I, J = -(-T // Q), -(-T // C)
    keep = np.zeros((B, K, G, I * Q, J * C), np.float32)
    for b, i, j in np.ndindex(B, I, J):
        tile = _tile_keep(tiles, key, b * I + i, j, (K, G * Q, C)).reshape(K, G, Q, C)
        keep[b, :, :, i * Q : (i + 1) * Q, j * C : (j + 1) * C] = tile
    return jnp.asarray(keep.reshape(B, N, I * Q, J * C)[:, :, :T, :T])


def test_blockwise_dropout_equals_a_dense_computation_with_the_same_mask():
    B, T, N, K = 2, 40, 4, 2
    arrays, where = draw(5, T, B=B, N=N, K=K)
    key = jax.random.key(3)
    keep = dense_keep(key, B=B, T=T, N=N, K=K)

    def dense(arrays):
        q, k, v = (jnp.repeat(x, N // x.shape[2], axis=2) for x in arrays)
        mask = visible(*where.values(), None)[:, None]
        scores = jnp.where(mask, jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]), -1e30)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores) * mask * keep, v)

    d_out = random_like(arrays[0])
    out, vjp = jax.vjp(dense, arrays)
    got, grads = value_and_grads(arrays, where, d_out, key, config=DROPPING)
    assert_close(got, out, rtol=2e-6)
    assert_close(grads, vjp(d_out)[0], rtol=5e-6)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(DROPPING, marks=pytest.mark.slow, id="blockwise"),
        pytest.param(dataclasses.replace(REFERENCE, dropout=RATE), id="reference"),
    ],
)
def test_dropout_keeps_the_expectation_and_needs_a_key(config):
    arrays, where = draw(6, 24, B=1)
    plain = attention(*arrays, **where, config=REFERENCE)
    assert_close(attention(*arrays, **where, config=config), plain, rtol=1e-6)

    def one(key):
        return attention(*arrays, **where, config=config, dropout_key=key)

    outs = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 1000))
    error = outs.std(0) / np.sqrt(len(outs))
    changes = error > 0
    assert changes.mean() > 0.7
    far = np.abs(outs.mean(0) - plain)[changes] / error[changes]
    assert np.sqrt((far**2).mean()) < 1.3  # 1 if the only error is that of 1000 draws


# ---- rows split over devices, and what is refused ------------------------------------------------


@pytest.mark.parametrize("across", ["gather", "ring", "all_to_all"])
@pytest.mark.parametrize("mesh", ["2,1,4,1", "1,2,2,2"])
def test_rows_split_over_devices_equal_the_whole(mesh, across):
    arrays, where = draw(8, 64, N=8, K=4)
    d_out = random_like(arrays[0])
    config = dataclasses.replace(BLOCKS, sliding_window=20)
    expected = value_and_grads(arrays, where, d_out, config=config)
    config = dataclasses.replace(config, across_sequence=across)
    with jax.set_mesh(make_mesh(mesh)):
        program = value_and_grads.lower(arrays, where, d_out, config=config).as_text()
        got = value_and_grads(arrays, where, d_out, config=config)
    assert_close(got, expected, rtol=2e-6)
    assert ("all_to_all" in program) == (across == "all_to_all")
    assert ("collective_permute" in program) == (across == "ring")


def test_a_cache_is_served_by_gathered_keys_whatever_trains():
    """Two new tokens over 40 slots on a mesh: no ring, no exchange of heads, no splash."""
    arrays, where = draw(1, 40)
    new = {n: x[:, 30:32] if n.startswith("q") else x for n, x in where.items()}
    q = arrays[0][:, 30:32]
    expected = by_loops(q, *arrays[1:], **new, window=None)
    splash = AttentionConfig(implementation="splash")
    for config in (dataclasses.replace(BLOCKS, across_sequence="ring"), splash):
        with jax.set_mesh(make_mesh("2,1,2,2")):
            run = functools.partial(attention, config=config, cache_index=jnp.int32(30))
            got = jax.jit(lambda q, k, v, ids, run=run: run(q, k, v, **ids))(q, *arrays[1:], new)
        assert_close(got, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(implementation="flash"), "'flash'; there are blockwise, reference, splash, tokamax"),
        (dict(across_sequence="rings"), "'rings'; there are gather, ring, all_to_all"),
        (
            dict(implementation="splash", across_sequence="ring"),
            "works with implementation = 'blockwise' alone, got 'splash'; use 'all_to_all'",
        ),
        (dict(implementation="splash", dropout=0.1), "splash kernel has no attention dropout, got"),
        (dict(implementation="tokamax", dropout=0.1), "tokamax kernel has no attention dropout"),
        (dict(implementation="splash", block_k=200), "multiples of 128, got 256 and 200"),
        (dict(block_q=0), "block_q and block_k are numbers of rows, 1 or more, got 0 and 256"),
        (dict(block_k=-8), "1 or more, got 256 and -8"),
        (dict(sliding_window=0), "sliding_window is a number of tokens, 1 or more, got 0; None"),
        (dict(dropout=1.0), "dropout is at least 0 and below 1, got 1.0"),
        (dict(dropout=-0.1), "dropout is at least 0 and below 1, got -0.1"),
    ],
)
def test_a_choice_that_nothing_could_serve_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        AttentionConfig(**options)
    assert "\n" not in str(caught.value)


def test_tokamax_cannot_forget_keys():
    with pytest.raises(ValueError, match="cannot forget single keys, got fcm_max_ratio = 0.15; "):
        check_forgetting(AttentionConfig(implementation="tokamax"), 0.15)
    check_forgetting(AttentionConfig(implementation="splash"), 0.15)


@pytest.mark.parametrize(
    "mesh, T, across, sentence",
    [
        ("2,1,4,1", 66, "gather", "rows of 66 tokens do not split over mesh axis sequence = 4"),
        ("2,1,1,4", 64, "gather", "2 key/value heads do not split over tensor = 4; use sizes"),
        ("2,1,4,1", 64, "all_to_all", "over tensor x sequence = 4; .* 'ring' or 'gather'"),
    ],
)
def test_a_mesh_that_divides_neither_heads_nor_rows_is_one_sentence(mesh, T, across, sentence):
    arrays, where = draw(0, T)
    config = dataclasses.replace(BLOCKS, across_sequence=across)
    with jax.set_mesh(make_mesh(mesh)), pytest.raises(ValueError, match=sentence):
        attention(*arrays, **where, config=config)
