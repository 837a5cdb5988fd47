"""Time training steps, or reading and writing with a model, on a fixed piece of work.

    python -m easylm_jax.bench --work=small --dtype=float32 --json
    python -m easylm_jax.bench --work=decode --model=PATH --batch=8 --json

Training is that of the peers measured in README.md: random tokens, AdamW, gradient clipping, every
position a target. Decoding is in `bench_decode.py`. It is a measurement, never a test.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import time

import jax
import numpy as np

from easylm_jax import bench_decode
from easylm_jax.batch import Batch
from easylm_jax.mesh import make_mesh
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.llama import PARAM_RULES, init_params, make_forward, num_params
from easylm_jax.models.presets import preset
from easylm_jax.objectives import cross_entropy
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.step import GuardConfig, train_step
from easylm_jax.train_state import abstract_state, init_state

# name: (preset, rows, tokens per row)
WORK = {"small": ("small", 8, 1024), "long": ("small", 1, 4096), "1b": ("1b", 8, 4096)}


def main() -> None:
    """Parse the arguments, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m easylm_jax.bench",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    works = [*WORK, "decode"]
    parser.add_argument("--work", choices=works, default="small", help="training, or `decode`")
    parser.add_argument("--model", help="decode: path of a model, of any format")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", default="none", help="policy of models/remat.py")
    parser.add_argument("--mesh", default="1,-1,1,1", help="replica,fsdp,sequence,tensor")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--batch", type=int, help="rows, instead of the work's own; decode: 1")
    parser.add_argument("--prompt", type=int, default=512, help="decode: tokens to read, per row")
    parser.add_argument("--new", type=int, default=128, help="decode: tokens to write, per row")
    parser.add_argument("--every", type=int, default=8, help="decode: tokens per dispatch")
    parser.add_argument(
        "--micro_batches", type=int, default=1, help="parts whose gradients a step adds up"
    )
    parser.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    options = parser.parse_args()
    result = _decode(options) if options.work == "decode" else _train(options)
    result |= {
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "device": jax.devices()[0].device_kind,
        "load1": round(os.getloadavg()[0], 1),
        "jax": jax.__version__,
    }
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:20s} {value}" for name, value in result.items()))


def _decode(options: argparse.Namespace) -> dict[str, str | int | float]:
    if not options.model:
        raise SystemExit("error: --work=decode needs --model=PATH")
    return bench_decode.run(
        model=options.model,
        dtype=options.dtype,
        mesh=options.mesh,
        rows=options.batch or 1,
        prompt_tokens=options.prompt,
        new_tokens=options.new,
        every=options.every,
        steps=options.steps,
    )


def _train(options: argparse.Namespace) -> dict[str, str | int | float]:
    names = ("work", "dtype", "remat", "mesh", "steps", "batch", "micro_batches")
    return run(**{name: getattr(options, name) for name in names})


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
        step = jax.jit(
            functools.partial(
                train_step,
                objective=cross_entropy(make_forward(config)),
                optimizer=optimizer,
                num_micro_batches=micro_batches,
                guard=GuardConfig(),
            ),
            donate_argnums=0,
            out_shardings=(shardings, None),
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


if __name__ == "__main__":
    main()
