"""How far the planner's memory estimate lies from the compiler's figure and from a real process.

    python experiments/plan_accuracy/run.py pods     # the estimate beside `make plans`
    python experiments/plan_accuracy/run.py cpu      # beside XLA for this CPU, and measured peaks

Both print the tables of README.md. `pods` compiles nothing: it reads experiments/pod_plans.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from easylm_jax.config import from_config_dict
from easylm_jax.mesh import make_mesh, parse_mesh
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.planner import memory
from easylm_jax.planner.case import Case
from easylm_jax.planner.compiled import lower_step
from easylm_jax.planner.topology import parse_topology
from easylm_jax.train import TrainConfig

ROOT = Path(__file__).parents[2]
MIB, GIB = 2**20, 2**30
RUNS = (
    ("none", "float32"),
    ("full", "float32"),
    ("linear_outputs_and_attention", "float32"),
    ("full", "bfloat16"),
)
# What a process holds that does no more than import the package and run one addition.
BASE = (
    "import resource, jax; import easylm_jax.bench_train; jax.numpy.ones(3).sum();"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def pods() -> Iterator[str]:
    """A row for each shipped pod config that has been compiled."""
    spec = importlib.util.spec_from_file_location("pod", ROOT / "configs" / "llama_pod.py")
    pod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pod)
    yield "| config | compiler, GiB | estimate, GiB | error |"
    yield "|---|---|---|---|"
    for file in sorted((ROOT / "experiments" / "pod_plans").glob("*.json")):
        plan = json.loads(file.read_text())
        cfg = from_config_dict(TrainConfig, pod.get_config(file.stem))
        case = Case(
            *(cfg.model, cfg.optim, cfg.batch_size, cfg.seq_len, cfg.micro_batches, cfg.mesh)
        )
        sizes = parse_mesh(case.mesh, parse_topology(plan["topology"]).num_chips)
        estimate, compiled = memory.estimate(case, sizes).total, plan["peak_bytes_per_chip"]
        error = estimate / compiled - 1
        yield f"| {file.stem} | {compiled / GIB:.2f} | {estimate / GIB:.2f} | {error:+.1%} |"


def cpu(rows: int = 2, seq_len: int = 1024) -> Iterator[str]:
    """A row for each of RUNS: estimate, XLA, and the peak of a process above an idle one's."""
    base = int(subprocess.check_output([sys.executable, "-c", BASE], cwd=ROOT)) / 1024
    yield f"Base of the process, subtracted: {base:.0f} MiB."
    yield "| remat, type | estimate | XLA | measured above the base |"
    yield "|---|---|---|---|"
    for remat, dtype in RUNS:
        model = preset("small", remat=remat, dtype=dtype)
        case = Case(model, OptimConfig(), rows, seq_len, 1, "1,-1,1,1")
        mesh = make_mesh(case.mesh)
        estimate = memory.estimate(case, mesh.shape, on_cpu=True).total / MIB
        stats = lower_step(case, mesh).compile().memory_analysis()
        compiled = (stats.argument_size_in_bytes + stats.temp_size_in_bytes) / MIB
        command = [sys.executable, "-m", "easylm_jax.bench", "--work=small", "--steps=1", "--json"]
        command += [f"--remat={remat}", f"--dtype={dtype}", f"--batch={rows}", "--micro_batches=1"]
        ran = json.loads(subprocess.check_output(command, cwd=ROOT).splitlines()[-1])
        yield (
            f"| {remat}, {dtype} | {estimate:.0f} ({estimate / compiled - 1:+.0%}) | "
            f"{compiled:.0f} | {ran['peak_rss_mb'] - base:.0f} |"
        )


if __name__ == "__main__":
    for line in {"pods": pods, "cpu": cpu}[sys.argv[1]]():
        print(line, flush=True)
