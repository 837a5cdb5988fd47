"""Koala's preparation of its data (Geng et al. 2023; young-geng/koala_data_pipeline), as settings.

Purpose:   clean, deduplicated, decontaminated conversations for configs/koala_*.py
Hardware:  any; a few MB/s on one core, and memory for the largest data set
Data:      yours to supply, as published, in FOLDER/<name>/ or FOLDER/*/<name>/, with the names of
           the table below: hc3/ is read twice, for the answers of humans and of ChatGPT. Of HH as
           published, in the folders harmless-base/ and helpful-*/ of hh_rlhf/, train.jsonl.gz alone
           is read, so that test.jsonl.gz stays unseen; files right in hh_rlhf/ are read whatever
           their names. ShareGPT as Koala had it was never released; use a copy of your own. The
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

from collections.abc import Sequence
from pathlib import Path

from easylm_jax.config import as_config_dict
from easylm_jax.prepare_chat import ChatPrepareConfig, DatasetConfig

# FILTER_KEYWORDS of process_chat_data.py.
KEYWORDS = (*("openai", "chatgpt", "gpt-3", "chadgpt", "gpt3", "chat-gpt", "open-ai", "open ai"),)
NEAR = 0.8  # similarity of words
# name: files in FOLDER, settings. Koala filtered keywords in ShareGPT alone.
DATASETS = {
    "sharegpt": (
        ("sharegpt/*.json*",),
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
    "hc3_human": (("hc3/*.json*",), dict(reader="hc3_human", near_duplicates=NEAR)),
    "hc3_chatgpt": (("hc3/*.json*",), dict(reader="hc3_chatgpt", near_duplicates=NEAR)),
    "oig": (("oig/*.json*",), dict(reader="oig", near_duplicates=NEAR)),
    "alpaca": (("alpaca/alpaca*.json",), dict(reader="alpaca", near_duplicates=NEAR)),
    # Comparisons of one question share much of their text: only what is wholly equal goes.
    "hh_rlhf": (
        (
            "hh_rlhf/*.json*",
            "hh_rlhf/harmless-base/train.json*",
            "hh_rlhf/helpful-*/train.json*",
        ),
        dict(reader="hh"),
    ),
    "webgpt": (("webgpt/*.json*",), dict(reader="webgpt")),
    "summarize": (("summarize/*.json*",), dict(reader="summarize")),
    "pandalm": (("pandalm/testset*.json",), dict(reader="pandalm")),
}
EVALUATIONS = {
    "koala": "eval/koala/koala_test_set.jsonl",
    "vicuna_bench": "eval/vicuna_bench/question.jsonl",
}


def get_config(folder: str = "PATH"):
    datasets = {
        name: DatasetConfig(files=files, **settings)
        for name, (globs, settings) in DATASETS.items()
        if (files := _files(folder, name, globs))
    }
    evaluations = {
        name: files
        for name, file in EVALUATIONS.items()
        if (files := _files(folder, name, (file,)))
    }
    return as_config_dict(
        ChatPrepareConfig(
            datasets=datasets,
            decontaminate=evaluations,
            on_bad_line="skip",  # the published files hold empty answers and broken dialogues
        )
    )


def _files(folder: str, name: str, globs: Sequence[str]) -> tuple[str, ...]:
    """Those of the globs that match in FOLDER, else in FOLDER/*; all of them without a folder."""
    root = Path(folder)
    if folder == "PATH":
        return tuple(str(root / glob) for glob in globs)
    for within in ("", "*/"):
        if found := tuple(str(root / within / g) for g in globs if any(root.glob(within + g))):
            return found
    print(f"{name}: left out, no file matches {root / globs[0]}")
    return ()
