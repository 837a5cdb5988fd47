"""Numbers against numpy and bootstraps, files against kills, and PARTIAL where it belongs."""

import json
import math
import os

import numpy as np
import pytest

from easylm_jax.evals.results import (
    ALL,
    MACRO,
    Row,
    SampleFile,
    beside_published,
    estimate,
    format_table,
    is_share,
    read_results,
    read_samples,
    summarise,
    to_json,
    write_results,
)
from easylm_jax.evals.task import Task

SETTINGS = {"model": "a", "dtype": "float32", "bos": True}


def make_task(**changes):
    facts = {"name": "quiz", "about": "", "kind": "choice", "data": (), "metrics": ("acc",)}
    return Task(**{**facts, "headline": "acc", **changes})


def make_sample(item_id, scores, group=""):
    return {
        "id": str(item_id), "group": group, "prompt_hash": f"{item_id:08x}",
        "request": {"prompt": "p"}, "response": {}, "gold": 0, "scores": scores,
    }  # fmt: skip


def make_result(rows, **changes):
    facts = {"status": "whole", "done": 40, "total": 40, "available": 40, "reason": ""}
    facts |= {"kind": "choice", "about": "", "headline": "acc", "published": [], "seconds": 1.0}
    return {**facts, "rows": rows, **changes}


def test_a_plain_mean_has_lm_evals_standard_error():
    rng = np.random.default_rng(0)
    x = rng.normal(size=500)
    got = estimate("acc", np.stack([x, np.ones(500)], 1))
    mean = sum(x) / 500  # as in lm_eval/api/metrics.py: sample_stddev(x) / sqrt(len(x))
    stderr = math.sqrt(sum((v - mean) ** 2 for v in x) / 499) / math.sqrt(500)
    np.testing.assert_allclose([got.value, got.stderr, got.n], [mean, stderr, 500], rtol=1e-12)


@pytest.mark.parametrize("metric", ["word_perplexity", "bits_per_byte", "share"])
def test_the_error_of_a_ratio_is_that_of_a_bootstrap(metric):
    rng = np.random.default_rng(1)
    weights = rng.integers(50, 2000, size=300).astype(float)
    nats = weights * np.exp(rng.normal(-0.3, 0.3, size=300))
    got = estimate(metric, np.stack([nats, weights], 1))
    draws = rng.integers(0, 300, size=(4000, 300))
    ratios = nats[draws].sum(1) / weights[draws].sum(1)
    make = {"word_perplexity": np.exp, "bits_per_byte": np.log2(np.e).__mul__, "share": np.array}
    values = make[metric](ratios)
    assert got.value == pytest.approx(float(make[metric](nats.sum() / weights.sum())), rel=1e-12)
    assert got.stderr == pytest.approx(values.std(), rel=0.06)  # 4,000 draws know it to 1 %


def test_rows_over_questions_groups_and_categories():
    rng = np.random.default_rng(2)
    sizes = {"law": 30, "logic": 7, "physics": 90}
    scores = {group: (rng.random(n) < 0.4).astype(float) for group, n in sizes.items()}
    samples = [
        make_sample(1000 * i + j, {"acc": [x, 1]}, group)
        for i, (group, of_it) in enumerate(scores.items())
        for j, x in enumerate(of_it)
    ]
    task = make_task(categories={"humanities": ("law", "logic"), "STEM": ("physics", "maths")})
    rows = {row.group: row for row in summarise(task, samples, shots=5)}
    assert list(rows) == [ALL, MACRO, "humanities", "STEM", "law", "logic", "physics"]
    everything = np.concatenate(list(scores.values()))
    humanities = np.concatenate([scores["law"], scores["logic"]])
    for group, x in {ALL: everything, "humanities": humanities, **scores}.items():
        want = x.mean(), x.std(ddof=1) / math.sqrt(len(x)), len(x)
        got = rows[group].value, rows[group].stderr, rows[group].n
        np.testing.assert_allclose(got, want, rtol=1e-12)
    errors = [x.std(ddof=1) / math.sqrt(len(x)) for x in scores.values()]
    assert rows[MACRO].value == pytest.approx(np.mean([x.mean() for x in scores.values()]))
    assert rows[MACRO].stderr == pytest.approx(np.linalg.norm(errors) / 3)
    assert rows[ALL].value != pytest.approx(rows[MACRO].value)
    assert len({row.prompt_hash for row in rows.values()}) == 5  # ALL is MACRO, STEM is physics
    assert rows[ALL].prompt_hash == summarise(task, samples[::-1], shots=5)[0].prompt_hash


