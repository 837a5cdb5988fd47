"""Ring attention on 1 to 8 CPU devices: against the definition on one, who does how much, memory.

Further letters: P devices, as in ring.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from easylm_jax.mesh import make_mesh
from easylm_jax.models import blockwise as tile
from easylm_jax.models.attention import AttentionConfig, attention
from easylm_jax.models.attention_mask import visible
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward
from easylm_jax.models.ring import ring
from easylm_jax.objectives import cross_entropy
from easylm_jax.sharding import to_global, tree_shardings
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.train_state import init_state
from tests.tiny import assert_close, tiny_batch, tiny_config, tiny_params

ALONG = PartitionSpec(None, "sequence")


def draw(seed: int, T: int, *, B: int = 2, N: int = 4, K: int = 2, H: int = 8):
    """q, k, v and ids: packed documents, most longer than a tile, a padded tail in the last row,
    and a tenth of the keys forgotten (-1)."""
    rng = np.random.default_rng(seed)
    arrays = tuple(jnp.asarray(rng.normal(size=(B, T, n, H)), jnp.float32) for n in (N, K, K))
    starts = rng.uniform(size=(B, T)) < 4 / T
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    segments[-1, T - T // 6 :] = 0
    k_segments = np.where(rng.uniform(size=(B, T)) < 0.1, -1, segments)
    return arrays, tuple(jnp.asarray(x) for x in (segments, k_segments, positions, positions))


def one_document(T: int, *, B: int = 1):
    segments, positions = jnp.ones((B, T), int), jnp.tile(jnp.arange(T), (B, 1))
    return segments, segments, positions, positions


def mesh_of(P: int):
    return jax.make_mesh((P,), ("sequence",), (AxisType.Auto,), devices=jax.devices()[:P])


def on_devices(P: int, key=None, *, block_q=8, block_k=16, window=None, dropout=0.0):
    """A jitted function of (arrays, ids) that attends in a ring of the first P devices."""

    def local(arrays, ids):
        mine = None if key is None else jax.random.fold_in(key, jax.lax.axis_index("sequence"))
        options = dict(block_q=block_q, block_k=block_k, window=window, dropout=dropout)
        return ring(*arrays, *ids, mine, axis="sequence", **options)

    split = dict(in_specs=ALONG, out_specs=ALONG, check_vma=False)
    return jax.jit(jax.shard_map(local, mesh=mesh_of(P), **split))


def reference(arrays, ids, window=None):
    names = ("q_segments", "k_segments", "q_positions", "k_positions")
    config = AttentionConfig(implementation="reference", sliding_window=window)
    return attention(*arrays, **dict(zip(names, ids, strict=True)), config=config)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(attend, arrays, ids, d_out):
    out, vjp = jax.vjp(lambda arrays: attend(arrays, ids), arrays)
    return out, vjp(d_out)[0]


def random_like(x, seed: int = 9):
    return jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), x.dtype)


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "P, part, window",
    [(1, 42, 5), (2, 64, None), (3, 25, 20), (4, 17, 3), (8, 1, None), (8, 15, 17)],
)
def test_equals_the_definition_on_one_device_forward_and_backward(P, part, window):
    """Whole tiles, odd parts, single tokens; windows shorter and longer than a part."""
    arrays, ids = draw(P + part, P * part)
    d_out = random_like(arrays[0])
    out, grads = value_and_grads(on_devices(P, window=window), arrays, ids, d_out)
    expected = functools.partial(reference, window=window)
    out_ref, grads_ref = value_and_grads(expected, arrays, ids, d_out)
    assert_close(out, out_ref, rtol=1e-6)
    assert_close(flat(grads), flat(grads_ref), rtol=2e-6)


def test_nothing_leaks_exactly_zero():
    """The gradient of some rows of one document, and what NaN elsewhere does to them."""
    P, T = 4, 128  # halves of 16 rows, two tiles of queries each and one of keys
    arrays, _ = draw(0, T, B=1)
    lengths = (24, 56, 48)
    segments = np.repeat([1, 2, 3], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    k_segments = np.where(np.arange(T) == 40, -1, segments)
    attend = on_devices(P)
    ids = (segments, k_segments, positions, positions)
    rows = slice(50, 56)  # of document 2, which lies at 24 to 80
    d_out = np.zeros(arrays[0].shape, np.float32)
    d_out[:, rows] = 1
    out, grads = map(jax.device_get, value_and_grads(attend, arrays, ids, d_out))
    seen = [t for t in range(24, 56) if t != 40]
    for grad, touched in zip(grads, (list(range(50, 56)), seen, seen), strict=True):
        others = np.setdiff1d(np.arange(T), touched)
        assert (grad[:, others] == 0).all() and (np.abs(grad[:, touched]).max((0, 2, 3)) > 0).all()
    # Tiles that the mask empties are not even read: 0 * NaN would be NaN.
    for bad in (slice(0, 16), slice(64, 128)):
        poisoned = jax.tree.map(np.array, arrays)
        for x in poisoned[1:]:
            x[:, bad] = np.nan
        again = value_and_grads(attend, poisoned, ids, d_out)[0]
        assert (np.asarray(again)[:, rows] == out[:, rows]).all()


@pytest.mark.parametrize("P", [3, 8])
def test_every_device_touches_the_same_number_of_tiles_in_every_turn(P, monkeypatch):
    m, size = 2, 8  # tiles in a half, rows in a tile
    arrays, ids = draw(1, 2 * P * m * size, B=1)[0], one_document(2 * P * m * size)
    touched = [[] for _ in range(P)]
    bounds_of = tile.tile_bounds

    def spy(*args):
        low, high = bounds_of(*args)
        device = jax.lax.axis_index("sequence")
        jax.debug.callback(lambda d, n: touched[d].append(int(n)), device, (high - low).sum())
        return low, high

    monkeypatch.setattr(tile, "tile_bounds", spy)
    jax.block_until_ready(on_devices(P, block_q=size, block_k=size)(arrays, ids))
    jax.effects_barrier()
    # Each device with its own keys: the diagonal, m * m and two triangles. With others': 2 * m * m.
    assert [sorted(turns) for turns in touched] == [
        [2 * m * m] * (P - 1) + [m * m + m * (m + 1)]
    ] * P
    tiles = 2 * P * m
    assert sum(map(sum, touched)) == tiles * (tiles + 1) // 2  # and nothing above the diagonal


def test_memory_of_a_device_falls_with_the_number_of_devices():
    """On one device nothing is on its way, so that the first step falls short of a half."""

    def bytes_per_device(P):
        split = jax.NamedSharding(mesh_of(P), ALONG)
        run = functools.partial(value_and_grads, on_devices(P, block_q=32, block_k=32))
        args = draw(2, 4096, B=1, N=4, K=1, H=16)[0], one_document(4096)
        args = jax.device_put((*args, args[0][0]), split)
        memory = jax.jit(run, out_shardings=split).lower(*args).compile().memory_analysis()
        sizes = ("argument", "output", "temp")
        return sum(getattr(memory, f"{size}_size_in_bytes") for size in sizes)

    one, two, eight = map(bytes_per_device, (1, 2, 8))
    assert 0.9 <= 4 * eight / two < 1.05 and 8 * eight / one < 1.4


def test_dropout_equals_a_dense_computation_with_the_same_mask():
    """The mask is read off: queries of 0 weigh all keys alike, and the values are one-hot."""
    P, T, rate = 4, 64, 0.3
    ids, attend = one_document(T), on_devices(P, jax.random.key(3), block_k=8, dropout=rate)
    v = jnp.eye(T)[None, :, None, :]
    shares = np.asarray(attend((jnp.zeros((1, T, 2, T)), v, v), ids))  # B, T, N, S
    keep = shares * np.arange(1, T + 1)[None, :, None, None]
    drawn = keep.swapaxes(1, 2)[:, :, np.tri(T, dtype=bool)]
    assert np.all((drawn == 0) | np.isclose(drawn, 1 / (1 - rate)))
    assert abs((drawn > 0).mean() - (1 - rate)) < 0.03  # 4160 draws: four standard errors
    whole = keep[0].reshape(8, 8, 2, 8, 8)  # tile, row, head, tile, column
    patterns = {(whole[i, :, :, j] > 0).tobytes() for i in range(8) for j in range(i)}
    assert len(patterns) == 28  # no tile draws what another draws

    def dense(arrays, ids):
        q, k, v = arrays
        scores = jnp.einsum("btnh,bsh->btns", q, k[:, :, 0]) / np.sqrt(q.shape[-1])
        mask = visible(*ids, None)[:, :, None]
        probs = jax.nn.softmax(jnp.where(mask, scores, -1e30)) * keep
        return jnp.einsum("btns,bsh->btnh", probs, v[:, :, 0])

    arrays = draw(5, T, B=1, N=2, K=1)[0]
    d_out = random_like(arrays[0])
    got, expected = (value_and_grads(f, arrays, ids, d_out) for f in (attend, dense))
    assert_close(got[0], expected[0], rtol=2e-6)
    assert_close(flat(got[1]), flat(expected[1]), rtol=5e-6)


# ---- inside a model ----------------------------------------------------------------------------


@functools.cache
def train_one_step(spec: str, num_devices: int, **options):
    """The metrics and the gradient of a step; optax.trace without decay keeps the gradient."""
    model = tiny_config(
        attention=AttentionConfig(block_q=8, block_k=8, **options), remat="attention_only"
    )
    mesh, optimizer = make_mesh(spec, jax.devices()[:num_devices]), optax.trace(decay=0.0)
    batch = to_global(jax.tree.map(np.asarray, tiny_batch(3, rows=2, length=48)), mesh, 2)
    objective = cross_entropy(make_forward(model))
    fixed = dict(optimizer=optimizer, num_micro_batches=1, guard=GuardConfig())
    with jax.set_mesh(mesh):
        jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))  # can start
        state = init_state(lambda key: tiny_params(), optimizer, 0)
        state = jax.device_put(state, tree_shardings(state, mesh, PARAM_RULES))
        step = functools.partial(train_step, objective=objective, **fixed)
        state, metrics = jax.jit(step)(state, batch)
    return float(metrics["loss"]), state.opt_state.trace


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["sequence:8", "fsdp:2,sequence:2,tensor:2"])
def test_a_training_step_in_a_ring_equals_that_on_one_device(spec):
    loss, gradient = train_one_step(spec, 8, across_sequence="ring")
    expected_loss, expected = train_one_step("1,1,1,1", 1)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert_close(gradient, expected, rtol=1e-5)
