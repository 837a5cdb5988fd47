"""Continue prompts token by token with a key/value cache. Knows token ids only, no text.

One prefill of all prompts, padded to one length, then a `lax.while_loop` on the devices. Shapes are
fixed by (number of prompts, prompt length, max_new_tokens): a change of one of them recompiles.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from easylm_jax.array_types import Params, PRNGKey
from easylm_jax.models.llama import Llama, LlamaConfig, init_cache, output_logits


def pad_prompts(
    prompts: Sequence[Sequence[int]], *, rows_multiple: int = 1
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts as one array, zeros on the right, and their lengths.

    The number of rows is rounded up to `rows_multiple` by repeating the last prompt.
    """
    rows = [*prompts, *([prompts[-1]] * (-len(prompts) % rows_multiple))]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(row) for row in rows], np.int32)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos_id", "vocab_size"))
def generate(
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: PRNGKey,
    *,
    config: LlamaConfig,
    max_new_tokens: int,
    eos_id: int,
    vocab_size: int,
    temperature: Float[Array, ""] | float = 1.0,
) -> Int[Array, "B M"]:
    """M = `max_new_tokens` ids after each prompt; after an EOS, only EOS. Temperature 0 is greedy.

    Prompt b is `prompts[b, :lengths[b]]`. Padding takes cache slots that nothing attends to. Ids of
    `vocab_size` (the tokenizer's) and above, where the embedding is larger, are never chosen.
    """
    B, T = prompts.shape
    model, eos = Llama(config), jnp.int32(eos_id)

    def pick(hidden_BD: Array, index: Array) -> Array:
        logits_BV = output_logits(params, hidden_BD[:, None])[:, 0, :vocab_size]
        noise = jax.random.gumbel(jax.random.fold_in(key, index), logits_BV.shape)
        return jnp.argmax(logits_BV + temperature * noise, axis=-1).astype(jnp.int32)

    slots = jnp.arange(T)[None]
    segments = (slots < lengths[:, None]).astype(jnp.int32)
    cache = init_cache(config, B, T + max_new_tokens)
    hidden, cache = model.apply(
        {"params": params}, prompts, segments, jnp.broadcast_to(slots, (B, T)), cache=cache
    )
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    first = pick(last, jnp.int32(0))
    out = jnp.full((B, max_new_tokens), eos).at[:, 0].set(first)

    def unfinished(carry):
        index, out, _ = carry
        ended = jnp.take_along_axis(out, jnp.full((B, 1), index - 1), axis=1) == eos
        return (index < max_new_tokens) & ~ended.all()

    def one(carry):
        index, out, cache = carry
        before = jax.lax.dynamic_slice_in_dim(out, index - 1, 1, axis=1)
        hidden, cache = model.apply(
            {"params": params},
            before,
            jnp.ones_like(before),
            lengths[:, None] + index - 1,
            cache=cache,
        )
        token = jnp.where(before[:, 0] == eos, eos, pick(hidden[:, 0], index))
        return index + 1, out.at[:, index].set(token), cache

    return jax.lax.while_loop(unfinished, one, (jnp.int32(1), out, cache))[1]
