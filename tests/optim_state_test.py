"""Stored moments: how wrong, whether biased, whether they move, where they lie, what they weigh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from easylm_jax.checkpoint import Checkpointer
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.optim_state import (
    bytes_per_parameter,
    decode,
    encode,
    random_bits,
    round_to_bfloat16,
    store_moments,
)
from easylm_jax.sharding import spec_for, tree_shardings
from easylm_jax.tree import named_leaves

RNG = np.random.default_rng(0)


def moments(octaves: float, *, signed: bool, rows: int = 200, columns: int = 301):
    """Rows of any size in float32; within a row `octaves`, a tenth of it exact zeros."""
    row = RNG.uniform(-60, 100, size=(rows, 1))  # XLA takes what is below 2**-126 for 0
    x = np.exp2(row - RNG.uniform(0, octaves, size=(rows, columns)))
    x *= RNG.choice([-1.0, 1.0], size=x.shape) if signed else 1.0
    return jnp.asarray(x * (RNG.random(x.shape) > 0.1), jnp.float32)


@functools.partial(jax.jit, static_argnames="kind")
def through(x, step, *, kind: str):
    """Stored and restored."""
    random = random_bits(step, kind, x.shape)
    if kind == "bfloat16":
        return round_to_bfloat16(x, random).astype(jnp.float32)
    return decode(encode(x, random, signed=kind == "signed"))


# ---- codes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, octaves, error",
    [("signed", 15, 1 / 8), ("unsigned", 31, 1 / 8), ("bfloat16", 60, 1 / 128)],
)
def test_in_range_the_relative_error_is_bounded_at_any_magnitude(kind, octaves, error):
    x = moments(octaves, signed=kind != "unsigned")
    got = np.asarray(through(x, jnp.int32(3), kind=kind), np.float64)
    x = np.asarray(x, np.float64)
    assert (got[x == 0] == 0).all() and (np.sign(got) == np.sign(x)).all()
    wrong = np.abs(got - x)[x != 0] / np.abs(x[x != 0])
    assert 0.7 * error < wrong.max() <= error


def test_far_below_its_row_a_first_moment_may_vanish_and_a_second_may_not():
    for kind, least in (("signed", 2.0**-15), ("unsigned", 2.0**-31)):
        x = moments(60, signed=kind == "signed")
        got, x = np.asarray(through(x, jnp.int32(5), kind=kind)), np.asarray(x)
        limit = least * np.abs(x).max(axis=-1, keepdims=True)
        far = (np.abs(x) < limit / 2) & (x != 0)
        assert far.mean() > 0.1 and (np.abs(got) <= limit)[far].all()
        if kind == "signed":
            assert (got[far] == 0).mean() > 0.5
        else:
            assert (got[far] >= x[far]).all()  # too small an update, never too large a one


@pytest.mark.parametrize("kind, octaves", [("signed", 20), ("unsigned", 31), ("bfloat16", 40)])
def test_the_mean_over_steps_is_right_for_every_element(kind, octaves):
    x, draws = moments(octaves, signed=kind != "unsigned", rows=10, columns=100), 4000
    total = jax.lax.fori_loop(
        0, draws, lambda t, s: s + (through(x, t, kind=kind) - x), jnp.zeros_like(x)
    )
    error = np.asarray(total, np.float64) / draws
    x = np.asarray(x, np.float64)
    step = np.abs(x) / (128 if kind == "bfloat16" else 8)  # at most, between two codes
    if kind == "signed":  # and below the range, between 0 and the least
        step = np.maximum(step, np.abs(x).max(axis=-1, keepdims=True) * 2.0**-15)
    z = (error / np.maximum(step / 2, 1e-300) * np.sqrt(draws))[x != 0]  # a deviation or less
    assert np.abs(z).max() < 5
    assert np.abs((z * np.sign(x[x != 0])).mean()) < 5 / np.sqrt(z.size)


def test_draws_differ_between_steps_leaves_and_elements_and_are_uniform():
    steps = [random_bits(jnp.int32(t), name, (64, 64)) for t in range(30) for name in ("a", "b")]
    drawn = np.stack([np.asarray(x, np.float64).ravel() for x in steps]) / 2**32
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 5 / np.sqrt(12 * len(drawn))
    assert np.abs(np.corrcoef(drawn) - np.eye(len(drawn))).max() < 5 / 64  # of steps and leaves
    assert np.abs(np.corrcoef(drawn[:, :200].T) - np.eye(200)).max() < 0.8  # of elements


# ---- the optimiser -----------------------------------------------------------------------------


def draw_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": {"embedding": (128, 64)},
        "layers": {
            "attention": {"q": {"kernel": (2, 64, 64), "bias": (2, 64)}},
            "attention_norm": {"scale": (96, 64)},
            "mlp": {"down": {"kernel": (2, 64, 64)}},
        },
        "lm_head": {"kernel": (64, 200)},
    }

    def draw(shape):
        """Of ten octaves, no 0 among them, so that squares stay in the range of 8 bits."""
        size = rng.choice([-1, 1], size=shape) * np.exp2(rng.uniform(-10, 0, size=shape))
        return jnp.asarray(size, jnp.float32)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def optimizer_of(state_dtype: str, name: str = "adamw", **options):
    config = OptimConfig(name=name, state_dtype=state_dtype, clip_norm=0.0, **options)
    return make_optimizer(config, lambda step: 0.01)


def moments_of(state):
    """mu and nu, or mu alone, restored; by name."""
    inner = state[0]
    trees = {k: getattr(inner, k) for k in ("mu", "nu") if hasattr(inner, k)}
    is_codes = lambda x: hasattr(x, "codes")  # noqa: E731
    restored = jax.tree.map(lambda x: decode(x) if is_codes(x) else x, trees, is_leaf=is_codes)
    return named_leaves(restored)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("b2", [0.95, 0.999])
def test_second_moments_follow_the_gradient_up_and_decay_when_it_vanishes(state_dtype, b2):
    """Their mean is that of float32; rounding to the nearest would stall at b2 = 0.999."""
    x = draw_params()["lm_head"]["kernel"]
    up, down = round(2 / (1 - b2)), round(3 / (1 - b2))

    @functools.partial(jax.jit, static_argnums=0)
    def run(dtype):
        optimizer = optimizer_of(dtype, b2=b2)

        def one(state, t):
            grads = {"kernel": jnp.where(t < up, x, 0.0)}
            return optimizer.update(grads, state, {"kernel": x})[1], None

        middle, _ = jax.lax.scan(one, optimizer.init({"kernel": x}), jnp.arange(up))
        end, _ = jax.lax.scan(one, middle, jnp.arange(up, up + down))
        return [moments_of(state)["nu/kernel"] for state in (middle, end)]

    for got, expected in zip(run(state_dtype), run("float32"), strict=True):
        ratio = np.asarray(got, np.float64) / np.asarray(expected, np.float64)
        assert abs(ratio.mean() - 1) < 0.03 and ratio.std() < 0.7, (ratio.mean(), ratio.std())


@pytest.mark.parametrize(
    "exact, state_dtype", [(optax.scale_by_adam(), "int8"), (optax.scale_by_lion(), "bfloat16")]
)
def test_the_update_is_computed_in_float32_from_what_was_restored(exact, state_dtype):
    """From restored moments, optax's own float32 update gives the same, bit for bit."""
    trees = [{k: draw_params(seed)[k] for k in ("embed", "lm_head")} for seed in range(3)]
    optimizer = store_moments(exact, state_dtype)
    update, state = jax.jit(optimizer.update), optimizer.init(trees[0])
    for grads in trees[:2]:
        _, state = update(grads, state)
    leaves, structure = jax.tree.flatten(exact.init(trees[0]))
    restored = [x.astype(jnp.float32) for x in moments_of([state]).values()]
    same = jax.tree.unflatten(structure, [state.count, *restored])
    got, expected = update(trees[2], state)[0], jax.jit(exact.update)(trees[2], same)[0]
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_parameters_in_bfloat16_have_moments_in_float32():
    params = optax.tree.cast(draw_params(), jnp.bfloat16)
    optimizer = optimizer_of("float32")
    state = jax.eval_shape(optimizer.init, params)
    _, after = jax.eval_shape(optimizer.update, params, state, params)
    assert {x.dtype for x in jax.tree.leaves(state[0][1:])} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, after)


