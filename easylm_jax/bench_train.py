"""Time whole training steps. Called by `bench.py`.

The work is that of the peers measured in README.md: random tokens, AdamW, gradient clipping, every
position a target. A measurement, never a test.
"""

import dataclasses
import functools
import os
import statistics
import time

import jax
import numpy as np

from easylm_jax.batch import Batch
from easylm_jax.bench_peak import matmul_peak
from easylm_jax.bench_profile import breakdown
from easylm_jax.mesh import check_divides, make_mesh
from easylm_jax.metrics import flops_per_token, memory_stats, peak_flops
from easylm_jax.models.attention_choice import check_attention
from easylm_jax.models.llama import (
    PARAM_RULES,
    LlamaConfig,
    init_params,
    make_forward,
    num_params,
)
from easylm_jax.models.presets import preset
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.step import GuardConfig, jit_train_step
from easylm_jax.train_state import abstract_state, init_state

KERNEL_OF_PLATFORM = {"tpu": "splash", "gpu": "tokamax", "cpu": "blockwise"}


@dataclasses.dataclass(frozen=True)
class Work:
    """A piece of training, and what suits one device of the size that it is made for."""

    model: str  # a preset
    batch: int  # rows per step
    seq_len: int
    dtype: str
    micro_batches: int = 1
    remat: str = "linear_outputs_and_attention"
    state_dtype: str = "float32"  # of AdamW's moments
    layers: int | None = None  # instead of the preset's, for a quick look


# small, long: a CPU computes again faster than it reads what it kept, `experiments/cpu_speed`.
# 7b: parameters, gradients and moments take 108 GB in float32, 81 GB with moments in bfloat16, and
# what the policy keeps 11.4 GB per row. One H200 has 141 GB.
WORKS = {
    "small": Work("small", 8, 1024, "float32", micro_batches=4, remat="attention_only"),
    "long": Work("small", 1, 4096, "float32", remat="attention_only"),
    "1b": Work("1b", 8, 4096, "bfloat16"),
    "7b": Work("llama_7b", 3, 4096, "bfloat16", state_dtype="bfloat16"),
}


def run(
    work: Work, *, mesh: str, steps: int, attention: str | None, profile: str | None
) -> dict[str, str | int | float | dict[str, float]]:
    """Median of `steps` timed steps, after the compiling one and one to warm up.

    `profile` is a folder for a profile of one more step; "breakdown" then says where it went.
    """
    device = jax.devices()[0]
    kernel = attention or KERNEL_OF_PLATFORM[device.platform]
    config = model_config(work, kernel)
    device_mesh = make_mesh(mesh)
    size = dict(seq_len=work.seq_len, num_kv_heads=config.num_kv_heads)
    check_divides(device_mesh.shape, rows=work.batch // work.micro_batches, **size)
    with jax.set_mesh(device_mesh):
        check_attention(config.attention, **size)
    tokens_per_step = work.batch * work.seq_len
    on_cpu = device.platform == "cpu"
    peak = matmul_peak(config, tokens_per_step // work.micro_batches) if on_cpu else None

    optimizer = make_optimizer(OptimConfig(state_dtype=work.state_dtype), lambda step: 3e-4)
    make = functools.partial(init_state, functools.partial(init_params, config), optimizer, 0)
    with jax.set_mesh(device_mesh):
        shardings = jax.tree.map(
            lambda x: x.sharding, abstract_state(make, device_mesh, PARAM_RULES)
        )
        step = jit_train_step(
            shardings=shardings,
            objective=cross_entropy(make_forward(config)),
            optimizer=optimizer,
            num_micro_batches=work.micro_batches,
            has_dropout=config.has_dropout,
            guard=GuardConfig(),
        )
        data = _random_batch(work, config.vocab_size)
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
        if profile:
            with jax.profiler.trace(profile):
                jax.block_until_ready(compiled(state, data))
    step_s, cpu_s = statistics.median(wall[1:]), statistics.median(cpu[1:])
    flops = tokens_per_step * causal_flops(config, work.seq_len)
    result = dataclasses.asdict(work) | {
        "layers": config.num_layers,
        "mesh": mesh,
        "attention": kernel,
        "params": num_params(config),
        "tokens_per_s": round(tokens_per_step / step_s, 1),
        "step_ms_median": round(step_s * 1e3, 1),
        "step_ms_min": round(min(wall[1:]) * 1e3, 1),
        "cpu_s_step": round(cpu_s, 2),
        "causal_gflops_per_s": round(flops / step_s / 1e9, 1),
        "compile_s": round(compile_s, 1),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
    }
    if data_sheet := peak_flops(device.device_kind):
        result["mfu"] = round(flops / step_s / data_sheet / device_mesh.size, 4)
    if peak:
        cores = len(os.sched_getaffinity(0))
        result["matmul_peak_gflops_per_s"] = round(peak / 1e9, 1)
        result["share_of_matmul_peak"] = round(flops / cpu_s * cores / peak, 3)
    if "perf/memory_peak_gb" in (memory := memory_stats()):
        result["device_memory_peak_gb"] = round(memory["perf/memory_peak_gb"], 1)
    if profile:
        result["breakdown"] = breakdown(profile, compiled.as_text())
    return result


def model_config(work: Work, kernel: str) -> LlamaConfig:
    config = preset(work.model, dtype=work.dtype, remat=work.remat, max_seq_len=work.seq_len)
    blocks = {"block_q": 512, "block_k": 512} if kernel == "splash" else {}
    return dataclasses.replace(
        config,
        num_layers=work.layers or config.num_layers,
        attention=dataclasses.replace(config.attention, implementation=kernel, **blocks),
    )


def _random_batch(work: Work, vocab_size: int) -> Batch:
    shape = (work.batch, work.seq_len)
    tokens = np.random.default_rng(0).integers(
        0, vocab_size, (work.batch, work.seq_len + 1), dtype=np.int32
    )
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(work.seq_len, dtype=np.int32), shape)
    return Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)


def causal_flops(config: LlamaConfig, seq_len: int) -> float:
    """Per token, forward and backward."""
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size")
    sizes = {name: getattr(config, name) for name in names}
    sizes["window"] = config.attention.sliding_window
    return flops_per_token(**sizes, seq_len=seq_len)["causal"]
