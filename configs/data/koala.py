"""Koala's preparation of its data (Geng et al. 2023; young-geng/koala_data_pipeline), as settings.

Purpose:   clean, deduplicated, decontaminated conversations for configs/koala_*.py
Hardware:  any; a few MB/s on one core, and memory for the largest data set
Data:      yours to supply, as published, in FOLDER/<name>/ or FOLDER/*/<name>/, with <name> of the
           table below. ShareGPT as Koala had it was never released; use a copy of your own. The
           test prompts go to FOLDER/eval/<name>/. What is not there is named and left out.
Result:    Koala reported ShareGPT 60K -> 30K, HC3 87K answers, OIG 30K, Alpaca 52K, HH 160K pairs,
           WebGPT 20K comparisons, summaries 93K

    python -m easylm_jax.prepare --config=configs/data/koala.py:FOLDER --out=DIR
    ... --config.datasets.sharegpt.max_examples=10000 --config.validation_fraction=0.05

Differs from Koala: the split is by question, and repeated conversations are gone before it (Koala
repeated its identity answers five times and then split); a test prompt is found by 13 words in a
row, where Koala kept of its test set what had BLEU under 20% against its training data; near
duplicates go; the identity answers are left to you. PandaLM was not in Koala.
"""

from pathlib import Path

from easylm_jax.config import as_config_dict
from easylm_jax.prepare_chat import ChatPrepareConfig, DatasetConfig

# FILTER_KEYWORDS of process_chat_data.py.
KEYWORDS = (*("openai", "chatgpt", "gpt-3", "chadgpt", "gpt3", "chat-gpt", "open-ai", "open ai"),)
NEAR = 0.8  # similarity of words
# name: files of FOLDER/<name>/, settings. Koala filtered keywords in ShareGPT alone.
DATASETS = {
    "sharegpt": (
        "*.json*",
        dict(
            reader="sharegpt",
            web_pages=True,
            forbidden=KEYWORDS,
            keep_languages=("en",),
            min_characters=16,  # as Vicuna
            duplicates="question",  # as Koala
            near_duplicates=NEAR,
        ),
    ),
    "hc3": ("*.json*", dict(reader="hc3", near_duplicates=NEAR)),
    "oig": ("*.json*", dict(reader="oig", near_duplicates=NEAR)),
    "alpaca": ("alpaca*.json", dict(reader="alpaca", near_duplicates=NEAR)),
    # Comparisons of one question share much of their text: only what is wholly equal goes.
    "hh_rlhf": ("*.json*", dict(reader="hh")),
    "webgpt": ("*.json*", dict(reader="webgpt")),
    "summarize": ("*.json*", dict(reader="summarize")),
    "pandalm": ("testset*.json", dict(reader="pandalm")),
}
EVALUATIONS = {"koala": "koala_test_set.jsonl", "vicuna_bench": "question.jsonl"}


def get_config(folder: str = "PATH"):
    root = Path(folder)
    datasets = {
        name: DatasetConfig(files=(_glob(root, name, files),), **settings)
        for name, (files, settings) in DATASETS.items()
    }
    evaluations = {name: (str(root / "eval" / name / f),) for name, f in EVALUATIONS.items()}
    if folder != "PATH":
        datasets = {k: v for k, v in datasets.items() if _found(k, v.files[0])}
        evaluations = {k: v for k, v in evaluations.items() if _found(k, v[0])}
    return as_config_dict(
        ChatPrepareConfig(
            datasets=datasets,
            decontaminate=evaluations,
            on_bad_line="skip",  # the published files hold empty answers and broken dialogues
        )
    )


def _glob(root: Path, name: str, files: str) -> str:
    nested = not (root / name).is_dir() and any(root.glob(f"*/{name}/{files}"))
    return str(root / "*" / name / files if nested else root / name / files)


def _found(name: str, glob: str) -> bool:
    if found := any(Path("/").glob(str(Path(glob).absolute()).lstrip("/"))):
        return found
    print(f"{name}: left out, no file matches {glob}")
    return False