def test_adafactor_is_refused():
    with pytest.raises(ValueError, match="state_dtype is 'int8', but adafactor .* use state_dtype"):
        OptimConfig(name="adafactor", state_dtype="int8")


# ---- layout, bytes, checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "lion"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "int8"])
def test_bytes_are_as_the_planner_is_told_and_small_leaves_are_float32(name, state_dtype):
    params = {
        "layers": {
            "q": {"kernel": (8, 512, 2048)},
            "norm": {"scale": (8, 2048)},
            "o": {"kernel": (8, 8)},
        }
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16),
        params,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    config = OptimConfig(name=name, state_dtype=state_dtype)
    state = named_leaves(jax.eval_shape(optimizer_of(state_dtype, name).init, params))
    size = {k: x.size * x.dtype.itemsize for k, x in state.items()}
    large = sum(n for k, n in size.items() if "q/kernel" in k) / (8 * 512 * 2048)
    assert bytes_per_parameter(config) <= large < bytes_per_parameter(config) + 2.1 * 2 / 2048
    others = [x for k, x in state.items() if "norm" in k or "o/kernel" in k]
    assert others and all(x.dtype == jnp.float32 for x in others)


def placed(tree, mesh):
    return jax.device_put(tree, tree_shardings(tree, mesh, PARAM_RULES))


