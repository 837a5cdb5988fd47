"""Win rates, Elo and agreement, against closed forms and published numbers.

With EASYLM_SHARED, also against reviews, votes and labels that were published with their totals;
AlpacaEval's labels (CC BY-NC, not ours to ship) are looked for in EASYLM_ALPACA_EVAL_LABELS, as
MODEL.ANNOTATOR.json from that repository's results/MODEL/ANNOTATOR/annotations.json.
"""

import itertools
import json
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from easylm_jax.evals.win_rate import (
    Game,
    agreement,
    agreement_with_majority,
    cohens_kappa,
    elo,
    length_controlled,
    mean,
    ratio,
)

SHARED = Path(os.environ.get("EASYLM_SHARED", "/nowhere")) / "data"
LABELS = Path(os.environ.get("EASYLM_ALPACA_EVAL_LABELS", "/nowhere"))


def read(path: Path):
    if not path.exists():
        pytest.skip(f"no {path.name}")
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else None
    return json.loads(path.read_text()) if lines is None else [json.loads(x) for x in lines]


# ------------------------------------------------------------------------------ synthetic data


def test_the_error_of_clusters_is_that_of_their_means_and_more_than_the_naive_one():
    rng = np.random.default_rng(0)
    of_question = rng.random(200)
    twice = np.repeat((of_question > 0.4).astype(float), 2)  # both turns come out alike
    found = mean(twice, [f"q{i // 2}" for i in range(400)])
    assert found.stderr == pytest.approx(twice[::2].std(ddof=1) / np.sqrt(200), rel=1e-9)
    np.testing.assert_allclose(found[:2], mean(twice[::2])[:2])
    assert found.n == 200 and found.stderr > 1.4 * mean(twice).stderr


def test_errors_of_ratios_are_their_spread_over_samples():
    rng = np.random.default_rng(1)
    draws = []
    for _ in range(400):
        bottom = rng.uniform(1, 3, 100)
        draws.append(ratio(bottom * 0.5 + rng.normal(0, 0.3, 100), bottom))
    spread = np.std([d.value for d in draws])
    assert np.mean([d.stderr for d in draws]) == pytest.approx(spread, rel=0.1)


def test_length_control_finds_the_win_rate_of_equal_lengths():
    """Of judges with known weights on length: the estimate, its error, and n of clusters."""
    rng = np.random.default_rng(2)
    model, length, draws = 0.4, 1.5, []
    for _ in range(200):
        delta = rng.normal(300, 400, 400)
        p = expit(model + length * np.tanh(delta / delta.std(ddof=1)))
        draws.append(length_controlled((rng.random(400) < p).astype(float), delta))
    values = [d.win_rate.value for d in draws]
    assert np.mean(values) == pytest.approx(expit(model), abs=0.01)
    assert np.mean([d.length_weight for d in draws]) == pytest.approx(length, abs=0.06)
    assert np.mean([d.win_rate.stderr for d in draws]) == pytest.approx(np.std(values), rel=0.12)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_a_model_that_never_loses_has_numbers(won):
    delta = np.random.default_rng(4).normal(0, 100, 80)
    found = length_controlled([won] * 80, delta)
    assert abs(found.win_rate.value - won) < 0.02
    ratings = elo([Game("a", "b", won)] * 80)
    assert abs(ratings["a"].rating - ratings["b"].rating) < 1800


def test_a_judge_of_length_alone_makes_equal_models():
    delta = np.random.default_rng(5).normal(80, 100, 500)
    found = length_controlled((delta > 0).astype(float), delta)
    assert mean((delta > 0).astype(float)).value > 0.75
    assert found.win_rate.value == pytest.approx(0.5, abs=0.08)


def test_elo_of_two_models_is_the_log_of_their_odds():
    games = [Game("a", "b", 1.0)] * 60 + [Game("b", "a", 1.0)] * 20 + [Game("a", "b", 0.5)] * 20
    found = elo(games)
    apart = 400 * math.log10(70 / 30)
    assert found["a"].rating - found["b"].rating == pytest.approx(apart, abs=0.2)
    assert found["a"].rating + found["b"].rating == pytest.approx(2000)
    error = 400 / math.log(10) / math.sqrt(100 * 0.7 * 0.3)  # of the log-odds; ties lessen it
    width = (found["a"].high - found["a"].low) / 2  # of half the difference, both sides 1.96
    assert 0.75 < width / (1.96 * error / 2) < 1.1


def test_elo_is_the_most_likely_rating_and_knows_no_order_of_games():
    rng = np.random.default_rng(6)
    true = {"a": 1200.0, "b": 1000.0, "c": 950.0, "d": 850.0}
    games = []
    for first, second in itertools.permutations(true, 2):
        p = 1 / (1 + 10 ** ((true[second] - true[first]) / 400))
        games += [Game(first, second, float(x)) for x in rng.random(3000) < p]
    found = elo(games, samples=50)
    assert list(found) == ["a", "b", "c", "d"]
    for name, rating in found.items():
        assert rating.low <= rating.rating <= rating.high
        assert rating.rating == pytest.approx(true[name], abs=12)
    again = elo(games[::-1], samples=1)
    assert again["a"].rating == pytest.approx(found["a"].rating, abs=0.01)


