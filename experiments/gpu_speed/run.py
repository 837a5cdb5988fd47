"""Training steps on one GPU: ours, and transformers in torch, in turn, on the same work.

    python experiments/gpu_speed/run.py
    python experiments/gpu_speed/run.py --works=1b --profile=/tmp/profile

Every run is a process of its own. Printed: tokens/s, causal MFU by the data sheet, GPU memory.
A run that fails (no room, no kernel) says so in its row and the others go on. It works without a
GPU, for `--works=small --layers=1 --batch=4 --seq_len=16`, to see that it does.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PEER = str(Path(__file__).parents[1] / "cpu_speed" / "torch_step.py")
COLUMNS = ("tokens_per_s", "mfu", "step_ms_median", "device_memory_peak_gb")


def runs_of(work: str) -> dict[str, list[str]]:
    """Name -> command. torch in float32 with autocast, and all in bfloat16 as many users do."""
    ours = [sys.executable, "-m", "easylm_jax.bench", f"--work={work}", "--json"]
    peer = [sys.executable, PEER, f"--work={work}", "--compile"]
    mixed = [*peer, "--state_dtype=float32"] + ["--checkpointing"] * (work == "7b")
    return {
        "ours": ours,
        "ours, everything recomputed": [*ours, "--remat=full"],
        "torch, compiled, sdpa, autocast": mixed,
        "torch, compiled, sdpa, all bfloat16": [*peer, "--state_dtype=bfloat16"],
    }


def measure(command: list[str]) -> dict[str, str | int | float]:
    """What the last line of a run says, or {"error": ...}."""
    room = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}  # jax takes 0.75 by itself
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | room)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
        return {"error": (said or ["exit status " + str(done.returncode)])[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def row(name: str, found: dict[str, str | int | float]) -> str:
    if "error" in found:
        return f"| {name} | {found['error']} |" + " |" * (len(COLUMNS) - 1)
    return f"| {name} | " + " | ".join(str(found.get(c, "")) for c in COLUMNS) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", default="1b,7b")
    parser.add_argument("--profile", help="folder: one step of ours is profiled and divided up")
    parser.add_argument("--json", help="file for everything that was found")
    sizes = ("steps", "layers", "batch", "seq_len")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    same = [f"--{name}={getattr(options, name)}" for name in sizes if getattr(options, name)]
    everything = {}
    for work in options.works.split(","):
        print(f"\n| {work} | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
        for name, command in runs_of(work).items():
            profile = options.profile if name == "ours" else None
            found = measure(command + same + [f"--profile={profile}/{work}"] * bool(profile))
            everything[f"{work}: {name}"] = found
            print(row(name, found), flush=True)
        for kind, share in everything[f"{work}: ours"].get("breakdown", {}).items():
            print(f"{share:8.1%}  {kind}")
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
