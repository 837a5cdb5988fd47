"""Our runner, lm-eval on our model and lm-eval on transformers: the same items, one by one.

    python experiments/eval_parity/parity.py MODEL.gguf --data=DIR --out=DIR --limit=20
    python experiments/eval_parity/parity.py MODEL.gguf --data=DIR --out=DIR

The DIR of `--data` has a folder per task as `evaluate` wants it, that of `--out` gets a file per
system and task. What is there already is not run again: the command can be repeated after a break.
Everything is float32 and offline. Printed are the accuracies, the items whose verdicts differ, and
the largest difference of log-likelihood per token from the last of `--systems`. transformers takes
longest: the whole sets with `--systems=ours,adapter`, a part of each (`--limit`) with all three.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SYSTEMS = ("ours", "adapter", "hf")
SIZES = {"piqa": None, "hellaswag": 1000, "winogrande": None, "boolq": None, "mmlu": 500}
SIZES |= {"wikitext": 20}  # articles
FOLDERS = {"wikitext": "wikitext2"}  # under --data
METRICS = ("acc", "acc_norm")
TOKENS_PER_SECOND = 800  # of SmolLM2-135M in float32 on two cores
TOLERANCE = 1e-4  # nats per token


def items_of(name: str, options: argparse.Namespace):
    from easylm_jax.evals.task import find_task, make_items

    limit = min(filter(None, (SIZES[name], options.limit)), default=None)
    task = find_task(name)
    return task, make_items(task, options.data, limit=limit)


def requests_of(item) -> list[list[str]]:
    return [list(pair) for pair in item.pairs] or [[item.prompt]]


# ---- the systems --------------------------------------------------------------------------------


def run_ours(options: argparse.Namespace):
    """task name -> records"""
    import easylm_jax as el
    from easylm_jax.evals import choice, rolling

    lm = el.load(options.model)

    def run(name: str) -> list[dict]:
        task, items = items_of(name, options)
        kind = rolling if task.kind == "text" else choice
        records = []
        for item, response in zip(items, kind.ask(lm, task, items), strict=True):
            scores = kind.score(task, item, response)
            records.append(
                {
                    "requests": requests_of(item),
                    "log_probs": response.get("log_probs") or [response["log_prob"]],
                    "scores": {m: scores[m][0] for m in METRICS if m in scores},
                }
            )
        return records

    return run


def run_lm_eval(options: argparse.Namespace, system: str):
    """task name -> records, in the order of our items"""
    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval_files import write_task

    model = adapter_model(options) if system == "adapter" else transformers_model(options)

    def run(name: str) -> list[dict]:
        task, items = items_of(name, options)
        counts = collections.Counter(item.group for item in items)  # in order
        folder = Path(options.out, "lm_eval", name)
        data = Path(options.data, FOLDERS.get(name, name))
        names = write_task(name, counts, data, folder)
        if system == "hf":  # logits of 8,192 tokens take 1.6 GB
            model.batch_size_per_gpu = 1 if name == "wikitext" else options.batch_size
        found = lm_eval.simple_evaluate(
            model,
            tasks=names,
            num_fewshot=task.shots or None,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
        )
        return [record_of(s) for name in names for s in in_order(found["samples"][name])]

    return run


def in_order(samples: list[dict]) -> list[dict]:
    return sorted(samples, key=lambda sample: sample["doc_id"])


def record_of(sample: dict) -> dict:
    answers = [answers[0] for answers in sample["resps"]]  # each request is asked once
    return {
        "requests": [list(arguments) for arguments in sample["arguments"]],
        "log_probs": [a[0] if isinstance(a, list | tuple) else a for a in answers],
        "scores": {m: sample[m] for m in METRICS if m in sample},
    }


def adapter_model(options: argparse.Namespace):
    from easylm_jax.lm_eval_adapter import HarnessModel

    return HarnessModel(options.model)


def transformers_model(options: argparse.Namespace):
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(2)
    folder = str(Path(options.out, "hf_model"))
    if not Path(folder).exists():
        converted = [f"--from={options.model}", f"--to={folder}", "--format=hf"]
        subprocess.run([sys.executable, "-m", "easylm_jax.convert", *converted], check=True)
    return HFLM(folder, dtype="float32", device="cpu", batch_size=options.batch_size)


def work(options: argparse.Namespace) -> None:
    """Run one system on every task that has no result yet."""
    run = None
    for name in options.tasks:
        file = result_file(options, options.system, name)
        if file.exists():
            continue
        run = run or (
            run_ours(options) if options.system == "ours" else run_lm_eval(options, options.system)
        )
        start = time.perf_counter()
        records = run(name)
        seconds = time.perf_counter() - start
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps({"seconds": seconds, "records": records}))
        partial.replace(file)
        print(f"{options.system} {name}: {len(records)} items in {seconds:.0f} s", flush=True)


def result_file(options: argparse.Namespace, system: str, name: str) -> Path:
    return Path(options.out, f"limit_{options.limit or 'none'}", system, f"{name}.json")


# ---- comparison ---------------------------------------------------------------------------------


def compare(name: str, options: argparse.Namespace, count_tokens) -> dict:
    """The row of a task; items that differ are printed."""
    systems = options.systems
    found = {s: json.loads(result_file(options, s, name).read_text()) for s in systems}
    row = {"task": name, "seconds": {s: round(found[s]["seconds"], 1) for s in systems}}
    records = {s: found[s]["records"] for s in systems}
    sizes = {s: len(records[s]) for s in systems}
    assert len(set(sizes.values())) == 1, f"{name}: not the same items, {sizes}"
    row |= {"items": sizes[systems[0]], "other_requests": 0, "other_verdicts": 0}
    worst = dict.fromkeys(systems[:-1], 0.0)
    for place, same in enumerate(zip(*(records[s] for s in systems), strict=True)):
        last = same[-1]
        if any(record["requests"] != last["requests"] for record in same):
            row["other_requests"] += 1
            print(f"{name} {place}: requests differ:", *(x["requests"] for x in same), sep="\n  ")
            continue
        tokens = [count_tokens(request) for request in last["requests"]]
        for system, record in zip(systems[:-1], same, strict=False):
            pairs = zip(record["log_probs"], last["log_probs"], tokens, strict=True)
            worst[system] = max(worst[system], *(abs(a - b) / n for a, b, n in pairs))
        if any(record["scores"] != last["scores"] for record in same):
            row["other_verdicts"] += 1
            print(f"{name} {place}: verdicts differ")
            for system, record in zip(systems, same, strict=True):
                print(f"  {system:8}{record['scores']} {record['log_probs']}")
    row |= {f"nats_per_token_from_{systems[-1]}": worst}
    row |= {"means": {s: means(records[s]) for s in systems}}
    row["passed"] = max(worst.values()) <= TOLERANCE and not (
        row["other_requests"] or row["other_verdicts"]
    )
    return row


def means(records: list[dict]) -> dict[str, float]:
    """Of every metric; of texts the log-likelihood."""
    names = records[0]["scores"].keys()
    if not names:
        return {"log_prob": sum(record["log_probs"][0] for record in records)}
    return {m: sum(record["scores"][m] for record in records) / len(records) for m in names}


def token_counter(options: argparse.Namespace):
    """Tokens of a request's continuation, by lm-eval's rule."""
    from easylm_jax.loading import find_tokenizer

    encode = find_tokenizer(options.model).encode

    def count(request: list[str]) -> int:
        *context, continuation = request
        before = "".join(context)
        return len(encode(before + continuation)) - len(encode(before.rstrip()))

    return count


def expected_minutes(options: argparse.Namespace, count_tokens) -> float:
    """Of one system that reads every request whole."""
    total = 0
    for name in options.tasks:
        _, items = items_of(name, options)
        total += sum(count_tokens(["".join(r)]) for item in items for r in requests_of(item))
    return total / TOKENS_PER_SECOND / 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--limit", type=int, default=0, help="items per task; 0: as in the README")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--batch_size", type=int, default=8, help="of transformers")
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--system", choices=SYSTEMS, help="run this one only, compare nothing")
    options = parser.parse_args()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= offline | {"HF_HOME": str(Path(options.out, "hf_home").absolute())}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if options.system:
        return work(options)
    count_tokens = token_counter(options)
    minutes = expected_minutes(options, count_tokens)
    print(
        f"expected: at most {minutes:.1f} min for each of {len(options.systems)} systems",
        flush=True,
    )
    for system in options.systems:
        subprocess.run([sys.executable, *sys.argv, f"--system={system}"], check=True)
    rows = [compare(name, options, count_tokens) for name in options.tasks]
    result_file(options, "", "table").write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
