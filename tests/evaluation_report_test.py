"""The page says what the files say, shows what is not whole as such, and runs nothing."""

import re

import numpy as np
import pytest

from easylm_jax.evals.results import SampleFile, summarise, write_results
from easylm_jax.evals.task import Task
from easylm_jax.evaluation_report import chance_of, picks, write_evaluation_report
from tests.report_test import EVIL, Page

SUBJECTS = {"STEM": ("physics", EVIL), "humanities": ("law",)}


def choice_samples(rng, n, *, groups=("",), letters=("A", "B", "C", "D")):
    for i in range(n):
        gold, log_probs = int(rng.integers(4)), [float(x) for x in -9 * rng.random(4)]
        yield {
            "id": str(i), "group": groups[i % len(groups)], "prompt_hash": f"{i:08x}",
            "request": {"prompt": f"{i}? {EVIL}", "continuations": [f" {x}" for x in letters]},
            "response": {"log_probs": log_probs}, "gold": gold,
            "scores": {"acc": [float(np.argmax(log_probs) == gold), 1]},
        }  # fmt: skip


def write_run(out, *, scale=1.0):
    """A whole task with subjects, one cut by a limit, perplexity, one that failed; chat, panel."""
    rng = np.random.default_rng(0)
    published = {"model": EVIL, "value": 0.351, "metric": "acc", "group": "", "shots": 5}
    published["source"] = "a paper"
    results = {"model": EVIL, "date": "2026-11-21T13:05:00+00:00", "command": f"run {EVIL}"}
    results |= {"settings": {"dtype": "float32", "template": None}, "tasks": {}}
    made = {
        "mmlu": (list(choice_samples(rng, 300, groups=("physics", "law", EVIL))), ("acc",), 300),
        "nq": (
            [
                {"id": str(i), "group": "", "prompt_hash": "0" * 8, "request": {"prompt": "who?"},
                 "response": {"texts": [f"it was {EVIL}"]}, "gold": ["he", "she"],
                 "scores": {"exact_match": [float(i % 10 == 0), 1]}}
                for i in range(50)
            ], ("exact_match",), 3610,
        ),
        "wiki": (
            [
                {"id": str(i), "group": "", "prompt_hash": "1" * 8, "request": {"prompt": EVIL},
                 "response": {"log_prob": -5.0, "num_tokens": 3}, "gold": {"words": 2, "bytes": 9},
                 "scores": {"word_perplexity": [2.0 * scale + i, 2]}}
                for i in range(3)
            ], ("word_perplexity",), 3,
        ),
    }  # fmt: skip
    for name, (samples, metrics, available) in made.items():
        with SampleFile(out, name, settings={}) as file:
            file.write(samples)
        kind = "choice" if name == "mmlu" else "generate"
        task = Task(name, "about", kind, (), metrics, metrics[0], categories=SUBJECTS)
        results["tasks"][name] = {
            "status": "whole", "done": len(samples), "total": len(samples), "reason": "",
            "available": available, "headline": metrics[0], "kind": kind, "about": EVIL,
            "rows": summarise(task, samples, shots=5), "seconds": 1.0, "categories": SUBJECTS,
            "published": [published] if name == "mmlu" else [],
        }  # fmt: skip
    failed = {"status": "failed", "done": 0, "total": 164, "available": 164, "rows": []}
    failed |= {"reason": f"no permission {EVIL}", "published": [], "headline": "pass@1"}
    results["tasks"]["humaneval"] = failed | {"kind": "code", "about": "", "seconds": 0.0}
    row = {"group": "", "shots": 0, "normaliser": "none", "prompt_hash": "", "n": 80}
    rows = [row | {"metric": "lc_win_rate", "value": 0.55, "stderr": 0.06}]
    rows += [row | {"metric": "parse_failures", "value": 0.0125, "stderr": None}]
    rows += [row | {"metric": "of_a_later_version", "value": 7.0, "stderr": 1.0}]
    elo = {"koala": {"rating": 1041.2, "low": 1020.0, "high": 1065.0, "games": 320}}
    results["chat"] = {
        "koala": {"judge": "longest", "against": "base", "rows": rows, "reason": ""},
        "mt": {"judge": "x", "against": "", "rows": [], "reason": f"no answer {EVIL}"},
        "all": {"judge": "x", "against": "", "rows": [], "elo": elo},
    }
    results["panel"] = {"columns": ["", "tuned"], "rows": [["style", f"12.5 {EVIL}"]]}
    write_results(out, results)
    return results


