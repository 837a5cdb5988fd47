"""Items per second of our evaluation and of lm-eval on transformers, in turn, on the same items.

    python experiments/eval_speed/run.py MODEL.gguf --data=DIR --items=40 --rounds=3

Each system is a process of its own that loads its model once and then waits for orders; while one
works the other sleeps. Every task is given to each in turn, `rounds` times over, as the same pairs
of texts, tokenising included. Start-up and loading are not counted. Round 1 stands apart: there our
side compiles. transformers has two threads and its fastest batch size of those in `--batch_sizes`
("auto" is lm-eval's own search, which takes minutes on a CPU).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TASKS = ("hellaswag", "piqa", "mmlu", "boolq", "winogrande")
THREADS = 2


# ---- the two systems, each in a process of its own ----------------------------------------------


def ours(options: argparse.Namespace):
    """(task name, batch size) -> the work to be timed; the batch size is our own."""
    import easylm_jax as el
    from easylm_jax.evals import choice

    lm = el.load(options.model)

    def run(name: str, batch_size: str) -> Callable[[], list[float]]:
        del batch_size
        task, items = items_of(name, options)
        return lambda: [p for r in choice.ask(lm, task, items) for p in r["log_probs"]]

    return run


def transformers(options: argparse.Namespace):
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(THREADS)
    model = HFLM(options.hf_model, dtype="float32", device="cpu")

    def run(name: str, batch_size: str) -> Callable[[], list[float]]:
        _, items = items_of(name, options)
        pairs = [pair for item in items for pair in item.pairs]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        model.batch_size_per_gpu = batch_size if batch_size == "auto" else int(batch_size)
        return lambda: [p for p, _ in model.loglikelihood(asked, disable_tqdm=True)]

    return run


def items_of(name: str, options: argparse.Namespace):
    from easylm_jax.evals.task import find_task, make_items

    task = find_task(name)
    return task, make_items(task, options.data)[: options.items]  # of MMLU a subject, as it comes


def serve(options: argparse.Namespace) -> None:
    """Orders from standard input, one line of JSON each; answers to what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    run = {"ours": ours, "transformers": transformers}[options.system](options)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        work = run(**json.loads(line))
        start = time.perf_counter()
        log_probs = work()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "log_probs": log_probs}), file=answers, flush=True)


# ---- who gives the orders -----------------------------------------------------------------------


class Worker:
    """A process that runs one system."""

    def __init__(self, system: str, options: argparse.Namespace, log: Path) -> None:
        command = [
            sys.executable,
            *sys.argv,
            f"--system={system}",
            f"--hf_model={options.hf_model}",
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, stderr=log.open("w"), **pipes)
        assert json.loads(self._process.stdout.readline()) == "ready", f"see {log}"

    def run(self, name: str, batch_size: str = "") -> dict:
        order = json.dumps({"name": name, "batch_size": batch_size})
        print(order, file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def measure(options: argparse.Namespace, logs: Path) -> list[dict]:
    """A row for every task."""
    workers = {s: Worker(s, options, logs / f"{s}.log") for s in ("ours", "transformers")}
    best = {}
    for name in options.tasks:
        seconds = {b: workers["transformers"].run(name, b)["seconds"] for b in options.batch_sizes}
        best[name] = min(seconds, key=seconds.__getitem__)
        print(f"{name}: transformers takes {show(seconds)} s", flush=True)
    took = {name: {s: [] for s in workers} for name in options.tasks}
    furthest = dict.fromkeys(options.tasks, 0.0)
    for _ in range(options.rounds):
        for name in options.tasks:
            made = {s: worker.run(name, best[name]) for s, worker in workers.items()}
            for system, one in made.items():
                took[name][system].append(one["seconds"])
            both = zip(*(one["log_probs"] for one in made.values()), strict=True)
            furthest[name] = max(furthest[name], *(abs(a - b) for a, b in both))
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    for worker in workers.values():
        worker.end()
    return [row(name, took[name], best[name], furthest[name], options) for name in options.tasks]


def row(name: str, took: dict, batch_size: str, furthest: float, options) -> dict:
    """Items per second, in the first round and in the median of the later ones."""
    _, items = items_of(name, options)
    found = {"task": name, "items": len(items), "hf_batch_size": batch_size}
    for part, rounds in (("first", slice(0, 1)), ("later", slice(1, None))):
        ratios = [b / a for a, b in zip(*(took[s][rounds] for s in took), strict=True)]
        found[part] = {s: len(items) / statistics.median(took[s][rounds]) for s in took}
        found[part] |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return found | {"largest_difference": furthest}


def show(seconds: dict[str, float]) -> str:
    return ", ".join(f"{value:.1f} (batch {key})" for key, value in seconds.items())


def print_table(rows: list[dict]) -> None:
    print("| items/s | ours | transformers | ratio | ours, round 1 | ratio |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        first, later = r["first"], r["later"]
        print(
            f"| {r['task']} | {later['ours']:.2f} | {later['transformers']:.2f} (batch "
            f"{r['hf_batch_size']}) | {later['ratio']:.2f} ({min(later['ratios']):.2f} to "
            f"{max(later['ratios']):.2f}) | {first['ours']:.2f} | {first['ratio']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3, help="at least 2")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument(
        "--batch_sizes", type=lambda text: text.split(","), default=["8", "16", "32"]
    )
    parser.add_argument("--hf_model", help="the model in Hugging Face's format, if it is there")
    parser.add_argument("--out", help="a JSON file for the numbers")
    parser.add_argument("--system", choices=("ours", "transformers"), help="used by the program")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.system:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        if not options.hf_model:
            options.hf_model = f"{folder}/model"
            converted = [f"--from={options.model}", f"--to={options.hf_model}", "--format=hf"]
            subprocess.run([sys.executable, "-m", "easylm_jax.convert", *converted], check=True)
        rows = measure(options, Path(folder))
    print_table(rows)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
