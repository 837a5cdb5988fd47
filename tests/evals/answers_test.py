"""Answers compared as LLaMA's paper, lm-eval and GSM8K compare them."""

import dataclasses
import json
import random
import re

import pytest

from easylm_jax.evals import answers
from easylm_jax.evals.task import Item, find_task, make_items, select_metric
from easylm_jax.language_model import Completion, LanguageModel
from tests.evals.task_test import SLICES


def drawing(task, **settings):
    """The task with other settings of `generate`."""
    task = dataclasses.replace(task, generate=dataclasses.replace(task.generate, **settings))
    return select_metric(task, task.headline)


def score(name, gold, *texts, n=None):
    task = find_task(name)
    task = drawing(task, n=n) if n else task
    found = answers.score(task, Item("0", "", {}, gold=gold), {"texts": list(texts)})
    assert all(weight == 1.0 for _, weight in found.values())
    return {metric: total for metric, (total, _) in found.items()}


@pytest.mark.parametrize(
    ("text", "llama", "harness_nq", "harness"),
    [
        (" Beatles", 1, 1, 1),
        (" the beatles.", 1, 1, 0),
        (" THE   Beatles ", 1, 0, 0),
        (" An Beatles", 1, 1, 0),
        (" (Beatles)!", 1, 1, 1),
        (" Beatles\u2019", 0, 0, 0),
        (" Theatles", 0, 0, 0),
        (" Ringo Starr", 1, 1, 1),
        (" RingoStarr", 0, 0, 0),
        (" Ringo the Starr", 1, 1, 0),
        ("", 0, 0, 0),
    ],
)
def test_equal(text, llama, harness_nq, harness):
    gold = ["Beatles", "Ringo Starr"]
    assert score("nq_open_llama", gold, text) == {"exact_match": llama}
    assert score("nq_open", gold, text) == {"exact_match": harness_nq}
    assert score("triviaqa", gold, text) == {"exact_match": harness}


GOLD = "He has 1,000 / 2 = <<1000/2=500>>500 and $3.\n#### 1,500"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so\n#### 1500", 1, 1),
        ("#### $1500", 0, 1),
        ("#### 1,500.\n\n7 more", 1, 0),
        ("#### 7\n#### 1500", 0, 1),
        ("The answer is $1,500.", 0, 1),
        ("1500 of 3", 0, 0),
        ("-1500", 0, 0),
        ("none", 0, 0),
    ],
)
def test_numbers(text, strict, flexible):
    assert score("gsm8k", GOLD, text) == {"exact_match": strict, "flexible_match": flexible}


def test_votes():
    texts = ["#### 7", "it is 1500", "#### 1500", "no idea", "no", "#### 9", "none"]
    scores = score("gsm8k", GOLD, *texts, n=7)
    assert scores == {"exact_match": 1 / 7, "flexible_match": 2 / 7, "maj@7": 1.0}
    assert score("gsm8k", GOLD, "#### 7", "#### 1500", n=2)["maj@2"] == 0.0  # the first counts
    assert score("gsm8k", GOLD, "no", "none", n=2)["maj@2"] == 0.0


def test_asks_as_the_task_says():
    asked = []

    class Model(LanguageModel):
        def __init__(self):
            pass

        def generate_until(self, requests):
            asked.extend(requests)
            texts = [[f" {request.prompt}{i}" for i in range(request.n)] for request in requests]
            return [[Completion(text, [1], [0.0], "stop") for text in row] for row in texts]

    task = drawing(find_task("nq_open"), n=2, temperature=0.5)
    items = [Item("0", "", {}, prompt="p"), Item("1", "", {}, prompt="q")]
    responses = answers.ask(Model(), task, items)
    assert responses == [{"texts": [" p0", " p1"]}, {"texts": [" q0", " q1"]}]
    assert json.loads(json.dumps(responses)) == responses
    assert [r.prompt for r in asked] == ["p", "q"]
    seeds = [r.seed for r in asked]
    answers.ask(Model(), task, [Item("2", "", {}, prompt="p"), items[1], items[0]])
    assert [r.seed for r in asked[3:]] == seeds[::-1]  # whatever the order, and their own
    assert len({*seeds, asked[2].seed}) == 3 and all(0 <= seed < 2**32 for seed in seeds)
    assert {(r.until, r.n, r.temperature, r.max_new_tokens) for r in asked} == {
        (("\n", ".", ","), 2, 0.5, 256)
    }


def test_scores_are_those_of_lm_eval():
    """Its filters and exact_match on variants of the right answers."""
    metrics = pytest.importorskip("lm_eval.api.metrics")
    filters = pytest.importorskip("lm_eval.filters.extraction")
    rng = random.Random(5)

    def theirs(text, gold, filter_, **how):
        [[text]] = filter_.apply([[text]], [{}])
        found = metrics.exact_match_hf_evaluate([text] * len(gold), gold, ignore_case=True, **how)
        return float(found["exact_match"] > 0)

    nq = {"regexes_to_ignore": [r"\b(?:The |the |An |A |The |a |an )"], "ignore_punctuation": True}
    gsm = {"regexes_to_ignore": [",", r"\$", r"(?s).*#### ", r"\.$"]}
    strict = filters.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = filters.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    for item in make_items(find_task("gsm8k"), SLICES, shots=0):
        number = re.sub(r"(?s).*#### ", "", item.gold)
        for pattern in (
            "#### {}",
            "${}.",
            "{},",
            "#### {}.00",
            "x {} 7",
            " -{}",
            "#### ${}",
            "{}%",
        ):
            text = rng.choice(["", "so 3, ", "#### 1\n"]) + pattern.format(number)
            expected = [theirs(text, [item.gold], kind, **gsm) for kind in (strict, flexible)]
            assert list(score("gsm8k", item.gold, text).values()) == expected, text
    for item in make_items(find_task("triviaqa"), SLICES, shots=0):
        alias = rng.choice(item.gold)
        for pattern in (" {}", "The {}", "a {} ", "{}!", "{} a", " {}'s", "  THE {}"):
            for case in (str, str.lower, str.upper):
                text = case(pattern.format(alias))
                for name, how in (("triviaqa", {"ignore_punctuation": True}), ("nq_open", nq)):
                    expected = theirs(text, item.gold, filters.WhitespaceFilter(), **how)
                    assert score(name, item.gold, text) == {"exact_match": expected}, text
