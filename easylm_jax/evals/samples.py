"""Continuations of fixed prompts, to read what a model in training has learnt."""

from collections.abc import Sequence

from easylm_jax.array_types import Params
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.sampler import SamplingConfig, generate
from easylm_jax.text.tokenizer import Tokenizer


def sample_texts(
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    config: LlamaConfig,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: Sequence[int],
) -> list[str]:
    """A continuation of every prompt. The same seed draws the same numbers, so samples compare."""
    made = generate(
        params,
        list(prompts),
        config=config,
        sampling=SamplingConfig(temperature=temperature),
        seeds=[seed + i for i in range(len(prompts))],
        max_new_tokens=max_new_tokens,
        vocab_size=tokenizer.vocab_size,
        stop_ids=list(stop_ids),
    )
    rows = zip(made.tokens, made.count, strict=True)
    return [tokenizer.decode(ids[:count], continuation=True) for ids, count in rows]
