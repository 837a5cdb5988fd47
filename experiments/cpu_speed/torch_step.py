"""The peer: training steps of transformers' LLaMA in torch, on the works of `easylm_jax.bench`.

    python experiments/cpu_speed/torch_step.py --work=small --dtype=bfloat16

Same shape, same number of random tokens, AdamW, clipping, every position a target; parameters of
float32 and autocast for bfloat16. Prints one JSON line with the names of `bench --json`.
`run.py` here and in ../gpu_speed call it. Needs torch and transformers; on a GPU if there is one.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import time

import torch
import transformers

from easylm_jax.bench_peak import forward_products
from easylm_jax.bench_train import WORKS, Work, causal_flops, model_config
from easylm_jax.metrics import peak_flops
from easylm_jax.models.llama import LlamaConfig


def make_model(config: LlamaConfig, seq_len: int, attention: str) -> torch.nn.Module:
    """transformers' model of the same shape, in float32."""
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=seq_len,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(shape).float().train()


def run(work: Work, *, steps: int, compiled: bool, attention: str, checkpointing: bool) -> dict:
    """Median of `steps` timed steps, after one that compiles and one to warm up."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = model_config(work, "blockwise")
    cores = len(os.sched_getaffinity(0))
    on_cpu = device.type == "cpu"
    peak = matmul_peak(config, work.batch * work.seq_len, work.dtype) * cores if on_cpu else None
    torch.set_float32_matmul_precision("highest" if on_cpu else "high")
    torch.manual_seed(0)
    with device:
        model = make_model(config, work.seq_len, attention)
        tokens = torch.randint(0, config.vocab_size, (work.batch, work.seq_len + 1))
    if work.state_dtype == "bfloat16":  # what torch users do where float32 does not fit: all of it
        model = model.bfloat16()
    if checkpointing:
        options = dict(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        model.gradient_checkpointing_enable(**options)
    forward = torch.compile(model) if compiled else model
    adamw = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    autocast = contextlib.nullcontext()
    if work.dtype == "bfloat16" and work.state_dtype == "float32":
        autocast = torch.autocast(device.type, torch.bfloat16)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> float:
        with autocast:
            loss = forward(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    wall, cpu, losses = [], [], []
    for _ in range(steps + 2):
        before, cpu_before = time.perf_counter(), time.process_time()
        losses.append(step())
        wall.append(time.perf_counter() - before)
        cpu.append(time.process_time() - cpu_before)
    step_s, cpu_s = statistics.median(wall[2:]), statistics.median(cpu[2:])
    flops = work.batch * work.seq_len * causal_flops(config, work.seq_len)
    result = dataclasses.asdict(work) | {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens_per_s": round(work.batch * work.seq_len / step_s, 1),
        "step_ms_median": round(step_s * 1e3, 1),
        "cpu_s_step": round(cpu_s, 2),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "load1": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    if peak:
        result["matmul_peak_gflops_per_s"] = round(peak / 1e9, 1)
        result["share_of_matmul_peak"] = round(flops / cpu_s * cores / peak, 3)
    else:
        result["device"] = torch.cuda.get_device_name()
        result["device_memory_peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if data_sheet := peak_flops(result["device"]):
            result["mfu"] = round(flops / step_s / data_sheet, 4)
    return result


def matmul_peak(config: LlamaConfig, num_tokens: int, dtype: str) -> float:
    """FLOP per CPU second of the forward products, as `easylm_jax/bench_peak.py` counts them."""
    flops = seconds = 0.0
    for (wide, out), times in forward_products(config).items():
        x = torch.randn(num_tokens, wide).to(getattr(torch, dtype))
        kernel = torch.randn(wide, out).to(x.dtype)
        taken = []
        while len(taken) < 4 or sum(taken) < 0.4:
            before = time.process_time()
            x @ kernel
            taken.append(time.process_time() - before)
        flops += times * 2 * num_tokens * wide * out
        seconds += times * min(taken)
    return flops / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", choices=list(WORKS), default="small")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention", default="sdpa", help="sdpa, eager, flash_attention_2")
    parser.add_argument("--checkpointing", action="store_true", help="recompute every layer")
    changes = ("dtype", "batch", "seq_len", "layers", "state_dtype")
    for name in changes:
        parser.add_argument(
            f"--{name}", type=int if name in ("batch", "seq_len", "layers") else str
        )
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in changes}
    work = dataclasses.replace(WORKS[options.work], **{k: v for k, v in given.items() if v})
    found = run(
        work,
        steps=options.steps,
        compiled=options.compile,
        attention=options.attention,
        checkpointing=options.checkpointing,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
