"""Numbers made of preferences: win rates, length control, Elo ratings, agreement of raters.

A preference is what a comparison came to, seen from the first model: 1 won, 0 lost, 0.5 a tie, or
anything between (AlpacaEval's weighted judges). Comparisons of one question are no independent
observations: where there may be several, `clusters` says which belong together.

What it is not: the judging (`judge.py`), or the votes of people (the blind page writes them).
Called by `judgements.py`, `raters.py` and vote.py.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from easylm_jax.evals.results import Estimate

Numbers = Sequence[float | int] | np.ndarray
Votes = Sequence[Sequence[Hashable]]  # of every item, what each rater said

ELO_MEAN = 1000.0
ELO_SCALE = 400.0  # points between two models of which one wins 10 games to 1
# Precision of a Gaussian prior on the weights of logistic regressions, of standard deviation 10: it
# leaves those of real data alone, and keeps finite those of a model that never loses.
PRIOR = 0.01


# ------------------------------------------------------------------------- means and win rates


def mean(values: Numbers, clusters: Sequence[Hashable] | None = None) -> Estimate:
    """A win rate, of preferences. Without clusters the error is std / sqrt(n), as AlpacaEval's."""
    return ratio(values, np.ones(len(values)), clusters)


def ratio(
    numerators: Numbers, denominators: Numbers, clusters: Sequence[Hashable] | None = None
) -> Estimate:
    """Sum over sum, with the linearised error of a ratio estimator; `n` counts clusters.

    Of two judges' scores it is Vicuna's "92% of ChatGPT's quality": total score over total score.
    """
    tops, bottoms = (_sums(np.asarray(x, float), clusters) for x in (numerators, denominators))
    n, total = int(((tops != 0) | (bottoms != 0)).sum()), bottoms.sum()
    if n == 0:
        return Estimate(float("nan"), None, 0)
    value = tops.sum() / total
    squares = ((tops - value * bottoms) ** 2).sum()
    stderr = float(np.sqrt(squares * n / (n - 1)) / abs(total)) if n > 1 else None
    return Estimate(float(value), stderr, n)


def _sums(values: np.ndarray, clusters: Sequence[Hashable] | None) -> np.ndarray:
    """Sums over the first dimension within each cluster; None: everything is its own."""
    if clusters is None:
        return values
    number = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(number), *values.shape[1:]))
    np.add.at(sums, [number[name] for name in clusters], values)
    return sums


class LengthControlled(NamedTuple):
    """`length_weight` is what a difference of lengths adds to the log-odds, at most; 0: nothing."""

    win_rate: Estimate
    length_weight: float


def length_controlled(
    preferences: Numbers,
    length_differences: Numbers,
    *,
    clusters: Sequence[Hashable] | None = None,
) -> LengthControlled:
    """The win rate if both answers had always been equally long (Dubois et al. 2024, 2404.04475).

    A logistic regression of the preferences, which may be fractions,

        logit p = model + length_weight * tanh((len_a - len_b) / std(len_a - len_b))

    and then its p with the length term left out. Lengths are in characters, std has n - 1.
    AlpacaEval 2 also has the difficulty of every question, which it estimated once from all its
    models, fits by an L1 penalty chosen in five folds, and adds comparisons with baselines that
    were told to be terse and verbose, at weight 0.2. Here there is PRIOR alone. The error is that
    of a sandwich estimator by the delta method.
    """
    y, delta = np.asarray(preferences, float), np.asarray(length_differences, float)
    if not len(y):
        return LengthControlled(mean([]), 0.0)
    std = delta.std(ddof=1) if len(delta) > 1 else 0.0
    x = np.stack([np.ones_like(y), np.tanh(delta / std) if std else np.zeros_like(y)], axis=1)
    weights = _fit_logistic(x, y)
    p, p_fit = float(_sigmoid(weights)[0]), _sigmoid(x @ weights)
    bread = np.linalg.inv((x.T * (p_fit * (1 - p_fit))) @ x + PRIOR * np.eye(2))
    # How far each observation moves the result, through the first weight.
    influence = (x * (y - p_fit)[:, None]) @ bread[:, 0] * p * (1 - p)
    moved = _sums(influence, clusters)
    n = len(moved)
    stderr = float(np.sqrt((moved**2).sum() * n / (n - 1))) if n > 1 else None
    return LengthControlled(Estimate(p, stderr, n), float(weights[1]))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _fit_logistic(x: np.ndarray, y: np.ndarray, counts: np.ndarray | float = 1.0) -> np.ndarray:
    """Weights of the most likely logistic regression of `y` in [0, 1] on `x` [N, F], with PRIOR."""

    def loss(weights):
        z = x @ weights
        gradient = x.T @ (counts * (_sigmoid(z) - y)) + PRIOR * weights
        value = (counts * (np.logaddexp(0, z) - y * z)).sum() + PRIOR / 2 * weights @ weights
        return value, gradient

    def hessian(weights):
        p = _sigmoid(x @ weights)
        return (x.T * (counts * p * (1 - p))) @ x + PRIOR * np.eye(len(weights))

    start = np.zeros(x.shape[1])
    return scipy.optimize.minimize(loss, start, jac=True, hess=hessian, method="trust-exact").x


