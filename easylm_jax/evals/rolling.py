"""Kind `text`: how likely whole texts are, per byte and per word.

What it is not: the loss on rows of training data (`perplexity.py`), which depends on the tokenizer.
Called by `runner.py`. Sums are of minus the natural log-likelihood; `results.py` makes of
them, over a corpus,

    bits_per_byte      the mean over bytes, in bits
    byte_perplexity    the exponential of the mean over bytes
    word_perplexity    the exponential of the mean over words, which white space parts
"""

from collections.abc import Mapping, Sequence
from typing import Any

from easylm_jax.evals.task import Item, Task
from easylm_jax.language_model import LanguageModel

Response = dict[str, Any]


def ask(lm: LanguageModel, task: Task, items: Sequence[Item]) -> list[Response]:
    """The log-likelihood of every text, each token predicted once."""
    found = lm.loglikelihood_rolling([item.prompt for item in items])
    return [{"log_prob": one.log_prob, "num_tokens": one.num_tokens} for one in found]


def score(task: Task, item: Item, response: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The task's metrics, each as (sum, weight)."""
    nats, words, size = -response["log_prob"], item.gold["words"], item.gold["bytes"]
    known = {
        "bits_per_byte": (nats, float(size)),
        "byte_perplexity": (nats, float(size)),
        "word_perplexity": (nats, float(words)),
    }
    return {metric: known[metric] for metric in task.metrics}
