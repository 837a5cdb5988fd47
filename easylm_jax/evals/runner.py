"""Run the items of a task through a model, a chunk at a time, for evaluate.py and for training.

A chunk's samples are handed over as soon as they are there, so that a run that was killed can go
on where it was. What it is not: a task (`task.py`), or a summary of samples (`results.py`).
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from easylm_jax.evals import answers, chat_answers, choice, code, rolling
from easylm_jax.evals.task import Item, Task
from easylm_jax.language_model import LanguageModel

Sample = dict[str, Any]  # what was asked, what came, and its scores; as JSON, see `sample_of`


class Kind(Protocol):
    """A way of asking. Responses are JSON, so that they can be kept and scored again."""

    def ask(
        self,
        lm: LanguageModel,
        task: Task,
        items: Sequence[Item],
        *,
        on_done: Callable[[int], None] | None = None,
    ) -> list[dict[str, Any]]: ...

    def score(
        self, task: Task, item: Item, response: Mapping[str, Any]
    ) -> dict[str, tuple[float, float]]: ...


KINDS: dict[str, Kind] = {
    "choice": choice,
    "generate": answers,
    "code": code,
    "text": rolling,
    "chat": chat_answers,
}
# Large enough to find rows of one length and prompts that begin alike, small enough to lose.
CHUNK = {"choice": 128, "generate": 32, "code": 8, "text": 16, "chat": 16}


def run_items(
    lm: LanguageModel, task: Task, items: Sequence[Item], *, allow_code_execution: bool = False
) -> Iterator[list[Sample]]:
    """The samples of all items, a chunk at a time, in the order that is quickest."""
    kind = KINDS[task.kind]
    permission = {"allow_code_execution": allow_code_execution} if kind is code else {}
    for chunk in _chunks(items, CHUNK[task.kind]):
        responses = kind.ask(lm, task, chunk, **permission)
        yield [
            sample_of(item, response, kind.score(task, item, response))
            for item, response in zip(chunk, responses, strict=True)
        ]


def still_asked(known: Iterable[Sample], items: Sequence[Item]) -> list[Sample]:
    """Those of an earlier start's samples that answer what is asked now."""
    hashes = {item.id: prompt_hash(item) for item in items}
    return [sample for sample in known if hashes.get(sample["id"]) == sample["prompt_hash"]]


def sample_of(
    item: Item, response: Mapping[str, Any], scores: Mapping[str, tuple[float, float]]
) -> Sample:
    """The record of one item. A prompt that all its pairs share stands there once."""
    request: dict[str, Any] = {"prompt": item.prompt} if item.prompt else {}
    if item.turns:
        request["turns"] = list(item.turns)
    if item.pairs:
        contexts = {context for context, _ in item.pairs}
        if len(contexts) == 1:
            request["prompt"] = contexts.pop()
            request["continuations"] = [continuation for _, continuation in item.pairs]
        else:
            request["pairs"] = [list(pair) for pair in item.pairs]
    return {
        "id": item.id,
        "group": item.group,
        "prompt_hash": prompt_hash(item),
        "request": request,
        "response": dict(response),
        "gold": item.gold,
        "scores": {name: list(score) for name, score in scores.items()},
    }


def prompt_hash(item: Item) -> str:
    """Of all that is asked about an item: equal where two runs asked the same."""
    asked = json.dumps([item.prompt, item.pairs, item.turns], ensure_ascii=False)
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _chunks(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Items of one group and of like length together: they share a prompt and shapes."""

    def length(item: Item) -> int:
        asked = [item.prompt, *item.turns, *(a + b for a, b in item.pairs)]
        return max(map(len, asked))

    order = sorted(items, key=lambda item: (item.group, length(item)))
    for start in range(0, len(order), size):
        yield order[start : start + size]