# ---------------------------------------------------------------------------------- Elo ratings


class Game(NamedTuple):
    """`preference` is the first model's."""

    first: str
    second: str
    preference: float


class Rating(NamedTuple):
    """`low` and `high` are the 2.5th and 97.5th percentiles of the bootstrap."""

    rating: float
    low: float
    high: float
    games: int


def elo(games: Sequence[Game], *, samples: int = 200, seed: int = 0) -> dict[str, Rating]:
    """Bradley-Terry ratings by maximum likelihood, the best model first.

    Unlike running Elo they do not depend on the order of games. Their mean over models is 1000, and
    400 points are odds of 10 to 1. The bootstrap draws whole games.
    """
    models = sorted({name for game in games for name in game[:2]})
    kinds = Counter(Game(*game) for game in games)  # a bootstrap of counts is a multinomial
    counts = np.array(list(kinds.values()))
    x, y = np.zeros((len(kinds), len(models))), np.array([game.preference for game in kinds])
    for row, game in zip(x, kinds, strict=True):
        row[models.index(game.first)] += 1
        row[models.index(game.second)] -= 1
    _check_connected(models, x)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=samples)
    fits = np.array([_fit_logistic(x, y, c) for c in [counts, *drawn]])
    ratings = ELO_MEAN + ELO_SCALE / np.log(10) * (fits - fits.mean(axis=1, keepdims=True))
    low, high = np.percentile(ratings[1:], [2.5, 97.5], axis=0)
    played = counts @ (x != 0)
    rows = zip(models, ratings[0], low, high, played, strict=True)
    found = {model: Rating(float(r), float(a), float(b), int(n)) for model, r, a, b, n in rows}
    return dict(sorted(found.items(), key=lambda item: -item[1].rating))


def _check_connected(models: Sequence[str], x: np.ndarray) -> None:
    meet = scipy.sparse.csr_array(np.abs(x).T @ np.abs(x))
    number, group = scipy.sparse.csgraph.connected_components(meet)
    if number > 1:
        groups = [[m for m, g in zip(models, group, strict=True) if g == i] for i in range(number)]
        raise ValueError(
            f"{groups[0]} were never compared with {groups[1]}, not even through others: rate them "
            "apart, or let them meet"
        )


# ------------------------------------------------------------------------------------ agreement


def agreement(votes: Votes, *, without: Hashable = None) -> Estimate:
    """The share of pairs of raters of an item who say the same; `without` "tie", of decided pairs.

    Of two raters it is their plain agreement.
    """
    same, pairs = [], []
    for said in votes:
        both = [(a, b) for a, b in itertools.combinations(said, 2) if without not in (a, b)]
        same.append(sum(a == b for a, b in both))
        pairs.append(len(both))
    return ratio(same, pairs)


def agreement_with_majority(votes: Votes, judge: Sequence[Hashable] | None = None) -> Estimate:
    """How often a judge says what most people say, leaving one person out in turn (AlpacaFarm).

    Without `judge`, the person left out is the one who is measured, so that the two numbers are on
    the same footing: both are compared with a majority of all people but one. Where several votes
    are the most frequent, one of them drawn at random would agree; that chance is what counts.
    """
    shares = []
    for number, said in enumerate(votes):
        scores = []
        for left_out, own in enumerate(said):
            others = Counter(said[:left_out]) + Counter(said[left_out + 1 :])
            most = max(others.values())
            modes = [vote for vote, count in others.items() if count == most]
            scores.append(((own if judge is None else judge[number]) in modes) / len(modes))
        shares.append(float(np.mean(scores)))
    return mean(shares)


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Estimate:
    """Agreement of two raters beyond that of chance: 0 is chance, 1 is perfect (Cohen 1960)."""
    n = len(first)
    if not n:
        return Estimate(float("nan"), None, 0)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    shares_a, shares_b = Counter(first), Counter(second)
    chance = sum(shares_a[vote] * shares_b[vote] for vote in shares_a) / n**2
    if chance == 1:  # both always say one and the same
        return Estimate(float("nan"), None, n)
    stderr = float(np.sqrt(observed * (1 - observed) / n) / (1 - chance))
    return Estimate((observed - chance) / (1 - chance), stderr, n)
