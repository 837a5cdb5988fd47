"""Run the items of a task through a model, a chunk at a time, for evaluate.py and for training.

A chunk's samples are handed over as soon as they are there, so that a run that was killed can go
on where it was. What it is not: a task (`task.py`), or a summary of samples (`results.py`).
"""

import contextlib
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
        self, lm: LanguageModel, task: Task, items: Sequence[Item], **permission: bool
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
CHUNK = {"choice": 256, "generate": 32, "code": 8, "text": 16, "chat": 16}


def run_items(
    lm: LanguageModel, task: Task, items: Sequence[Item], *, allow_code_execution: bool = False
) -> Iterator[list[Sample]]:
    """The samples of all items, a chunk at a time, in the order that is quickest."""
    kind = KINDS[task.kind]
    permission = {"allow_code_execution": allow_code_execution} if kind is code else {}
    for chunk in _chunks(items, max(CHUNK[task.kind] // task.generate.n, 1)):
        responses = kind.ask(lm, task, chunk, **permission)
        yield [
            sample_of(item, response, kind.score(task, item, response))
            for item, response in zip(chunk, responses, strict=True)
        ]


def still_asked(task: Task, items: Sequence[Item], known: Iterable[Sample]) -> list[Sample]:
    """Those of an earlier start's samples that answer what is asked now, scored again.

    Again, since what is right or how it is compared may have been corrected. A response that lacks
    what a metric needs answers something else.
    """
    asked = {item.id: item for item in items}
    samples = []
    for sample in known:
        item = asked.get(sample["id"])
        if item and prompt_hash(item) == sample["prompt_hash"]:
            with contextlib.suppress(KeyError):
                scores = KINDS[task.kind].score(task, item, sample["response"])
                samples.append(sample_of(item, sample["response"], scores))
    return samples


def with_shots_that_fit(
    lm: LanguageModel,
    task: Task,
    items: Sequence[Item],
    *,
    shots: int,
    ask_with: Callable[[int], Sequence[Item]],
) -> tuple[list[Item], int]:
    """The items with as many of `shots` as leave room for the answer, and how many have fewer.

    So did MMLU's authors (Hendrycks et al. 2021). `ask_with` makes the items for a number of shots.
    """
    room = task.generate.max_new_tokens if task.kind in ("generate", "code") else 0
    most = lm.config.max_seq_len - room

    def fits(item: Item) -> bool:
        text = max((a + b for a, b in item.pairs), key=len, default=item.prompt)
        # A token is one byte at least; beside the text there are at most BOS and a first space.
        return len(text.encode()) + 2 <= most or len(lm.tokenizer.prompt_ids(text)) <= most

    found = {item.id: item for item in items}
    too_long = [item.id for item in items if shots and not fits(item)]
    shortened = len(too_long)
    while too_long and shots > 0:
        shots -= 1
        fewer = {item.id: item for item in ask_with(shots)}
        found |= {name: fewer[name] for name in too_long}
        too_long = [name for name in too_long if not fits(fewer[name])]
    return list(found.values()), shortened


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
