"""Kind `choice`: which of several continuations the model finds likeliest.

What it is not: what they are (`task.py`), or means over items (`results.py`). Called by
`runner.py`. Metrics, of an item's log-probabilities:

    acc            the likeliest is right
    acc_norm       the same per character of the choice, without the space before it
    acc_bytes      per byte in UTF-8
    acc_tokens     per token
    acc_uncond     after log P(choice | "Answer:") was subtracted (Brown et al. 2020, section 2.4)
    mc1            the best true answer is likelier than every false one (Lin et al. 2021)
    mc2            how much of the choices' probability the true ones have
    greedy_acc     the one continuation is what the model would have written
    perplexity     minus the log-probability; its exponential is of the mean
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from easylm_jax.evals.task import Item, Task
from easylm_jax.language_model import LanguageModel

Response = dict[str, Any]


def ask(lm: LanguageModel, task: Task, items: Sequence[Item]) -> list[Response]:
    """The log-probabilities of every item's continuations."""
    wants_unconditional = "acc_uncond" in task.metrics
    pairs = [pair for item in items for pair in item.pairs]
    if wants_unconditional:
        pairs += [(task.unconditional, choice) for item in items for _, choice in item.pairs]
    unique = list(dict.fromkeys(pairs))  # "yes" after "Answer:" is the same in every item
    found = dict(zip(unique, lm.loglikelihood(unique), strict=True))
    responses = []
    for item in items:
        scored = [found[pair] for pair in item.pairs]
        response: Response = {
            "log_probs": [likelihood.log_prob for likelihood in scored],
            "is_greedy": [likelihood.is_greedy for likelihood in scored],
            "num_tokens": [likelihood.num_tokens for likelihood in scored],
        }
        if wants_unconditional:
            alone = [found[task.unconditional, choice] for _, choice in item.pairs]
            response["unconditional"] = [likelihood.log_prob for likelihood in alone]
        responses.append(response)
    return responses


def score(task: Task, item: Item, response: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The task's metrics, each as (sum, weight)."""
    return {metric: (_metric(metric, task, item, response), 1.0) for metric in task.metrics}


def _metric(metric: str, task: Task, item: Item, response: Mapping[str, Any]) -> float:
    log_probs = np.asarray(response["log_probs"])
    if metric == "greedy_acc":
        return float(response["is_greedy"][item.gold])
    if metric == "perplexity":
        return -float(log_probs[item.gold])
    if metric in ("mc1", "mc2"):
        is_true = np.asarray(item.gold["labels"], bool)
        if metric == "mc1":
            return float(log_probs[item.gold["best"]] > log_probs[~is_true].max())
        probs = np.exp(log_probs - log_probs.max())
        return float(probs[is_true].sum() / probs.sum())
    choices = [continuation.removeprefix(task.delimiter) for _, continuation in item.pairs]
    if metric == "acc_norm":
        log_probs = log_probs / [len(choice) for choice in choices]
    elif metric == "acc_bytes":
        log_probs = log_probs / [len(choice.encode()) for choice in choices]
    elif metric == "acc_tokens":
        log_probs = log_probs / response["num_tokens"]
    elif metric == "acc_uncond":
        log_probs = log_probs - response["unconditional"]
    return float(int(np.argmax(log_probs)) == item.gold)
