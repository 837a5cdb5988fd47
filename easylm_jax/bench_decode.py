"""Time the reading of a prompt and the writing of an answer. Called by `bench.py --work=decode`.

The prompt is random ids; the answer is made greedily, in pieces of `chunk` tokens between which the
host looks at them, as it does when it streams. A measurement, never a test.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from easylm_jax.loading import load
from easylm_jax.models.llama import FloatName
from easylm_jax.sampler import (
    SamplingConfig,
    bucket,
    decode,
    make_settings,
    num_row_shards,
    pad_prompts,
    prefill,
)
from easylm_jax.tree import num_elements


def run(
    *,
    model: str,
    dtype: FloatName,
    mesh: str,
    rows: int,
    prompt_tokens: int,
    new_tokens: int,
    chunk: int,
    steps: int,
) -> dict[str, str | int | float]:
    """Medians over `steps` prompts after one that compiles; tokens per second over all rows."""
    started = time.perf_counter()
    lm = load(model, dtype=dtype, mesh=mesh)
    jax.block_until_ready(lm.params)
    load_s = time.perf_counter() - started
    vocab_size = lm.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab_size, (rows, prompt_tokens))
    with jax.set_mesh(lm.mesh):
        shards = num_row_shards()
    if rows % shards:
        raise ValueError(f"{rows} rows do not split over {shards} devices; change --batch")
    tokens, lengths = pad_prompts(ids.tolist())
    settings = make_settings(
        SamplingConfig(temperature=0.0),
        [0] * rows,
        max_new_tokens=[new_tokens] * rows,
        vocab_size=vocab_size,
        stop_ids=[],
    )

    def read():
        size = dict(config=lm.config, capacity=bucket(new_tokens))
        return prefill(lm.params, tokens, lengths, settings, **size)

    def write(state):
        for limit in range(1 + chunk, new_tokens + chunk, chunk):
            limit = jnp.int32(min(limit, new_tokens))
            state = decode(lm.params, state, settings, limit, config=lm.config)
            np.asarray(state.tokens)
        return state

    read_s, write_s = [], []
    with jax.set_mesh(lm.mesh):
        for _ in range(steps + 1):
            state, seconds = _timed(read)
            read_s.append(seconds)
            write_s.append(_timed(lambda state=state: write(state))[1])
    prefill_s, decode_s = statistics.median(read_s[1:]), statistics.median(write_s[1:])
    return {
        "work": "decode",
        "model": model,
        "dtype": dtype,
        "mesh": mesh,
        "batch": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "params": num_elements(lm.params),
        "prefill_tokens_per_s": round(rows * prompt_tokens / prefill_s, 1),
        "decode_tokens_per_s": round(rows * (new_tokens - 1) / decode_s, 1),
        "decode_ms_per_token": round(decode_s / (new_tokens - 1) * 1e3, 2),
        "first_token_ms": round(prefill_s * 1e3, 1),
        "load_s": round(load_s, 1),
        "compile_s": round(read_s[0] - prefill_s + write_s[0] - decode_s, 1),
    }


def _timed(work: Callable) -> tuple:
    started = time.perf_counter()
    done = jax.block_until_ready(work())
    return done, time.perf_counter() - started
