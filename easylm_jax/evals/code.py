"""Kind `code`: programs that a model writes, run against their tests. Called by `runner.py`.

A task's `code.program` puts a program together from the document's fields and a `completion`; it is
right when it runs to its end. Of `generate.n` programs per problem, `pass@K` is the chance that at
least one of K drawn ones is right (Chen et al. 2021, arXiv 2107.03374). Nothing runs without
permission. What it is not: what holds programs back, see `sandbox.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from easylm_jax.evals import sandbox
from easylm_jax.evals.answers import ask as ask_for_texts
from easylm_jax.evals.task import Item, Task, fill
from easylm_jax.language_model import LanguageModel

Response = dict[str, Any]


def require_permission(allowed: bool) -> str:
    """What protects the user on this machine, in a sentence to show before the first program.

    Raises:
      ValueError: running programs was not allowed, or nothing here would hold them back.
    """
    if not allowed:
        raise ValueError(
            "this task runs programs that the model writes, which nobody has read: allow that "
            "with --allow_code_execution (they run in a sandbox)"
        )
    sandbox.require_protection()
    return sandbox.protection()


def ask(
    lm: LanguageModel,
    task: Task,
    items: Sequence[Item],
    *,
    allow_code_execution: bool = False,
) -> list[Response]:
    """What the model writes after every item's prompt, and what became of it."""
    require_permission(allow_code_execution)
    for item in items:
        if item.prompt != item.prompt.rstrip():
            raise ValueError(
                f"task {task.name}, item {item.id}: the prompt ends in white space, which no "
                "tokenizer would have cut there; end it before, as the completion brings its own"
            )
    return run(task, items, ask_for_texts(lm, task, items))


def run(
    task: Task, items: Sequence[Item], responses: Sequence[Mapping[str, Any]]
) -> list[Response]:
    """The responses with the outcome of every text's program; equal programs run once."""
    programs = [
        [program_of(task, item, text) for text in response["texts"]]
        for item, response in zip(items, responses, strict=True)
    ]
    different = list(dict.fromkeys(program for of_item in programs for program in of_item))
    outcomes = sandbox.run_programs(different)
    found = {p: outcome._asdict() for p, outcome in zip(different, outcomes, strict=True)}
    return [
        {"texts": list(response["texts"]), "outcomes": [found[program] for program in of_item]}
        for response, of_item in zip(responses, programs, strict=True)
    ]


def program_of(task: Task, item: Item, text: str) -> str:
    """The text with its tests."""
    doc = item.doc | {"completion": text}
    return str(fill(task.code["program"], doc, where=f"task {task.name}, item {item.id}"))


def score(task: Task, item: Item, response: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The task's metrics, each as (sum, weight)."""
    statuses = [outcome["status"] for outcome in response["outcomes"]]
    n, right = len(statuses), statuses.count("passed")
    draws = {metric: int(metric.removeprefix("pass@")) for metric in task.metrics}
    return {metric: (pass_at_k(n, right, k), 1.0) for metric, k in draws.items()}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Of n programs c are right: the chance of a right one among k, 1 - C(n-c, k) / C(n, k).

    As a product (Chen et al. 2021, figure 3), whose factors are no large numbers.
    """
    if not 0 < k <= n or not 0 <= c <= n:
        raise ValueError(f"pass@{k} of {n} programs, {c} of them right: expected k and c within n")
    return 1.0 - math.prod(max(0.0, 1.0 - k / i) for i in range(n - c + 1, n + 1))
