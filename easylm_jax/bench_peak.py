"""How fast this machine does the model's own matrix products, and nothing else.

The forward products of a layer and of the output head, each alone, written as the model writes them
(`dots.py`). Counted in CPU seconds, because the cores of a CPU may be shared with other work.
Called by `bench_train.py`, on CPU alone: other devices have a data sheet (`chips.py`).
"""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np

from easylm_jax.dots import dot_f32
from easylm_jax.models.llama import LlamaConfig

SECONDS = 0.4  # of CPU time spent on each product
REPEATS = 3  # at least


def matmul_peak(config: LlamaConfig, num_tokens: int) -> float:
    """FLOP/s of all cores together, `num_tokens` rows in every product."""
    products = forward_products(config)
    flops = sum(times * 2 * num_tokens * wide * out for (wide, out), times in products.items())
    seconds = sum(
        times * _cpu_seconds(num_tokens, wide, out, config.dtype)
        for (wide, out), times in products.items()
    )
    return flops / seconds * len(os.sched_getaffinity(0))


def forward_products(config: LlamaConfig) -> dict[tuple[int, int], int]:
    """[in, out] of every kernel -> how often it is used in a forward pass."""
    d, heads, kv_heads = config.d_model, config.num_heads, config.num_kv_heads
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    layer = [(d, q), (d, kv), (d, kv), (q, d), (d, config.d_ff), (d, config.d_ff), (config.d_ff, d)]
    products = {shape: layer.count(shape) * config.num_layers for shape in layer}
    head = (d, config.vocab_size)
    return products | {head: products.get(head, 0) + 1}


def _cpu_seconds(rows: int, wide: int, out: int, dtype: str) -> float:
    """Of one product, the least of several."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, wide), np.float32), dtype)
    kernel = jnp.asarray(rng.standard_normal((wide, out), np.float32), dtype)
    product = jax.jit(lambda x, kernel: dot_f32(x, kernel, (1,), (0,)))
    product(x, kernel).block_until_ready()
    taken = []
    while len(taken) < REPEATS or sum(taken) < SECONDS:
        before = time.process_time()
        product(x, kernel).block_until_ready()
        taken.append(time.process_time() - before)
    return min(taken)
