"""Sums and weights of texts against the definitions."""

import math

import pytest

from easylm_jax.evals import rolling
from easylm_jax.evals.task import find_task, make_items
from easylm_jax.language_model import LanguageModel, Likelihood


class ByteModel(LanguageModel):
    """Every byte has the probability 1/4."""

    def __init__(self):
        pass

    def loglikelihood_rolling(self, texts):
        sizes = [len(text.encode()) for text in texts]
        return [Likelihood(-size * math.log(4), False, size) for size in sizes]


def test_texts(tmp_path):
    (tmp_path / "a.txt").write_text("two wörds")
    (tmp_path / "b.txt").write_text("some more words\n")
    task = find_task("text:*.txt")
    items = make_items(task, str(tmp_path))
    responses = rolling.ask(ByteModel(), task, items)
    assert [response["num_tokens"] for response in responses] == [10, 16]
    scores = [rolling.score(task, *pair) for pair in zip(items, responses, strict=True)]
    total = {
        metric: [sum(column) for column in zip(*(one[metric] for one in scores), strict=True)]
        for metric in task.metrics
    }
    nats, size = total["bits_per_byte"]
    assert nats / size / math.log(2) == pytest.approx(2.0)
    nats, size = total["byte_perplexity"]
    assert math.exp(nats / size) == pytest.approx(4.0)
    nats, words = total["word_perplexity"]
    assert words == 2 + 4  # as lm-eval counts, which parts the end from the last word
    assert nats == pytest.approx(26 * math.log(4))
