"""Kills a training run with `kill -9` again and again; does it end like one that never died?

    python experiments/kill_resume/run.py --kills=10 --data=files     (or --data=root)

A run of configs/debug.py with dropout is started, killed at a random moment, and started again with
the same command, until it is finished. Its last checkpoint (parameters, optimiser state, keys, data
position) and its logged values are then compared with those of an undisturbed run, bit for bit.
One kill in three comes while a checkpoint is being written, one during an evaluation, one at any
time after the start. Prints one JSON object; the exit status is 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from easylm_jax.prepare import PrepareConfig, prepare

ROOT = Path(__file__).parents[2]
STEPS, SAVE_EVERY, EVAL_EVERY, LOG_EVERY = 60, 5, 10, 1
MOMENTS = ("any time", "saving", "evaluation")
TIMEOUT = 300  # seconds, of one start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--data", choices=("files", "root"), default="files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="kill_resume_") as folder:
        result = run(Path(folder), args.kills, args.data, rng)
    print(json.dumps(result, indent=1))
    sys.exit(not (result["same_state"] and result["same_metrics"] and result["same_samples"]))


def run(folder: Path, kills: int, data: str, rng: random.Random) -> dict:
    """Both runs in `folder`, and what came out."""
    started = time.monotonic()
    settings = data_settings(folder, data, rng)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    wait(start(undisturbed, settings, folder))
    moments = Counter()
    steps_at_kill = []
    while sum(moments.values()) < kills:
        moment = MOMENTS[sum(moments.values()) % len(MOMENTS)]
        process = start(killed, settings, folder)
        if not kill_at(moment, process, killed, rng):
            raise RuntimeError(f"the run ended after {dict(moments)}: too fast to be killed again")
        moments[moment] += 1
        steps_at_kill.append(max((row["step"] for row in rows(killed, "metrics")), default=-1))
    wait(start(killed, settings, folder))
    arrays = [final_arrays(workdir) for workdir in (undisturbed, killed)]
    return {
        "data": data,
        "kills": dict(moments),
        "logged_step_at_kill": steps_at_kill,
        "arrays": len(arrays[0]),
        "same_state": same(*arrays),
        "same_metrics": logged(undisturbed, "metrics") == logged(killed, "metrics"),
        "same_samples": logged(undisturbed, "samples") == logged(killed, "samples"),
        "rows": len(rows(killed, "metrics")),
        "seconds": round(time.monotonic() - started),
    }


# ---- starting and killing ----


def data_settings(folder: Path, data: str, rng: random.Random) -> list[str]:
    """Writes random text and, for `root`, prepares it."""
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(200)]
    lines = [json.dumps({"text": " ".join(rng.choices(words, k=20))}) for _ in range(300)]
    text = folder / "text.jsonl"
    text.write_text("\n".join(lines) + "\n")
    if data == "files":
        return [f"--config.data.files=('{text}',)", f"--config.data.heldout_files=('{text}',)"]
    config = PrepareConfig({"a": (str(text),)}, tokenizer="bytes", validation_fraction=0.3)
    prepare(config, str(folder / "data"))
    nothing = ["--config.data.files=()", "--config.data.heldout_files=()"]
    return [*nothing, f"--config.data.root={folder / 'data'}"]


def start(workdir: Path, settings: list[str], folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "easylm_jax.train", "--config=configs/debug.py"]
    command += [f"--workdir={workdir}", f"--config.duration={STEPS} steps", *settings]
    command += [f"--config.checkpoint.every={SAVE_EVERY} steps", "--config.seq_len=64"]
    command += [f"--config.eval.every={EVAL_EVERY} steps", f"--config.log_every={LOG_EVERY}"]
    command += ["--config.eval.max_batches=4", "--config.eval.sample_tokens=8"]
    command += ["--config.model.residual_dropout=(0.1,0.1)", "--config.optim.schedule=wsd"]
    fast = {  # the same program at every start, compiled once
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    log = open(folder / f"{workdir.name}.log", "a")
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | fast, stdout=log, stderr=subprocess.STDOUT
    )


def wait(process: subprocess.Popen) -> None:
    if status := process.wait(timeout=TIMEOUT):
        raise RuntimeError(f"{' '.join(process.args)} ended with status {status}")


def kill_at(moment: str, process: subprocess.Popen, workdir: Path, rng: random.Random) -> bool:
    """False when the run was over before its moment came."""
    before = {"saving": unfinished(workdir), "evaluation": evaluations_begun(workdir)}
    starts = workdir / "starts.jsonl"
    num_starts = len(starts.read_text()) if starts.exists() else 0
    is_running = lambda: starts.exists() and len(starts.read_text()) > num_starts  # noqa: E731
    due: dict[str, Callable[[], bool]] = {
        "any time": is_running,
        "saving": lambda: bool(unfinished(workdir) - before["saving"]),
        "evaluation": lambda: bool(evaluations_begun(workdir) - before["evaluation"]),
    }
    deadline = time.monotonic() + TIMEOUT
    while not due[moment]():
        if process.poll() is not None:
            return False
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"nothing happened for {TIMEOUT} s")
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 4.0 if moment == "any time" else 0.03))
    process.kill()
    return process.wait() == -9


def unfinished(workdir: Path) -> set[tuple]:
    """Checkpoints that are being written; their time tells a new one from one left by a kill."""
    found = set()
    for path in (workdir / "checkpoints").glob("*-tmp"):
        try:
            found.add((path.name, path.stat().st_ino))
        except FileNotFoundError:  # it has been renamed
            continue
    return found


def evaluations_begun(workdir: Path) -> set[tuple]:
    """An evaluation follows the training row of its step."""
    return {
        (row["step"], row["time"])
        for row in rows(workdir, "metrics")
        if "train/loss" in row and row["step"] % EVAL_EVERY == 0
    }


# ---- comparing ----


def rows(workdir: Path, name: str) -> list[dict]:
    path = workdir / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def logged(workdir: Path, name: str) -> list[dict]:
    """What was logged, without what is measured by the clock."""
    return [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
        for row in rows(workdir, name)
    ]


def final_arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Read by Orbax alone, not by the code under test."""
    tree = ocp.PyTreeCheckpointer().restore(workdir / "checkpoints" / f"{STEPS:08d}")
    arrays = {}
    stack = [("", tree)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, dict):
            stack += [(f"{name}/{key}", inner) for key, inner in value.items()]
        else:
            arrays[name] = np.asarray(value)
    side = json.loads((workdir / "checkpoints" / f"{STEPS:08d}" / "commit.json").read_text())
    return arrays | {"side": np.array(json.dumps(side["side"], sort_keys=True))}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


if __name__ == "__main__":
    main()