@pytest.fixture(scope="module")
def realistic(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    results = write_run(out)
    for step in (100, 2000):
        write_run(out / f"{step:08d}", scale=100 / step)  # as checkpoints are called
    return results, write_evaluation_report(out).read_text()


def test_the_page_says_what_the_files_say(realistic):
    results, html = realistic
    text = Page(html).text
    rows = {row.group: row for row in results["tasks"]["mmlu"]["rows"]}
    overall, macro, stem = rows[""], rows["mean over groups"], rows["STEM"]
    z = (overall.value - 0.351) / overall.stderr
    for fact in (
        "21 November 2026, 13:05 UTC · 4 tasks, of which 2 whole",
        "dtype float32 ",
        "PARTIAL nq : 50 of 3,610 items (a limit was set)",
        f"FAILED humaneval : no permission {EVIL} (0 of 164 items)",
        f"mmlu acc {overall.value:.1%}".replace("%", " %"),
        f"± {100 * overall.stderr:.1f} 300 5 none {overall.prompt_hash}",
        f"35.1 % ({100 * (overall.value - 0.351):+.1f}, z {z:+.1f})",
        f"{100 * macro.value:.1f} % ± {100 * macro.stderr:.1f} over 3 groups of equal weight",
        f"STEM {100 * stem.value:.1f} % ± {100 * stem.stderr:.1f}",
        "nq PARTIAL exact_match 10.0 % ± 4.3 50 of 3,610, PARTIAL",
        "word_perplexity 4.482",  # exp((6 + 3) / 6)
        "Win rate at equal length 55.0 % ± 6.0",
        "No verdict to be read 1.2 % of_a_later_version 7.000 ± 1",
        "koala 1041 1020 to 1065 320",
        "expected: [\"he\", \"she\"]",
        "Over checkpoints",
        f"run {EVIL}",
    ):  # fmt: skip
        assert fact in text, fact
    assert "template" not in text and "None" not in text and "nan" not in text
    assert len(re.findall('<div class="row">', html)) == 3
    # Wherever the cut task stands in a heading, a table or a plot, it is called so.
    assert len(re.findall(r"\bnq PARTIAL", text)) == 2


def test_marks_and_intervals_stand_where_the_numbers_are(realistic):
    results, html = realistic
    row = results["tasks"]["mmlu"]["rows"][0]
    strip = re.search(r'<td><div class="strip">(.*?)</div>', html, re.DOTALL)[1]
    lefts = dict(re.findall(r'class="(\w+)"[^>]*?left:([\d.]+)%', strip))
    assert float(lefts["chance"]) == 25 and float(lefts["mark"]) == 35.1
    assert float(lefts["dot"]) == pytest.approx(100 * row.value, abs=0.01)
    assert float(lefts["reach"]) == pytest.approx(100 * (row.value - 1.96 * row.stderr), abs=0.01)


def test_untrusted_text_is_shown_and_not_run(realistic):
    page = Page(realistic[1])
    assert page.text.count(EVIL) >= 10  # model, command, reasons, subject, prompts, answers, panel
    assert not page.tags & {"script", "img", "b>", "link", "iframe", "object", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action")
        if "href" in name:
            assert value.startswith("#m")
        if name == "style":
            assert re.fullmatch(r"[a-z:;0-9.,%\-() ]*", value)
    assert "default-src 'none'" in realistic[1]


def test_what_is_missing_is_left_out(tmp_path):
    results = write_run(tmp_path)
    results["tasks"] = {"wiki": results["tasks"]["wiki"]}
    del results["chat"], results["panel"]
    write_results(tmp_path, results)
    text = Page(write_evaluation_report(tmp_path).read_text()).text
    for word in ("published", "Chat", "tuning", "checkpoints", "group", "picked", "PARTIAL"):
        assert word not in text
    with pytest.raises(ValueError, match="expected the results of an evaluation in"):
        write_evaluation_report(tmp_path / "samples")


def test_chance_and_what_a_model_picks():
    rng = np.random.default_rng(1)
    samples = list(choice_samples(rng, 200))
    assert chance_of(samples) == 0.25
    two = {**samples[0], "request": {"pairs": [["a", "b"], ["c", "b"]]}}
    assert chance_of([samples[0], two]) == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert chance_of([{"request": {"prompt": "p"}}]) is chance_of([]) is None
    found = picks("mmlu", samples)["choices"]
    likeliest = [np.argmax(s["response"]["log_probs"]) for s in samples]
    np.testing.assert_allclose([c["picked"] for c in found], np.bincount(likeliest) / 2)
    np.testing.assert_allclose(
        [c["right"] for c in found], np.bincount([s["gold"] for s in samples]) / 2
    )
    assert picks("piqa", [*samples, *choice_samples(rng, 1, letters="WXYZ")]) is None
