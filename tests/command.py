"""Runs `python -m easylm_jax.train` as a user does, with configs/debug.py made tiny. Not a test."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from easylm_jax.tree import named_leaves

ROOT = Path(__file__).parents[1]
TIMEOUT = 240  # seconds, of every process
SMALL = (
    *("--config.seq_len=32", "--config.duration=8 steps", "--config.optim.warmup=2 steps"),
    *("--config.checkpoint.every=4 steps", "--config.eval.every=4 steps", "--config.log_every=1"),
    *("--config.eval.max_batches=1", "--config.eval.prompts=()", "--config.model.d_ff=64"),
    *("--config.model.residual_dropout=(0.1,0.1)", "--config.model.attention.block_q=16"),
)


def write_text(folder: Path) -> str:
    rng = random.Random(0)
    lines = ("".join(rng.choices("abcdefgh ", k=rng.randint(5, 60))) for _ in range(200))
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def from_files(text: str) -> tuple[str, str]:
    return (f"--config.data.files=('{text}',)", f"--config.data.heldout_files=('{text}',)")


def start(
    *arguments: str,
    devices: int = 1,
    cache: Path,
    program: tuple[str, ...] = ("-m", "easylm_jax.train"),
    **popen,
) -> subprocess.Popen:
    """`cache` keeps compiled programs, so that only the first start is slow."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, *program, *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **(pipes | popen))


def finish(process: subprocess.Popen, *, status: int = 0) -> tuple[str, str]:
    """What it wrote to stdout and stderr."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {TIMEOUT} s:\n{out}\n{err}") from None
    assert process.returncode == status, f"status {process.returncode}:\n{out}\n{err}"
    return out, err


def small(workdir: Path, *arguments: str) -> tuple[str, ...]:
    return ("--config=configs/debug.py", f"--workdir={workdir}", *SMALL, *arguments)


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Read by Orbax alone, not by the code under test."""
    path, orbax = workdir / "checkpoints" / f"{step:08d}", ocp.PyTreeCheckpointer()
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
    how = jax.tree.map(lambda _: as_numpy, orbax.metadata(path).item_metadata.tree)
    return named_leaves(orbax.restore(path, restore_args=how))


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Of the parameters, relative to the largest entry of each."""
    names = [name for name in b if name.startswith("params")]
    assert names
    return max(np.abs(a[n] - b[n]).max() / np.abs(b[n]).max() for n in names)
