"""Paired comparisons against hand values, scipy's own tests and a bootstrap."""

import math

import numpy as np
import pytest
import scipy.stats

from easylm_jax.evals.compare import compare, format_comparison, holm, mcnemar, pair
from easylm_jax.evals.results import SampleFile, write_results


def scores(values, weights=None):
    values = np.asarray(values, float)
    return np.stack([values, np.ones_like(values) if weights is None else weights], 1)


def test_mcnemar_by_hand():
    # 10 items flipped, 2 and 8: 2 * (1 + 10 + 45) / 2**10
    assert mcnemar(2, 8) == pytest.approx(112 / 1024)
    assert mcnemar(8, 2) == mcnemar(2, 8) and mcnemar(0, 0) == mcnemar(3, 3) == 1.0
    a = [1] * 2 + [0] * 8 + [1] * 30 + [0] * 60
    b = [0] * 2 + [1] * 8 + [1] * 30 + [0] * 60
    got = pair("acc", scores(a), scores(b))
    assert (got.p, got.a_higher, got.b_higher, got.n) == (pytest.approx(112 / 1024), 2, 8, 100)
    assert got.difference == pytest.approx(0.06)
    want = np.subtract(b, a).std(ddof=1) / 10
    assert got.stderr == pytest.approx(want)


def test_means_are_compared_as_by_scipys_paired_t():
    rng = np.random.default_rng(0)
    a = rng.random(80)
    b = a + rng.normal(0.02, 0.1, size=80)
    got = pair("reward", scores(a), scores(b))
    want = scipy.stats.ttest_rel(b, a)
    assert got.p == pytest.approx(want.pvalue)
    assert got.difference / got.stderr == pytest.approx(want.statistic)
    assert pair("reward", scores(a), scores(a)).p == 1.0
    assert math.isnan(pair("reward", scores(a[:1]), scores(b[:1])).p)


@pytest.mark.parametrize("metric", ["perplexity", "bits_per_byte"])
def test_perplexities_are_compared_by_their_logarithms(metric):
    """The error is that of a bootstrap over documents, and far below an unpaired one."""
    rng = np.random.default_rng(1)
    weights = rng.integers(50, 2000, size=200).astype(float)
    a = weights * np.exp(rng.normal(0, 0.3, size=200))
    b = a * np.exp(rng.normal(-0.02, 0.03, size=200))
    got = pair(metric, scores(a, weights), scores(b, weights))
    unit = 1 / math.log(2) if metric == "bits_per_byte" else 1.0
    assert got.difference == pytest.approx(unit * (b - a).sum() / weights.sum())
    draws = rng.integers(0, 200, size=(4000, 200))
    drawn = unit * (b - a)[draws].sum(1) / weights[draws].sum(1)
    assert got.stderr == pytest.approx(drawn.std(), rel=0.06)
    if metric == "perplexity":
        assert got.b / got.a == pytest.approx(math.exp(got.difference))


def test_holm_by_hand():
    # sorted 0.01 0.02 0.03 0.04: times 4, 3, 2, 1 is 0.04 0.06 0.06 0.04, and never falls
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def write_run(folder, tasks, *, status="whole", done=1, settings=None):
    """`tasks`: {name: {id: (prompt_hash, score)}}"""
    for name, items in tasks.items():
        with SampleFile(folder, name, settings=settings or {}) as file:
            file.write(
                {"id": i, "group": "", "prompt_hash": h, "scores": {"acc": [x, 1]}}
                for i, (h, x) in items.items()
            )
    facts = {"status": status, "done": done, "total": done, "available": done, "headline": "acc"}
    write_results(folder, {"tasks": dict.fromkeys(tasks, facts)})


def test_only_items_with_the_same_prompt_are_paired(tmp_path):
    rng = np.random.default_rng(2)
    items = {f"q{i}": (f"h{i}", float(rng.random() < 0.5)) for i in range(50)}
    flipped = {k: (h, 1 - x if k in ("q0", "q1") else x) for k, (h, x) in items.items()}
    write_run(tmp_path / "a", {"quiz": items, "gone": items})
    other = {**flipped, "q2": ("another", 1 - items["q2"][1]), "new": ("h", 1.0)}
    del other["q3"]
    write_run(tmp_path / "b", {"quiz": other, "new": items}, status="partial")
    found = compare(tmp_path / "a", tmp_path / "b")
    ((task, metric, paired, p_holm),) = found.differences
    assert (task, metric, paired.n, p_holm) == ("quiz", "acc", 48, paired.p)
    assert paired.a_higher + paired.b_higher == 2
    want = [x for k, (_, x) in items.items() if k not in ("q2", "q3")]
    assert paired.a == pytest.approx(np.mean(want))
    text = format_comparison(found)
    assert "B has 1 of 1, PARTIAL" in text and "1 left out, asked with other prompts" in text
    assert "1 left out, only in A" in text and "1 left out, only in B" in text


def test_other_settings_and_samples_that_results_do_not_count_are_told(tmp_path):
    """The samples of B are of an earlier start, its results of one with a lower --limit."""
    items = {f"q{i}": (f"h{i}", i % 2) for i in range(6)}
    settings = {"fingerprint": "a", "dtype": "float32", "generate": {"n": 1, "temperature": 0.0}}
    tasks = {"quiz": items, "koala": items}
    write_run(tmp_path / "a", tasks, done=6, settings=settings)
    settings = settings | {"fingerprint": "b", "generate": {"n": 1, "temperature": 0.7}}
    settings |= {"template": "plain"}
    write_run(tmp_path / "b", tasks, done=2, settings=settings)
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.notes["quiz"] == "6 in common are compared, B's results.json counts 2"
    lines = format_comparison(found).splitlines()[-2:]
    assert lines == [
        "generate.temperature: A 0.0, B 0.7 (quiz, koala)",
        "template: A null, B plain (quiz, koala)",
    ]
    again = compare(tmp_path / "a", tmp_path / "a")
    assert (again.notes, again.settings) == ({}, {})


def test_nothing_in_common_is_one_sentence(tmp_path):
    write_run(tmp_path / "a", {"quiz": {"q": ("h", 1.0)}})
    write_run(tmp_path / "b", {"quiz": {"q": ("i", 1.0)}})
    with pytest.raises(ValueError, match="same prompt, got none: .*a has quiz, .*b has quiz; eval"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="expected the results of an evaluation in"):
        compare(tmp_path / "a", tmp_path / "c")