def test_what_is_not_finite_or_not_known_says_so():
    task = make_task(metrics=("acc", "perplexity"))
    samples = [make_sample(i, {"acc": [1.0, 1], "perplexity": [None, 1]}) for i in range(3)]
    acc, perplexity = summarise(task, samples, shots=0)
    assert (acc.value, acc.stderr) == (1.0, 0.0)
    assert math.isnan(perplexity.value) and perplexity.stderr is None
    one = estimate("acc", np.array([[1.0, 1.0], [0.0, 0.0]]))  # of weight 0: it says nothing
    assert one == (1.0, None, 1)
    assert estimate("perplexity", np.array([[1e6, 1.0]])).value == math.inf
    text = format_table({"tasks": {"quiz": make_result([acc, perplexity])}})
    assert "not finite" in text and "nan" not in text and "None" not in text
    with pytest.raises(ValueError, match="task quiz: expected every sample to score 'f1', got"):
        summarise(make_task(metrics=("acc", "f1")), samples, shots=0)


def test_samples_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    samples = [make_sample(i, {"acc": [1.0, 1]}) for i in range(4)]
    with SampleFile(tmp_path, "quiz", settings=SETTINGS) as file:
        file.write(samples[:2])
        path = tmp_path / "samples" / "quiz.jsonl"
        assert len(path.read_bytes().splitlines()) == 2  # on disk before it is closed
    with path.open("a") as damaged:
        damaged.write('{"id": "2", "sco')
    assert read_samples(tmp_path, "quiz") == samples[:2]
    with SampleFile(tmp_path, "quiz", settings=dict(reversed(SETTINGS.items()))) as file:
        assert file.known == samples[:2]
        file.write([samples[2], {**samples[1], "gold": math.nan}])
    assert read_samples(tmp_path, "quiz") == [
        samples[0], {**samples[1], "gold": None}, samples[2],  # of an item the last line counts
    ]  # fmt: skip
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_samples_of_other_settings_are_refused(tmp_path):
    with SampleFile(tmp_path, "quiz", settings=SETTINGS):
        pass  # nothing was asked yet: other settings are fine
    with SampleFile(tmp_path, "quiz", settings=SETTINGS | {"bos": False}) as file:
        file.write([make_sample(0, {"acc": [1.0, 1]})])
    with pytest.raises(ValueError, match="made with bos = True, got some made with False; pass"):
        SampleFile(tmp_path, "quiz", settings=SETTINGS)


def test_damaged_files_are_named(tmp_path):
    with SampleFile(tmp_path, "quiz", settings=SETTINGS) as file:
        file.write([make_sample(i, {"acc": [1.0, 1]}) for i in range(3)])
    path = tmp_path / "samples" / "quiz.jsonl"
    for damage in ("{oops", "[1]", '{"a": 1}'):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], damage, lines[2]]) + "\n")
        with pytest.raises(ValueError, match="quiz.jsonl, line 2: expected the JSON of one sample"):
            read_samples(tmp_path, "quiz")
    with pytest.raises(ValueError, match="expected the results of an evaluation in .*results.json"):
        read_results(tmp_path)
    (tmp_path / "results.json").write_text('{"tasks": ')
    with pytest.raises(ValueError, match="results.json: expected JSON, got .*; delete it"):
        read_results(tmp_path)


