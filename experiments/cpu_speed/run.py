"""Training steps on a CPU: ours, and transformers in torch, in turn, on the same work.

    python experiments/cpu_speed/run.py --rounds=3

Every run is a process of its own that first times its own engine's forward products alone, and then
whole steps. Read the CPU seconds where other work shares the cores; the share is of what the same
engine's products reach. Medians over the rounds. Both engines get huge pages from glibc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

PEER = str(Path(__file__).with_name("torch_step.py"))
OURS = [sys.executable, "-m", "easylm_jax.bench", "--json"]
COLUMNS = (
    *("step_ms_median", "cpu_s_step", "tokens_per_s", "peak_rss_mb"),
    *("matmul_peak_gflops_per_s", "share_of_matmul_peak", "load1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="small")
    parser.add_argument("--rounds", type=int, default=3)
    sizes = ("steps", "layers", "batch", "seq_len")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    same = [f"--{name}={getattr(options, name)}" for name in sizes if getattr(options, name)]
    runs = {
        f"{engine}, {dtype}": [*command, f"--work={options.work}", f"--dtype={dtype}", *same]
        for dtype in ("float32", "bfloat16")
        for engine, command in (("ours", OURS), ("torch", [sys.executable, PEER]))
    }
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for number in range(options.rounds):
        for name, command in runs.items():
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(number + 1, name, {c: found[name][-1][c] for c in COLUMNS}, flush=True)
    print("\n| medians | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for name, rounds in found.items():
        medians = [statistics.median(r[c] for r in rounds) for c in COLUMNS]
        print(
            f"| {name} | "
            + " | ".join(f"{m:,.3g}" if m < 1 else f"{m:,.1f}" for m in medians)
            + " |"
        )


if __name__ == "__main__":
    main()
