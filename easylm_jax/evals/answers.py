"""Kind `generate`: short answers compared with the right ones, as text or as numbers.

What it is not: what is asked (`task.py`), programs (`code.py`) or conversations
(`chat_answers.py`). Called by `runner.py`. A task's `normaliser` says what equal means:

    harness       lm-eval: without case and punctuation
    harness_nq    lm-eval's nq_open: also without an article and the space after it
    llama         the LLaMA paper: without case, articles, punctuation and doubled spaces
    number        GSM8K: the number after "####" (exact_match), or the last one (flexible_match)

With several samples of one question, exact_match is their mean, and `maj@K` is whether the answer
that most of the K samples give is right (Wang et al. 2022, arXiv 2203.11171), by flexible_match for
numbers; of equally frequent ones the first counts, and a text without an answer does not.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from easylm_jax.evals.task import Item, Task
from easylm_jax.language_model import GenerationRequest, LanguageModel

Response = dict[str, Any]
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def ask(lm: LanguageModel, task: Task, items: Sequence[Item]) -> list[Response]:
    """The texts that the model writes after every item's prompt."""
    how = task.generate
    requests = [
        GenerationRequest(
            item.prompt,
            until=how.until,
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            top_p=how.top_p,
            n=how.n,
            seed=item.seed,
        )
        for item in items
    ]
    made = lm.generate_until(requests)
    return [{"texts": [completion.text for completion in of_item]} for of_item in made]


def score(task: Task, item: Item, response: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The task's metrics, each as (sum, weight)."""
    return {
        metric: (_metric(metric, task, item, response["texts"]), 1.0) for metric in task.metrics
    }


def _metric(metric: str, task: Task, item: Item, texts: Sequence[str]) -> float:
    normalise = _normaliser(task.normaliser, metric)
    gold = [item.gold] if isinstance(item.gold, str) else item.gold
    right = {normalise(answer) for answer in gold}
    answers = [normalise(text) for text in texts]
    if metric.startswith("maj@"):
        most = Counter(filter(None, answers)).most_common(1)
        return float(bool(most) and most[0][0] in right)
    return sum(answer in right for answer in answers) / len(answers)


def _normaliser(name: str, metric: str) -> Callable[[str], str]:
    if name == "number":
        return strict_number if metric == "exact_match" else flexible_number
    return {"harness": harness, "harness_nq": harness_nq, "llama": llama}[name]


def harness(text: str) -> str:
    """lm-eval's exact_match with ignore_case and ignore_punctuation."""
    return text.strip().lower().translate(NO_PUNCTUATION)


def harness_nq(text: str) -> str:
    """The same without articles, which lm-eval takes away where a space follows."""
    text = re.sub(r"\b(?:The |the |An |A |a |an )", "", text.strip())
    return text.lower().translate(NO_PUNCTUATION)


def llama(text: str) -> str:
    """SQuAD's normalisation, which is what the LLaMA paper describes."""
    text = text.lower().translate(NO_PUNCTUATION)  # takes a final dot or comma with it
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def strict_number(text: str) -> str:
    """The number after the first "####", "" if there is none."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return _plain_number(found[1]) if found else ""


def flexible_number(text: str) -> str:
    """The last number of the text, "" if there is none."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return _plain_number(found[-1]) if found else ""


def _plain_number(text: str) -> str:
    return text.replace(",", "").replace("$", "").removesuffix(".")
