"""Local files as lm-eval's own tasks want them: the hub's columns, and a task file that swaps data.

Each task file includes lm-eval's, so that prompts, choices, shots and metrics stay lm-eval's own.
The published files are read anew here, not by our reader, so that a fault in that one shows.
"""

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import lm_eval
import yaml

BUILT_IN = {  # in lm-eval's folder `tasks`
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "mmlu": "mmlu/default/mmlu_{group}.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


def write_task(task: str, counts: Mapping[str, int], data: Path, folder: Path) -> list[str]:
    """The files of `task` in `folder`, with the first `counts[group]` documents of each group.

    The names of the tasks are returned, one per group in the order of `counts`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for group, count in counts.items():
        name = f"local_{task}_{group}".rstrip("_")
        files = {"test": str(folder / f"{name}.jsonl")}
        _write_lines(files["test"], _docs(task, data, group)[:count])
        if task == "mmlu":
            files["dev"] = str(folder / f"{name}_dev.jsonl")
            _write_lines(files["dev"], _mmlu(data / "dev" / f"{group}_dev.csv"))
        included = Path(lm_eval.__file__).parent / "tasks" / BUILT_IN[task].format(group=group)
        swapped = {
            "include": str(included),
            "task": name,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(swapped, sort_keys=False))
        names.append(name)
    return names


def _docs(task: str, data: Path, group: str) -> list[dict]:
    if task == "piqa":
        labels = (data / "valid-labels.lst").read_text().split()
        docs = _lines(data / "valid.jsonl")
        return [doc | {"label": int(label)} for doc, label in zip(docs, labels, strict=True)]
    if task == "hellaswag":
        return _lines(next(data.glob("hellaswag_val*.jsonl")))
    if task == "winogrande":
        return [_winogrande(doc) for doc in _lines(data / "winogrande_schema_form.jsonl")]
    if task == "boolq":
        docs = _lines(data / "val.jsonl")
        return [doc | {"label": int(str(doc["label"]).lower() == "true")} for doc in docs]
    if task == "mmlu":
        return _mmlu(data / "test" / f"{group}_test.csv")
    pages = re.split(r"\n(?= = [^=\n]+ = \n)", (data / "test.txt").read_text())
    return [{"page": page} for page in pages if page.strip()]


def _winogrande(doc: dict) -> dict:
    """Two contexts and what follows, as the sentence with a blank and two options it came from."""
    before = os.path.commonprefix(doc["context_options"])
    options = [context[len(before) :] for context in doc["context_options"]]
    sentence = f"{before}_ {doc['continuation']}"
    return {
        "sentence": sentence,
        "option1": options[0],
        "option2": options[1],
        "answer": str(doc["gold"] + 1),
    }


def _mmlu(file: Path) -> list[dict]:
    with file.open(newline="") as rows:
        return [
            {"question": question, "choices": choices, "answer": "ABCD".index(letter)}
            for question, *choices, letter in csv.reader(rows)
        ]


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def _write_lines(file: str, docs: list[dict]) -> None:
    Path(file).write_text("".join(json.dumps(doc) + "\n" for doc in docs))