def test_models_that_never_met_are_refused():
    with pytest.raises(ValueError, match=r"\['a', 'b'\] were never compared with \['c', 'd'\]"):
        elo([Game("a", "b", 1.0), Game("c", "d", 1.0)])


def test_agreement_by_hand():
    votes = [("a", "a", "b"), ("a", "a", "a"), ("tie", "a", "b"), ("tie", "tie", "b")]
    assert agreement(votes).value == pytest.approx((1 + 3 + 0 + 1) / 12)
    assert agreement(votes, without="tie").value == pytest.approx((1 + 3 + 0) / (3 + 3 + 1))
    # Left out in turn: the others' modes are {a, b}, {a, b}, {a}; {a} thrice; two of two each; ...
    own = [(1 / 2 + 1 / 2 + 0) / 3, 1, 0, (1 / 2 + 1 / 2 + 0) / 3]
    assert agreement_with_majority(votes).value == pytest.approx(np.mean(own))
    judge = ["a", "b", "tie", "b"]
    of_judge = [(1 / 2 + 1 / 2 + 1) / 3, 0, (0 + 1 / 2 + 1 / 2) / 3, (1 / 2 + 1 / 2 + 0) / 3]
    assert agreement_with_majority(votes, judge).value == pytest.approx(np.mean(of_judge))


def test_kappa_is_sklearns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(7)
    first = rng.integers(0, 3, 300).tolist()
    second = [x if rng.random() < 0.6 else int(rng.integers(0, 3)) for x in first]
    expected = metrics.cohen_kappa_score(first, second)
    assert cohens_kappa(first, second).value == pytest.approx(expected)


# ------------------------------------------------------------------------------ published numbers


@pytest.mark.parametrize(
    "other, score, vicuna, as_good",  # lmsys.org/blog/2023-03-30-vicuna: total scores, and shares
    [("llama-13b", 513.0, 694.0, 0.9), ("alpaca-13b", 583.0, 704.0, 0.9),  # "more than 90%"
     ("bard", 664.0, 655.5, None), ("gpt35", 693.0, 638.0, 0.45)],  # "45% of the questions"
)  # fmt: skip
def test_vicunas_reviews_give_its_blogs_numbers(other, score, vicuna, as_good):
    rows = read(SHARED / f"eval/vicuna_bench/gpt4_review/review_{other}_vicuna-13b.jsonl")
    scores = np.array([row["score"] for row in rows])
    assert scores.sum(axis=0).tolist() == [score, vicuna]
    share = ratio(scores[:, 1], scores[:, 0])
    assert share.value == pytest.approx(vicuna / score) and share.n == 80
    if other == "gpt35":
        assert round(share.value, 2) == 0.92
    preferences = (1 + np.sign(scores[:, 1] - scores[:, 0])) / 2
    not_worse = mean((preferences >= 0.5).astype(float)).value
    if as_good is not None:
        assert not_worse > as_good if as_good == 0.9 else not_worse == as_good


def test_koalas_reviews_average_to_what_their_header_says():
    found = read(SHARED / "eval/koala/cherry_vs_alpaca_koala_wrap_reviews_gpt4.json")
    for field, name in (("review", "average_scores"), ("review_reverse", "average_scores_reverse")):
        scores = [list(map(float, r[field].splitlines()[0].split())) for r in found["data"]]
        own = [mean(column).value for column in np.array(scores).T]
        assert own == pytest.approx(json.loads(found["Meta_Info"][name]))


def test_pandalms_raters_agree_as_known():
    rows = read(SHARED / "preference/pandalm/testset-v1.json")
    votes = [[row[f"annotator{i}"] for i in (1, 2, 3)] for row in rows]
    assert round(agreement(votes).value, 2) == 0.92
    majority = [Counter(v).most_common(1)[0][0] for v in votes]
    lengths = [[len(str(row[f"response{i}"])) for i in (1, 2)] for row in rows]
    longer = [
        float((a > b) == (vote == 1))
        for (a, b), vote in zip(lengths, majority, strict=True)
        if vote and a != b
    ]
    assert (round(mean(longer).value, 3), len(longer)) == (0.675, 887)


@pytest.mark.parametrize(
    "model, win_rate, stderr, controlled",  # AlpacaEval 1's leaderboard, in percent
    [("alpaca-7b", 26.459627, 1.535711, 26.294955),
     ("vicuna-13b", 70.434783, 1.606969, 50.002947),
     ("guanaco-65b", 71.801242, 1.586912, 54.690967)],
)  # fmt: skip
def test_alpaca_evals_labels_give_its_leaderboard(model, win_rate, stderr, controlled):
    rows = read(LABELS / f"{model}.alpaca_eval_gpt4.json")
    preferences = [{0: 0.5, 1: 0.0, 1.5: 0.5, 2: 1.0}[row["preference"]] for row in rows]
    found = mean(preferences)
    assert [100 * x for x in found[:2]] == pytest.approx([win_rate, stderr], abs=1e-4)
    lengths = [len(row["output_2"]) - len(row["output_1"]) for row in rows]
    # Theirs has the difficulty of questions and an L1 penalty beside: within 1.3 points.
    controlled_here = length_controlled(preferences, lengths).win_rate.value
    assert 100 * controlled_here == pytest.approx(controlled, abs=1.3)