def test_results_are_replaced_whole_and_valid_json(tmp_path):
    rows = summarise(make_task(), [make_sample(0, {"acc": [None, 1]})], shots=3)
    results = {"tasks": {"quiz": make_result(rows)}}
    write_results(tmp_path, results)
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == to_json(results)
    assert read_results(tmp_path)["tasks"]["quiz"]["rows"][0]["value"] is None
    os.link(tmp_path / "results.json", tmp_path / "opened before")
    write_results(tmp_path, {"tasks": {}})
    assert (tmp_path / "opened before").read_text() == text  # another file took its name
    assert read_results(tmp_path) == {"tasks": {}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"done": 12, "status": "partial"}, "12 of 40, PARTIAL"),
        ({"available": 1838}, "40 of 1,838, PARTIAL"),
        ({"status": "failed", "reason": "out of memory"}, "40 of 40, PARTIAL"),
        ({"status": "partial"}, "40 of 40, PARTIAL"),
    ],
)
def test_what_is_not_whole_never_looks_whole(changes, expected):
    published = [{"model": "M", "value": 0.5, "metric": "acc", "group": "", "shots": 0}]
    rows = summarise(make_task(), [make_sample(i, {"acc": [i % 2, 1]}) for i in range(40)], shots=0)
    result = make_result(rows, published=[{**published[0], "source": "S"}], **changes)
    text = format_table({"tasks": {"quiz": result}})
    assert text.count("PARTIAL") == (0 if expected is None else 2 + (result["status"] != "failed"))
    assert expected is None or expected in text
    assert ("FAILED quiz: out of memory" in text) == (result["status"] == "failed")


def test_published_numbers_are_compared_with_the_same_measure_only():
    samples = [make_sample(i, {"acc": [float(i % 4 == 0), 1]}, "gh"[i % 2]) for i in range(400)]
    rows = summarise(make_task(), samples, shots=5)
    numbers = [("", 5, 0.351), ("", 0, 0.351), ("g", None, 0.4), ("x", 5, 0.1)]
    published = [
        {"model": "M", "value": v, "metric": "acc", "group": g, "shots": s, "source": "S"}
        for g, s, v in numbers
    ]
    result = to_json(make_result(rows, published=published))
    same, other_shots, group, no_group = beside_published(result)
    stderr = math.sqrt(0.25 * 0.75 * 400 / 399) / 20
    assert same.difference == pytest.approx(-0.101) and same.z == pytest.approx(-0.101 / stderr)
    assert other_shots.difference is no_group.difference is None
    assert group.difference == pytest.approx(0.1)
    assert "35.1 % (-10.1, z -4.7)" in format_table({"tasks": {"quiz": result}})


def test_which_metrics_are_percent():
    shares = "acc acc_norm greedy_acc exact_match mc2 pass@10 maj@100 lc_win_rate parse_failures"
    others = "perplexity bits_per_byte words judge_score characters loss"
    assert all(map(is_share, shares.split())) and not any(map(is_share, others.split()))


def test_the_table_ends_with_what_a_judge_says():
    def row(metric, value, stderr, group=""):
        return Row(metric, value, stderr, 80, group, 0, "none", "h")

    rows = [
        row("flips", 0.1, 0.01),
        row("win_rate", 0.738, 0.05),
        row("win_rate", 1.0, 0.0, "math"),
    ]
    rows += [row("lc_win_rate", 0.629, 0.113), row("parse_failures", 0.0, None)]
    elo = {"m": {"rating": 1041.2, "low": 1020.0, "high": 1065.0, "games": 320}}
    chat = {
        "koala": {"judge": "longest", "against": "base", "rows": rows, "reason": ""},
        "mt": {"judge": "j", "against": "", "rows": [row("judge_score", 6.25, 0.2)], "reason": ""},
        "vicuna": {"judge": "j", "against": "", "rows": [], "reason": "it did not answer"},
        "all": {"judge": "j", "against": "", "rows": [], "elo": elo},
    }
    lines = format_table({"tasks": {}, "chat": chat}).splitlines()
    assert [" ".join(line.split()) for line in lines if not line.startswith("-")] == [
        "chat against judge judge_score win_rate lc_win_rate parse_failures",
        "koala base longest 73.8 % ± 5.0 62.9 % ± 11.3 0.0 %",
        "mt alone j 6.250 ± 0.2",
        "",
        "Elo model rating 95 % games",
        "all m 1041 1020 to 1065 320",
        "",
        "NOT JUDGED vicuna: it did not answer",
    ]
    assert format_table({"tasks": {}}) == ""