@functools.cache
def compiled_update(spec: str, state_dtype: str):
    """Mesh, state before the first step, and the update laid out as the trainer does."""
    optimizer, params, mesh = optimizer_of(state_dtype), draw_params(), make_mesh(spec)
    params, state = placed(params, mesh), placed(optimizer.init(params), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh):
        update = jax.jit(optimizer.update, out_shardings=shardings)
        return mesh, params, state, update.lower(params, state, params).compile()


def run_steps(compiled, seeds, state=None):
    """All updates, and the last state. Parameters play no part in either, bar the weight decay."""
    mesh, params, start, update = compiled
    state, updates = state or start, []
    for seed in seeds:
        update_, state = update(placed(draw_params(seed), mesh), state, params)
        updates.append(update_)
    return updates, state


@functools.cache
def unsharded(state_dtype: str):
    optimizer, state, updates = optimizer_of(state_dtype), None, []
    params, update = draw_params(), jax.jit(optimizer.update)
    state = optimizer.init(params)
    for seed in range(1, 7):
        update_, state = update(draw_params(seed), state, params)
        updates.append(update_)
    return updates, state


LAYOUTS = [
    ("1,2,1,4", "int8"),
    pytest.param("2,4,1,1", "int8", marks=pytest.mark.slow),
    pytest.param("1,8,1,1", "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("spec, state_dtype", LAYOUTS)
def test_sharded_equals_unsharded_bit_for_bit_and_gathers_nothing(spec, state_dtype):
    *_, state, compiled = compiled_update(spec, state_dtype)
    got = run_steps(compiled_update(spec, state_dtype), range(1, 7))
    jax.tree.map(np.testing.assert_array_equal, got, unsharded(state_dtype))
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert f" {collective}" not in compiled.as_text()
    ways = {"1,2,1,4": 8, "2,4,1,1": 4, "1,8,1,1": 8}[spec]
    large = {k: x for k, x in named_leaves(state).items() if x.size >= 4096 and "norm" not in k}
    assert len(large) == 8  # two moments of four matrices
    for name, leaf in large.items():
        assert leaf.addressable_shards[0].data.size * ways == leaf.size, name


def test_a_restored_state_goes_on_bit_for_bit(tmp_path):
    compiled = compiled_update("1,2,1,4", "int8")
    _, state = run_steps(compiled, range(1, 4))
    checkpointer = Checkpointer(str(tmp_path), keep_last=1)
    checkpointer.save(3, state, {})
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    restored = checkpointer.restore_latest(wanted).state
    checkpointer.close()
    assert {str(x.dtype) for x in jax.tree.leaves(restored)} >= {"int8", "uint8", "uint16"}
    got, expected = (run_steps(compiled, range(4, 7), s) for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_scales_are_not_split_where_they_have_one_column():
    codes, zero = (
        spec_for("mu/layers/mlp/down/kernel/x", (2, 64, n), PARAM_RULES) for n in (64, 1)
    )
    assert codes == P(None, "tensor", "fsdp") and zero == P(None, "tensor", None)
