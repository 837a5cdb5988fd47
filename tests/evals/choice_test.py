"""Scores of choices against the metrics written out, and against lm-eval's own."""

import math
import random

import pytest

from easylm_jax.evals import choice
from easylm_jax.evals.task import Item, find_task, select_metric
from easylm_jax.language_model import LanguageModel, Likelihood


class Model(LanguageModel):
    """Likelihoods from a table."""

    def __init__(self, table, asked):
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "asked", asked)

    def loglikelihood(self, pairs):
        self.asked.extend(pairs)
        return [Likelihood(*self.table[pair]) for pair in pairs]


CHOICES = ("a", "long answer", "äöü")  # 1, 11, 3 characters; 1, 11, 6 bytes


def item_of(gold):
    return Item("0", "", {}, pairs=tuple(("Q:", f" {text}") for text in CHOICES), gold=gold)


def response_of(log_probs, *, tokens=(1, 1, 1), greedy=(False, False, False), unconditional=None):
    response = {"log_probs": log_probs, "num_tokens": tokens, "is_greedy": greedy}
    return response | ({"unconditional": unconditional} if unconditional else {})


@pytest.mark.parametrize(
    ("metric", "response", "best"),
    [
        ("acc", response_of([-2.0, -3.0, -2.5]), 0),
        ("acc_norm", response_of([-2.0, -3.0, -2.5]), 1),  # -2, -0.27, -0.83
        ("acc_norm", response_of([-2.0, -9.9, -2.5]), 2),  # -0.9 with 11 characters, -0.83
        ("acc_norm", response_of([-1.0, -8.8, -9.0]), 1),  # -1, -0.8; with the space -0.5, -0.73
        ("acc_bytes", response_of([-2.0, -9.0, -4.5]), 2),  # -0.82 with 11 bytes, -0.75
        ("acc_tokens", response_of([-2.0, -3.0, -6.0], tokens=[1, 2, 5]), 2),  # -2, -1.5, -1.2
        ("acc_uncond", response_of([-2.0, -3.0, -2.5], unconditional=[-2.0, -3.0, -2.6]), 2),
    ],
)
def test_likeliest(metric, response, best):
    task = select_metric(find_task("piqa"), metric)
    for gold in range(3):
        scored = choice.score(task, item_of(gold), response)[metric]
        assert scored == (float(gold == best), 1.0)


def test_truthfulqa():
    task = find_task("truthfulqa")
    log_probs = [math.log(p) - 800 for p in (0.35, 0.4, 0.05)]  # their exponentials are 0
    item = item_of({"best": 0, "labels": [1, 1, 0]})
    scores = choice.score(task, item, response_of(log_probs))
    assert scores["mc1"] == (1.0, 1.0)  # the other true one is no rival
    assert scores["mc2"] == (pytest.approx(0.75 / 0.8), 1.0)
    item = item_of({"best": 0, "labels": [1, 0, 1]})
    assert choice.score(task, item, response_of(log_probs))["mc1"] == (0.0, 1.0)


def test_last_word():
    item = Item("0", "", {}, pairs=(("one", " two"),), gold=0)
    response = {"log_probs": [-1.5], "is_greedy": [True], "num_tokens": [1]}
    scores = choice.score(find_task("lambada"), item, response)
    assert scores == {"greedy_acc": (1.0, 1.0), "perplexity": (1.5, 1.0)}


def test_unconditional_is_asked_when_it_is_wanted():
    pairs = [("Q:", f" {text}") for text in CHOICES]
    table = {pair: (-float(i), i == 0, i + 1) for i, pair in enumerate(pairs)}
    table |= {("Answer:", f" {text}"): (-10.0 - i, False, 1) for i, text in enumerate(CHOICES)}
    task, items = find_task("boolq"), [item_of(0), item_of(1)]
    asked = []
    model = Model(table, asked)
    plain = choice.ask(model, task, items)
    assert asked == pairs  # each once, though two items ask
    expected = {"log_probs": [0.0, -1.0, -2.0], "is_greedy": [True, False, False]}
    assert plain == [expected | {"num_tokens": [1, 2, 3]}] * 2
    both = choice.ask(model, select_metric(task, "acc_uncond"), items)
    assert both == [one | {"unconditional": [-10.0, -11.0, -12.0]} for one in plain]


def test_scores_are_those_of_lm_eval():
    """Its process_results on random likelihoods, for tasks with one context and with several."""
    api = pytest.importorskip("lm_eval.api.task")
    rng = random.Random(3)

    def theirs(choices, gold, results):
        task = api.ConfigurableTask.__new__(api.ConfigurableTask)
        task.OUTPUT_TYPE, task.multiple_input, task.multiple_target = "multiple_choice", 0, 0
        task._config = api.TaskConfig(task="x", output_type="multiple_choice")
        task._metric_fn_list = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
        task.doc_to_choice = lambda doc: choices
        task.doc_to_target = lambda doc: gold
        return task.process_results({}, results)

    task = select_metric(find_task("piqa"), "acc_bytes")
    for _ in range(200):
        choices = ["".join(rng.choices("aä –x", k=rng.randint(1, 9))) for _ in range(4)]
        gold, log_probs = rng.randrange(4), [-rng.expovariate(0.2) for _ in range(4)]
        item = Item("", "", {}, pairs=tuple(("Q", f" {c}") for c in choices), gold=gold)
        ours = choice.score(task, item, response_of(log_probs, tokens=[1] * 4))
        expected = theirs(choices, gold, [(log_prob, False) for log_prob in log_probs])
        assert {name: total for name, (total, _) in ours.items()} == expected
