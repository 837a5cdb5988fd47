"""Continuations of fixed prompts, to read what a model in training has learnt."""

from collections.abc import Sequence

import jax
from jax.experimental import multihost_utils

from easylm_jax.array_types import Params
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.sampler import generate, pad_prompts
from easylm_jax.text.tokenizer import Tokenizer


def sample_texts(
    params: Params,
    prompts: Sequence[str],
    *,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    rows_multiple: int,
) -> list[str]:
    """A continuation of every prompt. The same seed draws the same numbers, so samples compare.

    `rows_multiple`: how many rows the mesh asks for; see `pad_prompts`.
    """
    ids = [tokenizer.prompt_ids(prompt) for prompt in prompts]
    padded, lengths = pad_prompts(ids, rows_multiple=rows_multiple)
    out = generate(
        params,
        padded,
        lengths,
        jax.random.key(seed),
        config=config,
        max_new_tokens=max_new_tokens,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        temperature=temperature,
    )
    rows = multihost_utils.process_allgather(out, tiled=True)[: len(ids)].tolist()
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]) for row in rows]
