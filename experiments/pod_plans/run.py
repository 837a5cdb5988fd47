"""Compile every config of configs/llama_pod.py for its topology, and hold it to the record here.

    make plans                                                       # all
    python experiments/pod_plans/run.py 65b_v5p_2048                 # some
    python experiments/pod_plans/run.py --update 65b_v5p_2048        # and write the record anew

Fails if a config no longer fits, or needs or sends other amounts than its record says.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import jax

from easylm_jax.config import from_config_dict
from easylm_jax.plan import as_json, as_text, case_of, make_plan
from easylm_jax.planner.topology import parse_topology
from easylm_jax.train import TrainConfig

HERE = Path(__file__).parent
TOLERANCE = 0.03  # of memory and of bytes sent, from release to release of our own code


def pod_configs():
    """The module configs/llama_pod.py."""
    path = HERE.parents[1] / "configs/llama_pod.py"
    spec = importlib.util.spec_from_file_location("llama_pod", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complaints(new: dict, old: dict | None) -> list[str]:
    """What is wrong with a plan, given the one on record."""
    if not new["fits"]:
        need, limit = (new[f"{k}_bytes_per_chip"] / 2**30 for k in ("peak", "hbm"))
        return [f"does not fit: {need:.2f} of {limit:.2f} GiB"]
    if old is None or old["stack"] != new["stack"]:
        return []  # another compiler: new records are due, and fitting is all that can be asked
    pairs = {"peak_bytes_per_chip": [plan["peak_bytes_per_chip"] for plan in (old, new)]}
    pairs["bytes sent"] = [sum(c["sent_bytes"] for c in plan["collectives"]) for plan in (old, new)]
    return [
        f"{name} moved by {b / a - 1:+.1%}, from {a:,} to {b:,}"
        for name, (a, b) in pairs.items()
        if abs(b / a - 1) > TOLERANCE
    ]


def main() -> None:
    pods = pod_configs()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(pods.PODS)}; default: all")
    parser.add_argument("--update", action="store_true", help="write the records anew")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    stack = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    failed = False
    for name in args.names or pods.PODS:
        case = case_of(from_config_dict(TrainConfig, pods.get_config(name)))
        plan = make_plan(case, parse_topology(pods.PODS[name].topology))
        print(f"---- {name} ----", as_text(plan), sep="\n", end="\n\n", flush=True)
        new = as_json(plan) | {"stack": stack}
        del new["compile_s"]  # of this machine
        record = HERE / f"{name}.json"
        old = json.loads(record.read_text()) if record.exists() else None
        wrong = complaints(new, None if args.update else old)
        for sentence in wrong:
            print(f"error: {name} {sentence}; --update accepts it", file=sys.stderr)
        if old is None or args.update:
            record.write_text(json.dumps(new, indent=1) + "\n")
        failed |= bool(wrong)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
