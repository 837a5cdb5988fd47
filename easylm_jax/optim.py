"""The optimiser: schedule, decay mask and the optax chain, from one dataclass. Durations too.

A duration is text, because runs are planned in different units: "250000 steps", "1.4T tokens",
"2 epochs" or, where a whole is known, "3%". Everything below this file counts steps.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int

from easylm_jax.array_types import Params
from easylm_jax.optim_state import store_moments
from easylm_jax.tree import map_named, matches

OPTIMIZERS = ("adamw", "adafactor", "lion")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The defaults are LLaMA's (arXiv:2302.13971, section 2.2)."""

    name: str = "adamw"  # adamw, adafactor, lion
    lr: float = 3e-4  # peak
    schedule: str = "cosine"  # cosine, linear, constant, wsd (warm-up, stable, decay)
    warmup: str = "2000 steps"  # a duration; a percentage is of the whole run
    final_lr_ratio: float = 0.1  # learning rate at the end / peak
    decay: str = "10%"  # wsd only: the last part, in which the rate falls linearly
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("scale$", "bias$", "embedding$")  # path patterns left undecayed
    scale_by_param: bool = False  # the rate is relative to the size of each parameter
    clip_norm: float = 1.0  # global gradient norm; 0: no clipping
    state_dtype: Literal["float32", "bfloat16", "int8"] = "float32"  # how moments are stored

    def __post_init__(self) -> None:
        for value, known in ((self.name, OPTIMIZERS), (self.schedule, SCHEDULES)):
            if value not in known:
                near = difflib.get_close_matches(value, known, n=1) or known
                raise ValueError(f"optim: {value!r} is not known; near it: {', '.join(near)}")
        if self.name == "adafactor" and self.state_dtype != "float32":
            raise ValueError(
                f"optim.state_dtype is {self.state_dtype!r}, but adafactor stores only a row and a "
                "column of each matrix, in float32; use state_dtype 'float32'"
            )


def parse_duration(
    text: str,
    *,
    tokens_per_step: int,
    tokens_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> int:
    """Steps, at least 1 unless the number is 0, rounded up.

    Raises:
      ValueError: not understood, or in a unit that means nothing here.
    """
    number = r"(\d+(?:_\d+)*(?:\.\d+)?(?:e\d+)?)"
    found = re.fullmatch(rf"\s*{number}\s*([KMBT]?)\s*(steps?|tokens?|epochs?|%)\s*", text)
    if not found:
        raise ValueError(
            f"duration {text!r} is not understood; write such as '5000 steps', '1.4T tokens', "
            "'2 epochs' or '3%'"
        )
    # Fractions, since floats would round 100% of 7 steps up to 8.
    amount = Fraction(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[found[2]]
    unit = found[3].rstrip("s")
    whole = {
        "step": Fraction(1),
        "token": Fraction(1, tokens_per_step),
        "epoch": Fraction(tokens_per_epoch or 0, tokens_per_step),
        "%": Fraction(total_steps or 0, 100),
    }[unit]
    if not whole:
        need = "a percentage of what?" if unit == "%" else "the data has no countable epoch"
        raise ValueError(f"duration {text!r} cannot be used here ({need}); give steps or tokens")
    return math.ceil(amount * whole)


def make_schedule(config: OptimConfig, *, total_steps: int, tokens_per_step: int) -> Schedule:
    """Step -> learning rate: linear warm-up from 0, then the named shape to the final rate."""

    def steps(text: str) -> int:
        return parse_duration(text, tokens_per_step=tokens_per_step, total_steps=total_steps)

    warmup, peak = steps(config.warmup), config.lr
    if warmup > total_steps:
        raise ValueError(
            f"optim.warmup = {config.warmup!r} is {warmup} steps, longer than the run of "
            f"{total_steps}; use fewer steps or a percentage"
        )
    final, rest = peak * config.final_lr_ratio, max(total_steps - warmup, 1)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_ratio)
    elif config.schedule == "linear":
        shape = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "constant":
        shape = optax.constant_schedule(peak)
    else:
        fall = min(steps(config.decay), rest)
        shape = optax.linear_schedule(peak, final, fall, transition_begin=rest - fall)
    # Step t makes update t + 1: the first update already has a rate above 0.
    return lambda step: jnp.where(
        step < warmup, peak * (step + 1) / max(warmup, 1), shape(step - warmup)
    )


def decay_mask(params: Params, no_decay: tuple[str, ...]) -> Params:
    """True for the leaves that weight decay touches."""
    return map_named(lambda name, _: not any(matches(p, name) for p in no_decay), params)


def scale_by_param_rms() -> optax.GradientTransformation:
    """Updates times RMS(parameter), at least 1e-3 (arXiv:1804.04235, section 8), layer by layer."""

    def scale(name: str, update: Array, param: Array) -> Array:
        axes = tuple(range(1 if name.startswith("layers/") else 0, param.ndim))  # stacked or not
        rms = jnp.sqrt(jnp.mean(jnp.square(param), axis=axes, keepdims=True))
        return update * jnp.maximum(rms, 1e-3)

    return optax.stateless(lambda updates, params: map_named(scale, updates, params))


def make_optimizer(config: OptimConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimiser with decoupled weight decay."""
    if config.name == "adamw":
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
        parts = [store_moments(adam, config.state_dtype)]
    elif config.name == "lion":
        parts = [store_moments(optax.scale_by_lion(config.b1, config.b2), config.state_dtype)]
    else:
        # Its own weight decay is not scaled by the learning rate; the one below is, as in AdamW.
        adafactor = optax.adafactor(learning_rate=None, multiply_by_parameter_scale=False)
        parts = [adafactor, optax.scale(-1.0)]
    if config.scale_by_param:
        parts.append(scale_by_param_rms())  # before the decay, which is relative by itself
    mask = functools.partial(decay_mask, no_decay=config.no_decay)
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    optimizer = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    if not config.clip_norm:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
