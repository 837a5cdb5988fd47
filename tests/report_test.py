"""The report says what the files say, shows nothing that is not there, and runs nothing."""

import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from easylm_jax import metrics, report
from easylm_jax.report import Series

EVIL = "<script>alert(1)</script> \U0001f98a <img src=https://x.test/a onerror=b> {{7*7}} &amp; $x$"
SPIKE_STEP = 1500


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page, and that every element is closed."""

    VOID = {"meta", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = set(), [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.words.append(data)


def write_realistic_run(workdir, rng, monkeypatch):
    """Noise, one spike of three lines, a kill and a resume after two hours, 3 sources, 2 sets."""
    now = [1.79e9]
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])
    for first, last, resume_step in ((0, 2100, -1), (2010, 3000, 2000)):
        log = metrics.MetricLog(workdir, resume_step=resume_step)
        for step in range(first, last + 1, 10):
            now[0] += 2.0
            spike = 3.0 if SPIKE_STEP <= step < SPIKE_STEP + 30 else 0.0
            loss = 2 + 8 * math.exp(-step / 200) + 0.05 * rng.normal() + spike
            row = {"train/loss": loss, "train/grad_norm": 1 + 0.1 * rng.normal()}
            row |= {"train/learning_rate": 3e-4, "perf/tokens_per_s": 1e5 + 1e3 * rng.normal()}
            row |= {"perf/data_wait_share": 0.002, "guard/skipped": float(step == SPIKE_STEP)}
            for name, weight in (("web", 70), ("code/py", 20), (EVIL, 10)):
                row |= {f"data/{name}/tokens": step * weight, f"data/{name}/epochs": step / 1000}
            log.write(step, row | {"model/parameters": 6_738_415_616, "router/load": loss})
            if step % 500 == 0:
                log.write(step, {"eval/wiki/bits_per_byte": 4 - step / 1000, "eval/wiki/loss": 3.0})
                log.write(step, {"eval/<b>own</b>/loss": 5 - step / 1000})
                log.write_text(step, [{"prompt": EVIL, "text": f"is {EVIL} at {step} \ud83d\x00"}])
        log.close()
        now[0] += 7200
    (workdir / "config.json").write_text(
        json.dumps({"seed": 7, "model": {"rope": {"theta": 1e4}}, "data": {"name": EVIL}})
    )
    (workdir / "command.txt").write_text(
        "the first start\npython -m easylm_jax.train --workdir='a b' && <x>\n"
    )


@pytest.fixture(scope="module")
def realistic(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "llama <7b>"
    with pytest.MonkeyPatch.context() as monkeypatch:
        write_realistic_run(workdir, np.random.default_rng(0), monkeypatch)
    return report.write_report(workdir).read_text()


def test_the_page_says_what_the_files_say(realistic):
    text = Page(realistic).text
    for fact in (
        "llama <7b>",
        "Up to step 3,000",
        "1.00 bits per byte from 4.00 at step 0",
        "2.00 nats per token from 5.00 at step 0",  # the set that has only a loss
        "Tokens seen 300 k",
        "Parameters 6.74 B",
        # Left are 300 gaps of 2 s less the one gap that is the pause.
        "Time 9 min 58 s one pause left out",
        "loss spike (1)",
        "update skipped (1)",
        "wiki 4.000 → 1.000 3.000",
        "web 70.0 % 210,000 3.00",
        "code/py 20.0 % 60,000 3.00",
        "router/load",
        "seed 7",
        "rope.theta 10000.0",
        "python -m easylm_jax.train --workdir='a b' && <x>",
    ):
        assert fact in text
    assert re.search(r"Training loss (1\.9|2\.0)\d nats per token from 10\.\d\d at step 0", text)
    assert "the first start" not in text
    assert text.count("at 2000") == 0  # of the samples the first and the last alone


def test_untrusted_text_is_shown_and_not_run(realistic):
    page = Page(realistic)
    shown = f"is {EVIL} at 3000 ?\ufffd"  # a lone surrogate and a control character, made harmless
    assert " ".join(shown.split()) in page.text
    assert page.text.count(EVIL) >= 5  # source, configuration, prompt, two continuations
    assert not page.tags & {"script", "img", "b>", "link", "iframe", "object", "base", "form"}
    for name, value in page.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action")
        if "href" in name:
            assert value.startswith("#m")  # markers inside the SVG
        assert "http:" not in value and "https:" not in value
    assert "default-src 'none'" in realistic
    assert "@import" not in realistic and not re.search(r"url\((?!#)", realistic)


def test_plots_follow_the_page_in_light_and_dark(realistic):
    plots = re.findall("<svg.*?</svg>", realistic, flags=re.DOTALL)
    assert len(plots) >= 8
    for plot in plots:
        assert "var(--line0)" in plot and "var(--muted)" in plot
        assert not re.search(r"(fill|stroke|color): ?#", plot)
        assert set(re.findall("<text[^>]*>([^<]*)</text>", plot))
        for label in re.findall("<text[^>]*>([^<]*)</text>", plot):
            assert re.fullmatch(r"-?[0-9.,e\-−]+( [kMB%])?", label)
        ids = re.findall(r'href="#(\w+)"|url\(#(\w+)\)', plot)
        assert {a or b for a, b in ids} <= set(re.findall(r'id="(\w+)"', plot))


def test_what_is_missing_is_left_out(tmp_path):
    log = metrics.MetricLog(tmp_path)
    log.write(0, {"train/loss": 10.0, "data/web/tokens": 0.0})
    log.close()
    one = Page(report.write_report(tmp_path).read_text())
    assert "Training loss 10.00 nats per token" in one.text and "svg" not in one.tags
    for step in range(1, 5):
        log = metrics.MetricLog(tmp_path)
        log.write(step, {"train/loss": 10.0 - step})
        log.close()
    few = Page(report.write_report(tmp_path).read_text())
    assert "svg" in few.tags
    for word in ("Held", "Sample", "data", "Speed", "More", "Config", "Continue", "nan", "None"):
        assert word not in few.text.replace("Drawn from metrics.jsonl", "")


def test_a_run_that_never_was_finite(tmp_path):
    log = metrics.MetricLog(tmp_path)
    for step in range(3):
        log.write(step, {"train/loss": math.nan, "eval/a/loss": math.inf, "eval/b/loss": 2.0})
    log.close()
    text = Page(report.write_report(tmp_path).read_text()).text
    assert "Training loss not finite" in text and "Held out: a not finite" in text
    assert "b 2.000" in text and "nan" not in text


def test_errors_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected metrics in .*metrics.jsonl, found none: pass"):
        report.write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 0, "train/loss": 1}\n')
    (tmp_path / "config.json").write_text('{"a": 1,\n "b"')
    with pytest.raises(ValueError, match="config.json, line 2: expected JSON, got"):
        report.write_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install 'easylm_jax\\[report\\]'"):
        report.write_report(tmp_path)


def test_main_ends_with_the_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: expected metrics in"):
        report.main(str(tmp_path))


@pytest.mark.slow  # starts an interpreter
def test_command_line_of_an_empty_workdir(tmp_path):
    command = [sys.executable, "-m", "easylm_jax.report", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch("error: expected metrics in .*\n", done.stderr)


def test_smooth_is_a_moving_median():
    rng = np.random.default_rng(1)
    values = rng.normal(size=300)
    got = report.smooth(Series(np.arange(300) * 10, values))
    want = [np.median(values[max(0, i - min(5, i)) : i + min(5, i) + 1]) for i in range(300)]
    np.testing.assert_array_equal(got.values, want)
    np.testing.assert_array_equal(got.steps, np.arange(300) * 10)
    values[::7] = math.nan
    assert np.isfinite(report.smooth(Series(np.arange(300), values)).values).all()


def test_thin_keeps_every_extreme():
    values = np.random.default_rng(2).normal(size=50_000)
    values[[17, 31_234]] = [99, -99]
    thinned = report.thin(Series(np.arange(50_000), values))
    assert len(thinned.steps) <= report.MAX_POINTS and np.all(np.diff(thinned.steps) > 0)
    assert {17, 31_234} <= set(thinned.steps)
    np.testing.assert_array_equal(thinned.values, values[thinned.steps])


def test_spikes_are_found_and_noise_is_not():
    rng = np.random.default_rng(3)
    steps = np.arange(0, 20_000, 10)
    loss = 2 + 8 * np.exp(-steps / 1000) + 0.1 * rng.normal(size=steps.size)
    assert len(report.find_spikes(Series(steps, loss))) == 0
    loss[[700, 701, 702, 1500]] += 2
    loss[[900, 901]] = math.nan
    np.testing.assert_array_equal(report.find_spikes(Series(steps, loss)), [7000, 9000, 15000])


def test_the_frame_lets_only_a_steep_start_out():
    steps = np.arange(500)
    falling = Series(steps, 2 + 8 * np.exp(-steps / 5))
    low, high = report.frame([falling], "falling")
    assert low < 2 and high < 4
    low, high = report.frame([falling], "fit")
    assert low < 2 and high > 9
    straight = Series(steps, 10 - steps / 100)
    low, high = report.frame([straight], "falling")
    assert low < 5.01 and high > 9.9
    assert report.frame([Series(steps, 5 + 0.01 * steps)], "zero")[0] == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (report.amount(999), "999"), (report.amount(12_345), "12.3 k"),
        (report.amount(6_738_415_616), "6.74 B"), (report.amount(1.4e12), "1.40 T"),
        (report.count(12_345.4), "12,345"), (report.percent(0.485), "48.5 %"),
        (report.percent(0.0012), "0.12 %"), (report.write_number(1.2344, "number"), "1.234"),
        (report.write_number(3e-4, "tiny"), "3e-4"), (report.write_number(0.0, "tiny"), "0"),
        (report.write_number(2.5e-5, "number"), "2.5e-5"),
        (report.write_number(math.nan, "percent"), "not finite"),
    ],
)  # fmt: skip
def test_numbers_as_text(text, expected):
    assert text == expected


def test_tasks_have_a_band_and_a_level_of_chance(tmp_path):
    log = metrics.MetricLog(tmp_path)
    for step in (0, 100, 200):
        row = {"acc_norm": 0.25 + step / 1000, "acc_norm_stderr": 0.02, "chance": 0.25}
        log.write(step, {f"eval/quiz/{name}": value for name, value in row.items()})
        log.write(step, {"eval/web/loss": 3.0 - step / 1000})
    log.close()
    html = report.write_report(tmp_path).read_text()
    text = Page(html).text
    assert "Accuracy, length-normalised" in text and "quiz 25.0 % → 45.0 % ± 2.0 %" in text
    assert "chance" not in text and "Held out 2.80" in text  # the tile is the text's alone
    plot = next(svg for svg in re.findall("<svg.*?</svg>", html, re.DOTALL) if "%" in svg)
    assert len(re.findall("fill-opacity|opacity: 0.15", plot)) == 1
    band = Series(np.array([1]), np.array([0.1]))
    line = report.Line(Series(np.arange(3), np.full(3, 0.5)), band, 0.25)
    low, high = report.frame(list(report.extent(report.finite(line))), "fit")
    assert low < 0.25 and high > 0.6
