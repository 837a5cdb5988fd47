"""Time whole training steps. Called by `bench.py`.

The work is that of the peers measured in README.md: random tokens, AdamW, gradient clipping, every
position a target. A measurement, never a test.
"""

import functools
import statistics
import time

import jax
import numpy as np

from easylm_jax.batch import Batch
from easylm_jax.mesh import make_mesh
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward, num_params
from easylm_jax.models.presets import preset
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.step import GuardConfig, jit_train_step
from easylm_jax.train_state import abstract_state, init_state

# name: (preset, rows, tokens per row)
WORK = {"small": ("small", 8, 1024), "long": ("small", 1, 4096), "1b": ("1b", 8, 4096)}


def run(
    *,
    work: str,
    dtype: str,
    remat: str,
    mesh: str,
    steps: int,
    batch: int | None,
    micro_batches: int,
) -> dict[str, str | int | float]:
    """Median of `steps` timed steps, after the compiling one and one to warm up."""
    name, default_rows, seq_len = WORK[work]
    rows = batch or default_rows
    config = preset(name, dtype=dtype, remat=remat)
    optimizer = make_optimizer(OptimConfig(), lambda step: 3e-4)
    make = functools.partial(init_state, functools.partial(init_params, config), optimizer, 0)
    device_mesh = make_mesh(mesh)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (rows, seq_len + 1), dtype=np.int32)
    ones = np.ones((rows, seq_len), np.int32)
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (rows, seq_len))
    data = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)

    with jax.set_mesh(device_mesh):
        shardings = jax.tree.map(
            lambda x: x.sharding, abstract_state(make, device_mesh, PARAM_RULES)
        )
        step = jit_train_step(
            shardings=shardings,
            objective=cross_entropy(make_forward(config)),
            optimizer=optimizer,
            num_micro_batches=micro_batches,
            guard=GuardConfig(),
        )
        state = jax.jit(make, out_shardings=shardings)()
        started = time.perf_counter()
        compiled = step.lower(state, data).compile()
        compile_s = time.perf_counter() - started
        wall, cpu, losses = [], [], []
        for _ in range(steps + 1):
            before, cpu_before = time.perf_counter(), time.process_time()
            state, metrics = compiled(state, data)
            losses.append(float(metrics["loss"]))
            wall.append(time.perf_counter() - before)
            cpu.append(time.process_time() - cpu_before)
    step_s = statistics.median(wall[1:])
    flops = flops_per_token(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        d_model=config.d_model,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        seq_len=seq_len,
    )
    return {
        "work": work,
        "dtype": dtype,
        "remat": remat,
        "mesh": mesh,
        "batch": rows,
        "micro_batches": micro_batches,
        "seq_len": seq_len,
        "params": num_params(config),
        "tokens_per_s": round(rows * seq_len / step_s, 1),
        "step_ms_median": round(step_s * 1e3, 1),
        "step_ms_min": round(min(wall[1:]) * 1e3, 1),
        "cpu_s_step": round(statistics.median(cpu[1:]), 2),
        "causal_gflops_per_s": round(flops["causal"] * rows * seq_len / step_s / 1e9, 1),
        "compile_s": round(compile_s, 1),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
    }
