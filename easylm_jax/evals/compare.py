"""Whether two evaluations differ: paired by item, so that luck with the items falls out.

What it is not: two error bars laid side by side, which are far too wide for one set of questions.
Called by `python -m easylm_jax.evaluate --compare A B`. An item counts if both runs asked the very
same (prompt hash); others are left out and said so, as are settings that differ. Tests are
two-sided: McNemar's exact one where an item is right or wrong, else Student's on paired differences
(of perplexities: of their logarithms). Over the headlines of all tasks p is corrected by Holm's
method.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from etils import epath
from jaxtyping import Float

from easylm_jax.evals.results import (
    align,
    coverage,
    is_perplexity,
    is_share,
    is_whole,
    read_results,
    read_samples,
    read_settings,
    transform,
    write_value,
)


class Paired(NamedTuple):
    """A metric of two runs on the n items that both have."""

    a: float
    b: float
    difference: float  # b less a; of perplexities log(b / a)
    stderr: float | None
    p: float
    n: int
    a_higher: int  # items that score higher in a: right there and wrong in b, or a higher loss
    b_higher: int


class Difference(NamedTuple):
    task: str
    metric: str
    paired: Paired
    p_holm: float | None  # of the task's headline, corrected over tasks


class Comparison(NamedTuple):
    a: str
    b: str
    differences: list[Difference]
    notes: dict[str, str]  # of a task: what it lacks and what was not paired, in words
    settings: dict[
        str, list[str]
    ]  # "dtype: A float32, B bfloat16", and the tasks of which it is so


def compare(folder_a: epath.PathLike, folder_b: epath.PathLike) -> Comparison:
    """Two --out folders, on the tasks, metrics and items that both have."""
    folders = (folder_a, folder_b)
    tasks_a, tasks_b = (read_results(folder)["tasks"] for folder in folders)
    runs = (("A", tasks_a), ("B", tasks_b))
    paired: dict[tuple[str, str], Paired] = {}
    notes_of: dict[str, str] = {}
    settings: dict[str, list[str]] = {}
    for task in [task for task in tasks_a if task in tasks_b]:
        a, b = ({s["id"]: s for s in read_samples(f, task)} for f in folders)
        same = [i for i in a if i in b and a[i]["prompt_hash"] == b[i]["prompt_hash"]]
        notes = [f"{name} has {coverage(of[task])}" for name, of in runs if not is_whole(of[task])]
        notes += _left_out(a, b, num_same=len(same))
        counted = [(name, of[task]["done"]) for name, of in runs if of[task]["done"] != len(same)]
        if counted:  # samples of an earlier start with a higher limit are there and are used
            notes.append(f"{len(same):,} in common are compared")
            notes += [f"{name}'s results.json counts {done:,}" for name, done in counted]
        for line in _differing(*(read_settings(folder, task) for folder in folders)):
            settings.setdefault(line, []).append(task)
        notes_of |= {task: ", ".join(notes)} if notes else {}
        for metric in _metrics([of[i] for of in (a, b) for i in same]):
            scores_a, scores_b = (_scores([of[i] for i in same], metric) for of in (a, b))
            usable = np.isfinite(scores_a + scores_b).all(axis=1)
            usable &= (scores_a * scores_b)[:, 1] != 0  # of weight 0: an item that says nothing
            if usable.any():
                paired[task, metric] = pair(metric, scores_a[usable], scores_b[usable])
    if not paired:
        raise ValueError(
            "expected items that both runs were asked with the same prompt, got none: "
            f"{folder_a} has {', '.join(tasks_a) or 'no task'}, {folder_b} has "
            f"{', '.join(tasks_b) or 'no task'}; evaluate both on the same tasks, shots and data"
        )
    headlines = {
        (task, metric): one.p
        for (task, metric), one in paired.items()
        if metric == tasks_a[task]["headline"] and not math.isnan(one.p)
    }
    p_holm = dict(zip(headlines, holm(list(headlines.values())), strict=True))
    differences = [Difference(*key, one, p_holm.get(key)) for key, one in paired.items()]
    return Comparison(str(folder_a), str(folder_b), differences, notes_of, settings)


def pair(metric: str, a: Float[np.ndarray, "N 2"], b: Float[np.ndarray, "N 2"]) -> Paired:
    """Of scores (sum, weight) of the same items in two runs."""
    n = len(a)
    ratio_a, ratio_b = (float(of[:, 0].sum() / of[:, 1].sum()) for of in (a, b))
    (value_a, _), (value_b, slope) = transform(metric, ratio_a), transform(metric, ratio_b)
    if is_perplexity(metric):
        slope = 1.0  # the difference of logarithms is that of the ratios
    # What each item contributes to either ratio (delta method); of plain means its own score.
    parts_a, parts_b = (
        (of[:, 0] - ratio * of[:, 1]) / of[:, 1].mean()
        for of, ratio in ((a, ratio_a), (b, ratio_b))
    )
    difference = slope * (ratio_b - ratio_a)
    stderr = float(slope * (parts_b - parts_a).std(ddof=1) / math.sqrt(n)) if n > 1 else None
    each_a, each_b = a[:, 0] / a[:, 1], b[:, 0] / b[:, 1]
    a_higher, b_higher = int((each_a > each_b).sum()), int((each_b > each_a).sum())
    if _is_right_or_wrong(a) and _is_right_or_wrong(b):
        p = mcnemar(a_higher, b_higher)
    else:
        p = student(difference, stderr, n)
    return Paired(value_a, value_b, difference, stderr, p, n, a_higher, b_higher)


def mcnemar(a_only: int, b_only: int) -> float:
    """Exact and two-sided: of the items that flipped, would a fair coin divide them so?"""
    flipped = a_only + b_only
    return float(scipy.stats.binomtest(a_only, flipped).pvalue) if flipped else 1.0


def student(difference: float, stderr: float | None, n: int) -> float:
    if difference == 0:
        return 1.0
    if stderr is None:
        return math.nan
    if stderr == 0:  # every item differs by the same
        return 0.0
    return float(2 * scipy.stats.t.sf(abs(difference) / stderr, n - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): one of k tests that mean nothing errs as often as one."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        corrected[i] = highest
    return corrected


def format_comparison(comparison: Comparison) -> str:
    """For the terminal."""
    rows = [["task", "metric", "A", "B", "B - A", "± paired", "n", "A>B", "B>A", "p", "p Holm"]]
    for task, metric, paired, p_holm in comparison.differences:
        values = [write_value(metric, value) for value in (paired.a, paired.b)]
        scale, digits = (100, 1) if is_share(metric) else (1, 4)
        stderr = "" if paired.stderr is None else f"{scale * paired.stderr:.{digits}f}"
        change = f"{scale * paired.difference:+.{digits}f}"
        flips = [f"{x:,}" for x in (paired.n, paired.a_higher, paired.b_higher)]
        ps = ["" if p is None else write_p(p) for p in (paired.p, p_holm)]
        mark = " (log B/A)" if is_perplexity(metric) else ""
        rows.append([task, metric + mark, *values, change, stderr, *flips, *ps])
    notes = [f"{task}: {words}" for task, words in comparison.notes.items()]
    notes += [f"{line} ({', '.join(tasks)})" for line, tasks in comparison.settings.items()]
    head = f"A = {comparison.a}\nB = {comparison.b}"
    return "\n\n".join([head, align(rows, left=(0, 1)), *(["\n".join(notes)] if notes else [])])


def write_p(p: float) -> str:
    if math.isnan(p):
        return "?"
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" if p >= 1e-99 else "<1e-99"


def _left_out(a: Mapping[str, Any], b: Mapping[str, Any], *, num_same: int) -> list[str]:
    common = len(a.keys() & b.keys())
    facts = [
        (common - num_same, "asked with other prompts"),
        (len(a) - common, "only in A"),
        (len(b) - common, "only in B"),
    ]
    return [f"{number:,} left out, {what}" for number, what in facts if number]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Settings beside the model itself, a line each."""
    flat_a, flat_b = (
        {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
        | {
            f"{k}.{key}": x
            for k, of in settings.items()
            if isinstance(of, Mapping)
            for key, x in of.items()
        }
        for settings in (a, b)
    )
    return [
        f"{key}: A {_plain(flat_a.get(key))}, B {_plain(flat_b.get(key))}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if key != "fingerprint" and flat_a.get(key) != flat_b.get(key)
    ]


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _metrics(samples: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those that every sample has."""
    found = [sample["scores"] for sample in samples]
    return [metric for metric in found[0] if all(metric in one for one in found)] if found else []


def _scores(samples: Sequence[Mapping[str, Any]], metric: str) -> Float[np.ndarray, "N 2"]:
    return np.array([s["scores"][metric] for s in samples], np.float64)  # null becomes nan


def _is_right_or_wrong(scores: Float[np.ndarray, "N 2"]) -> bool:
    sums, weights = scores.T
    return bool(((sums == 0) | (sums == 1)).all() and (weights == 1).all())
