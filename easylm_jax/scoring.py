"""Rows of ids -> log-probabilities of their ends. Called by language_model.py."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from easylm_jax.array_types import Params
from easylm_jax.models.llama import LlamaConfig, output_kernel
from easylm_jax.objectives import token_losses
from easylm_jax.sampler import inference_model, num_row_shards, pad_prompts
from easylm_jax.sharding import constrain


class Scored(NamedTuple):
    """A row of ids of which those from `start` on are rated."""

    ids: tuple[int, ...]
    start: int


@functools.partial(jax.jit, static_argnames=("config",))
def _scores(params, tokens, lengths, *, config):
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    hidden = inference_model(params, config).apply({"params": params}, tokens, segments, slots)[0]
    scores = token_losses(hidden, output_kernel(params), jnp.roll(tokens, -1, axis=1))
    return tuple(constrain(x, None, None) for x in scores)


def score(
    params: Params,
    rows: Sequence[Scored],
    *,
    config: LlamaConfig,
    batch_tokens: int = 2048,
    on_done: Callable[[int], None] | None = None,
) -> list[tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]]:
    """log p(ids[start:] | what stands before each), and where the id is the best guess."""
    found = {}
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        ids, start = rows[i]
        tokens, lengths = pad_prompts([ids], rows_multiple=num_row_shards())
        losses, best = jax.device_get(_scores(params, tokens, lengths, config=config))
        own = slice(start - 1, len(ids) - 1)
        found[i] = (-losses[0, own], best[0, own] > 0)
        if on_done:
            on_done(1)
    return [found[i] for i in range(len(rows))]
