"""Decontamination: training conversations that hold the prompt of an evaluation set are dropped.

A prompt is found by any of its runs of n words (13 as for GPT-3) in any turn, whatever the case,
punctuation and white space. A prompt of fewer words must be the whole of a turn. A paraphrase is
not found. Called by `prepare_chat.py`.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from easylm_jax.data.cleaning import Group
from easylm_jax.data.conversation import Conversation, message_text
from easylm_jax.data.documents import match_files
from easylm_jax.data.readers import read_records

WORD = re.compile(r"\w+")
# How evaluation sets call the question; the first of these that a line has is taken.
PROMPT_FIELDS = ("prompt", "question", "instruction", "turns", "text", "query")
INPUT_FIELD = "input"  # belongs to an instruction
ID_FIELDS = ("id", "question_id", "task_id")


@dataclasses.dataclass(frozen=True)
class PromptIndex:
    """Where the words of all evaluation prompts are; a prompt is (evaluation set, its id)."""

    ngram: int
    runs: Mapping[tuple[str, ...], tuple[tuple[str, str], ...]]  # n words -> prompts
    ends: frozenset[tuple[str, str]]  # first and last word of every run
    short: Mapping[tuple[str, ...], tuple[tuple[str, str], ...]]  # prompts of fewer words


def drop_contaminated(
    groups: Iterable[Group],
    counts: Counter[str],
    *,
    index: PromptIndex,
    hits: dict[str, dict[str, list[str]]],
) -> Iterator[Group]:
    """Drop groups that hold an evaluation prompt.

    `hits` gains, by evaluation set and prompt, the ids of the conversations that were dropped.
    """
    for group in groups:
        found = {c.id: prompts for c in group if (prompts := _prompts_in(c, index))}
        for name, prompt in sorted(set().union(*found.values())):
            ids = [id for id, prompts in found.items() if (name, prompt) in prompts]
            hits.setdefault(name, {}).setdefault(prompt, []).extend(ids)
        if found:
            names = sorted({name for prompts in found.values() for name, _ in prompts})
            counts[f"prompt of {', '.join(names)}"] += len(group)
        else:
            yield group


def _prompts_in(conversation: Conversation, index: PromptIndex) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for message in conversation.messages:
        words = WORD.findall(message_text(message).casefold())
        if len(words) < index.ngram:
            found.update(index.short.get(tuple(words), ()))
        # Nearly all texts end here, and it is one pass without a loop in Python.
        elif not index.ends.isdisjoint(zip(words, words[index.ngram - 1 :], strict=False)):
            for run in _runs(words, index.ngram):
                found.update(index.runs.get(run, ()))
    return found


def index_prompts(prompts: Mapping[str, Mapping[str, Sequence[str]]], *, ngram: int) -> PromptIndex:
    """Of evaluation set -> id -> the prompt's texts (its turns), as `read_prompts` gives them."""
    runs, short = defaultdict(dict), defaultdict(dict)  # dicts as ordered sets
    for name, by_id in prompts.items():
        for prompt, texts in by_id.items():
            for text in texts:
                words = WORD.findall(text.casefold())
                for run in _runs(words, ngram):
                    runs[run][name, prompt] = None
                if 0 < len(words) < ngram:
                    short[tuple(words)][name, prompt] = None
    return PromptIndex(
        ngram=ngram,
        runs={run: tuple(owners) for run, owners in runs.items()},
        ends=frozenset((run[0], run[-1]) for run in runs),
        short={words: tuple(owners) for words, owners in short.items()},
    )


def _runs(words: Sequence[str], ngram: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(ngram)), strict=False)


def read_prompts(paths: Sequence[str]) -> dict[str, list[str]]:
    """Prompts by id, of JSON or JSONL with one of PROMPT_FIELDS; any other file is one prompt."""
    prompts: dict[str, list[str]] = {}
    for file in match_files(paths):
        if ".json" not in file.name:
            prompts[file.name] = [file.read_text()]
            continue
        for where, fields in read_records([str(file)], counts=Counter()):
            name, texts = _prompt(fields, where)
            prompts.setdefault(name, []).extend(texts)
    return prompts


def _prompt(fields: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """Its id and its texts: the turns, or a question with the input that belongs to it."""
    found = next((name for name in PROMPT_FIELDS if name in fields), None)
    if found is None:
        raise ValueError(
            f"{where} has none of the fields {', '.join(PROMPT_FIELDS)}: name only files of "
            "evaluation prompts in decontaminate"
        )
    value = fields[found]
    texts = value if isinstance(value, list) else [f"{value}\n{fields.get(INPUT_FIELD) or ''}"]
    return str(next((fields[key] for key in ID_FIELDS if key in fields), where)), texts
