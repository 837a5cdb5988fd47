"""The quickstart's model trained with its optimiser state in float32, bfloat16 and int8.

    python -m easylm_jax.prepare --config=configs/data/quickstart.py --out=runs/quickstart_data
    python experiments/optimizer_state/run.py --out=runs/optimizer_state

A quarter of the quickstart's batch, 150 steps, b2 of 0.95 and 0.999. Prints the table of README.md
and writes table.json; a run whose folder has a result is not repeated. About a minute a run on two
cores.
"""

import argparse
import dataclasses
import json
import runpy
import time
from pathlib import Path

import jax
import numpy as np

from easylm_jax.config import from_config_dict
from easylm_jax.models.llama import init_params
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig, train
from easylm_jax.tree import num_elements

STATES = ("float32", "bfloat16", "int8")
BETAS = (0.95, 0.999)
STEPS = 150


def heldout_loss(out: Path, *, optim: OptimConfig, seed: int) -> float:
    """At the end of one run."""
    workdir = out / f"{optim.name}_{optim.state_dtype}_{optim.b2}_{seed}"
    metrics = workdir / "metrics.jsonl"
    config = runpy.run_path("configs/quickstart.py")["get_config"]()
    config = dataclasses.replace(
        from_config_dict(TrainConfig, config),
        duration=f"{STEPS} steps",
        batch_size=4,
        optim=optim,
        checkpoint=CheckpointConfig(every=f"{STEPS} steps"),
        eval=EvalConfig(every=f"{STEPS} steps", max_batches=32),
        seed=seed,
    )
    if not metrics.exists() or "eval/heldout/loss" not in metrics.read_text():
        train(config, str(workdir))
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["eval/heldout/loss"] for line in lines if "eval/heldout/loss" in line][-1]


def cost(optim: OptimConfig) -> tuple[float, float]:
    """Bytes of state per parameter of the whole model, CPU seconds of one update."""
    config = from_config_dict(TrainConfig, runpy.run_path("configs/quickstart.py")["get_config"]())
    params = jax.jit(lambda: init_params(config.model, jax.random.key(0)))()
    optimizer = make_optimizer(optim, lambda step: 1e-3)
    state, update = optimizer.init(params), jax.jit(optimizer.update, donate_argnums=1)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(state)) / num_elements(params)
    seconds = []
    for _ in range(12):
        start = time.process_time()
        _, state = jax.block_until_ready(update(params, state, params))
        seconds.append(time.process_time() - start)
    return nbytes, float(np.median(seconds[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/optimizer_state"))
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    configs = {
        (state, b2): OptimConfig(lr=2e-3, warmup="5%", b2=b2, state_dtype=state)
        for b2 in BETAS
        for state in STATES
    }
    losses = {key: [] for key in configs}
    for seed in range(args.seeds):
        for key, optim in configs.items():
            losses[key].append(heldout_loss(args.out, optim=optim, seed=seed))
    table = []
    for (state, b2), optim in configs.items():
        nbytes, seconds = cost(optim)
        table.append(
            {"state_dtype": state, "b2": b2, "heldout_loss": losses[state, b2]}
            | {"bytes_per_parameter": nbytes, "update_cpu_seconds": seconds}
        )
        mean, shown = np.mean(losses[state, b2]), " ".join(f"{x:.4f}" for x in losses[state, b2])
        print(f"| {state} | {b2} | {mean:.4f} ({shown}) | {nbytes:.3f} | {seconds * 1e3:.0f} ms |")
    (args.out / "table.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
