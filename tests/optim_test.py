"""Durations, schedules and optimisers against closed formulas and NumPy."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from easylm_jax.optim import (
    OptimConfig,
    decay_mask,
    make_optimizer,
    make_schedule,
    parse_duration,
)
from easylm_jax.tree import named_leaves

# ---- durations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, steps",
    [
        ("5000 steps", 5000),
        ("1 step", 1),
        ("0 steps", 0),
        ("2K steps", 2000),
        ("1_000 steps", 1000),
        (" 5e3 steps ", 5000),
        ("1.4T tokens", 350_000_000),
        ("3B tokens", 750_000),
        ("4001 tokens", 2),  # rounded up
        ("1 token", 1),
        ("2 epochs", 51),  # of 100,001 tokens
        ("0.5 epochs", 13),
        ("3%", 42),
        ("50 %", 700),
        ("100%", 1400),
    ],
)
def test_every_unit(text, steps):
    whole = dict(tokens_per_step=4000, tokens_per_epoch=100_001, total_steps=1400)
    assert parse_duration(text, **whole) == steps


def test_whole_numbers_of_steps_are_not_rounded_up_by_floating_point():
    for total in range(1, 60):
        for percent in (7, 14, 28, 29, 50, 55, 57, 58, 100):
            got = parse_duration(f"{percent}%", tokens_per_step=1, total_steps=total)
            assert got == math.ceil(Fraction(percent, 100) * total), (percent, total)
    for tokens_per_step in range(1, 3000, 7):
        got = parse_duration(f"{1000 * tokens_per_step} tokens", tokens_per_step=tokens_per_step)
        assert got == 1000, tokens_per_step


@pytest.mark.parametrize(
    "text",
    ["", "5000", "steps", "-5 steps", "5 hours", "1.2.3 steps", "_ steps", "5 ksteps", "nan%"],
)
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(
        ValueError, match="duration .* is not understood; write such as '5000 steps'"
    ):
        parse_duration(text, tokens_per_step=10, total_steps=10)


def test_units_that_mean_nothing_here():
    with pytest.raises(ValueError, match="a percentage of what"):
        parse_duration("3%", tokens_per_step=10)
    with pytest.raises(ValueError, match="no countable epoch"):
        parse_duration("3 epochs", tokens_per_step=10)


# ---- schedules ---------------------------------------------------------------------------------

WARMUP, TOTAL, PEAK, FLOOR = 10, 110, 0.5, 0.05


def expected_rate(name: str, step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = min((step - WARMUP) / (TOTAL - WARMUP), 1.0)
    if name == "cosine":
        return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * done)) / 2
    if name == "linear":
        return PEAK + (FLOOR - PEAK) * done
    if name == "wsd":  # the last 20 % of all steps fall: from step 88 on
        return PEAK + (FLOOR - PEAK) * min(max(step - 88, 0) / 22, 1.0)
    return PEAK


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_equal_their_formulas(name):
    config = OptimConfig(schedule=name, lr=PEAK, warmup="10 steps", final_lr_ratio=0.1, decay="20%")
    schedule = make_schedule(config, total_steps=TOTAL, tokens_per_step=7)
    steps = [0, 1, 9, 10, 11, 35, 60, 87, 88, 89, 99, 109, 110, 500]
    rates = [float(schedule(jnp.int32(step))) for step in steps]
    np.testing.assert_allclose(rates, [expected_rate(name, step) for step in steps], rtol=2e-6)


def test_a_run_without_warmup_starts_at_the_peak_and_a_long_warmup_is_refused():
    none = make_schedule(OptimConfig(lr=PEAK, warmup="0 steps"), total_steps=9, tokens_per_step=1)
    np.testing.assert_allclose(none(0), PEAK)
    with pytest.raises(ValueError, match="optim.warmup = '10 steps' is 10 steps, longer than .* 9"):
        make_schedule(OptimConfig(warmup="10 steps"), total_steps=9, tokens_per_step=1)


@pytest.mark.parametrize(
    "field, value, near", [("name", "adam", "adamw"), ("schedule", "cos", "cosine")]
)
def test_unknown_names_are_told_the_near_ones(field, value, near):
    with pytest.raises(ValueError, match=f"'{value}' is not known; near it: .*{near}"):
        OptimConfig(**{field: value})


# ---- optimisers --------------------------------------------------------------------------------


def draw_params(seed=0):
    rng = np.random.default_rng(seed)
    tree = {
        "embed": {"embedding": (7, 4)},
        "layers": {"q": {"kernel": (2, 4, 4), "bias": (2, 4)}, "norm": {"scale": (2, 4)}},
        "lm_head": {"kernel": (4, 7)},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), tree, is_leaf=is_shape
    )


DECAYED = {"layers/q/kernel", "lm_head/kernel"}


def test_norms_biases_and_embeddings_are_not_decayed():
    mask = named_leaves(decay_mask(draw_params(), OptimConfig().no_decay))
    assert {name for name, decayed in mask.items() if decayed} == DECAYED


def rms_by_hand(name: str, x: np.ndarray) -> np.ndarray:
    parts = list(x) if name.startswith("layers/") else [x]
    rms = [max(np.linalg.norm(part) / np.sqrt(part.size), 1e-3) for part in parts]
    return np.reshape(rms, (-1, *[1] * (x.ndim - 1)))


@pytest.mark.parametrize("relative", [False, True])
def test_three_adamw_steps_equal_numpy(relative):
    """Clipping, bias correction, decoupled decay scaled by the rate, in float64 by hand.

    A relative rate is times the RMS of each layer's parameter; the decay is not.
    """
    cfg = OptimConfig(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=2.0)
    cfg = dataclasses.replace(cfg, scale_by_param=relative)
    rates = [0.1, 0.05, 0.2]
    optimizer = make_optimizer(cfg, lambda step: jnp.asarray(rates)[step])
    params, update = draw_params(), jax.jit(optimizer.update)
    sizes = jnp.array([1e-5, 3.0])  # of the two layers; the first is under the least RMS
    kernel = params["layers"]["q"]["kernel"]
    params["layers"]["q"]["kernel"] = kernel * sizes[:, None, None]
    state = optimizer.init(params)
    expected = {k: np.asarray(v, np.float64) for k, v in named_leaves(params).items()}
    m, v = ({k: np.zeros_like(x) for k, x in expected.items()} for _ in range(2))
    for t, rate in enumerate(rates):
        grads = jax.tree.map(lambda x, t=t: x * (0.1, 3.0, 1.0)[t], draw_params(seed=t + 1))
        g = {k: np.asarray(x, np.float64) for k, x in named_leaves(grads).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        assert (norm > 2.0) == (t > 0)  # the first is not clipped, the others are
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, x in g.items():
            x = x * min(1.0, 2.0 / norm)
            m[k] = 0.8 * m[k] + 0.2 * x
            v[k] = 0.9 * v[k] + 0.1 * x**2
            step = m[k] / (1 - 0.8 ** (t + 1))
            step = step / (np.sqrt(v[k] / (1 - 0.9 ** (t + 1))) + 1e-3)
            step = step * rms_by_hand(k, expected[k]) if relative else step
            expected[k] = expected[k] - rate * (step + 0.3 * (k in DECAYED) * expected[k])
    for name, value in named_leaves(params).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-6, err_msg=name)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_each_optimiser_descends_a_quadratic(name):
    params, goal = draw_params(0), draw_params(1)
    optimizer = make_optimizer(OptimConfig(name=name, weight_decay=0.0), lambda step: 0.02)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, goal), squared=True)

    @jax.jit
    def run(params):
        def one(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), loss(params)

        return jax.lax.scan(one, (params, optimizer.init(params)), None, length=200)[1]

    losses = run(params)
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_decay_is_the_rate_times_the_weight_where_the_mask_says(name):
    """Without a gradient, an update is decay alone: -0.1 * 0.4 * p."""
    params = draw_params()
    optimizer = make_optimizer(OptimConfig(name=name, weight_decay=0.4), lambda step: 0.1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    for leaf, update in named_leaves(updates).items():
        factor = -0.1 * 0.4 if leaf in DECAYED else 0.0
        np.testing.assert_allclose(update, factor * named_leaves(params)[leaf], atol=1e-7)
