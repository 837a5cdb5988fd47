"""One page about one evaluation: `write_evaluation_report(OUT)` writes OUT/report.html.

What it is not: a dashboard, or a comparison of two runs (`evals/compare.py`). It reads what
evaluate.py left in OUT (results.json, samples/) and, where OUT has evaluations of several
checkpoints in OUT/<step>/, draws curves over them. One HTML file that needs nothing else.

Every text that comes from a file is untrusted; see `report.py`, which this page shares its look
and its plots with. What a run does not have is left out, and what is not whole is called PARTIAL
wherever it stands. The look lives in `evaluation_report.html.jinja`, the contents here.
"""

import datetime
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from easylm_jax.evals.results import (
    ALL,
    MACRO,
    Published,
    beside_published,
    coverage,
    headline_row,
    is_share,
    is_whole,
    measure_of,
    problems,
    published_sources,
    read_results,
    read_samples,
    shown_rows,
    why_not_whole,
    write_published,
    write_stderr,
    write_value,
    write_with_stderr,
)
from easylm_jax.report import (
    Line,
    Plot,
    Series,
    known_quantity,
    page_environment,
    plot_grid,
    write_page,
)

Task = Mapping[str, Any]  # of results.json
Samples = Sequence[Mapping[str, Any]]

EXAMPLES = 2  # of right and of wrong answers of each task
PROMPT_END = 700  # characters of a prompt shown: its end, where the question is
TEXT_LIMIT = 1500  # characters of an answer
Z95 = 1.96  # standard errors on either side of a 95 % interval


def write_evaluation_report(out_dir: epath.PathLike) -> epath.Path:
    """Write `<out_dir>/report.html` from what is there now and return its path."""
    environment = page_environment()
    out_dir = epath.Path(out_dir)
    folders = {int(p.name): p for p in out_dir.iterdir() if p.name.isdecimal()}
    by_step = {step: read_results(folders[step]) for step in sorted(folders)}
    has_own = (out_dir / "results.json").exists() or not folders
    newest = out_dir if has_own else folders[max(folders)]
    results = read_results(newest)
    samples = {name: read_samples(newest, name) for name in results["tasks"]}
    page = page_contents(results, samples=samples, by_step=by_step)
    path = out_dir / "report.html"
    write_page(path, environment.get_template("evaluation_report.html.jinja").render(page))
    return path


def page_contents(
    results: Mapping[str, Any],
    *,
    samples: Mapping[str, Samples],
    by_step: Mapping[int, Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything the template shows, as plain values, texts and SVG."""
    tasks = results["tasks"]
    chances = {name: chance_of(of_task) for name, of_task in samples.items()}
    models = list(dict.fromkeys(p["model"] for t in tasks.values() for p in t["published"]))
    return {
        "name": results["model"],
        "date": _date(results["date"]),
        "settings": {k: _plain(v) for k, v in results["settings"].items() if v is not None},
        "command": results["command"],
        "problems": problems(tasks),
        "num_tasks": len(tasks),
        "num_whole": sum(map(is_whole, tasks.values())),
        "strips": [_strip(n, t, models, chances.get(n)) for n, t in tasks.items() if _has_strip(t)],
        "models": models,
        "rows": [
            _table_row(name, task, row) for name, task in tasks.items() for row in _rows(task)
        ],
        "published": list(_published_rows(tasks, models)),
        "sources": published_sources(tasks).split("\n") if models else [],
        "groups": [g for n, t in tasks.items() if (g := _groups(n, t, chances.get(n)))],
        "picks": [p for n, t in tasks.items() if (p := picks(n, samples.get(n, [])))],
        "curves": _curves(by_step, chances),
        "chat": _chat_table(results.get("chat") or {}),
        "panel": results.get("panel"),
        "examples": [
            {"name": n, "about": t["about"], "of": shown}
            for n, t in tasks.items()
            if (shown := list(_examples(t, samples.get(n, []))))
        ],
    }


def _date(iso: str) -> str:
    return f"{datetime.datetime.fromisoformat(iso).astimezone(datetime.UTC):%-d %B %Y, %H:%M} UTC"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------------------- tasks


def _has_strip(task: Task) -> bool:
    row = headline_row(task)
    return row is not None and row["value"] is not None and is_share(row["metric"])


def _strip(name: str, task: Task, models: Sequence[str], chance: float | None) -> dict[str, Any]:
    """Our headline on a line from 0 to 100 %, beside what is published of the same measure."""
    row = headline_row(task)
    marks = [
        {
            "left": 100 * p.value,
            "number": models.index(p.model),
            "text": _hover(p),
            "is_same": p.difference is not None,
        }
        for p in beside_published(task)
        if (p.group, p.metric) == (ALL, row["metric"])
    ]
    return {
        "name": name,
        "note": f"{known_quantity(row['metric']).title}, {_shots(row['shots'])}",
        "partial": "" if is_whole(task) else coverage(task),
        "value": write_value(row["metric"], row["value"]),
        "marks": marks,
        "chance": 100 * chance if chance and row["metric"].startswith("acc") else None,
        **_interval(row),
    }


def _interval(row: Mapping[str, Any]) -> dict[str, float]:
    """Where a share and its 95 % interval stand, in percent of the line."""
    reach = Z95 * (row["stderr"] or 0.0)
    low, high = max(0.0, row["value"] - reach), min(1.0, row["value"] + reach)
    return {"at": 100 * row["value"], "low": 100 * low, "width": 100 * (high - low)}


def _hover(published: Published) -> str:
    shots = "" if published.shots is None else f", {_shots(published.shots)}"
    return f"{published.model}: {write_value(published.metric, published.value)}{shots}"


def _shots(shots: int) -> str:
    return f"{shots}-shot"


def _rows(task: Task) -> list[Mapping[str, Any] | None]:
    """Rows of the table; None stands for a task without any."""
    return [*shown_rows(task)] or [None]


def _table_row(name: str, task: Task, row: Mapping[str, Any] | None) -> dict[str, Any]:
    mark = "" if is_whole(task) else "failed" if task["status"] == "failed" else "partial"
    if row is None:
        return {"name": name, "is_first": True, "mark": mark, "reason": why_not_whole(task)}
    stderr = write_stderr(row["metric"], row["stderr"])
    return row | {
        "name": row["group"] or name,
        "is_first": row["group"] == ALL and row["metric"] == task["rows"][0]["metric"],
        "is_group": row["group"] != ALL,
        "is_headline": row["metric"] == task["headline"],
        "mark": mark,
        "value": write_value(row["metric"], row["value"]),
        "stderr": f"± {stderr}" if stderr else "",
        "n": coverage(task) if row["group"] == ALL else f"{row['n']:,}",
    }


def _published_rows(tasks: Mapping[str, Task], models: Sequence[str]) -> Iterator[dict[str, Any]]:
    for name, task in tasks.items():
        found = beside_published(task)
        for measure in dict.fromkeys(map(measure_of, found)):
            cells = {p.model: p for p in found if measure_of(p) == measure}
            title = known_quantity(measure.metric).title
            yield {
                "name": f"{name}, {measure.group}" if measure.group else name,
                "partial": not is_whole(task),
                "note": title if measure.shots is None else f"{title}, {_shots(measure.shots)}",
                "cells": [write_published(cells[m]) if m in cells else "" for m in models],
            }


def _groups(name: str, task: Task, chance: float | None) -> dict[str, Any] | None:
    """A bar per group of a task by its headline, the highest first."""
    categories = task.get("categories", {})
    rows = [
        row
        for row in task["rows"]
        if row["metric"] == task["headline"] and row["value"] is not None and row["group"] != ALL
    ]
    bars = [row for row in rows if row["group"] not in (MACRO, *categories)]
    if not bars or not is_share(task["headline"]):
        return None
    colour_of = {g: i for i, of_it in enumerate(categories.values()) for g in of_it}
    means = {row["group"]: row for row in rows}
    longest = max(one["low"] + one["width"] for one in map(_interval, bars))
    scale = 100 / (10 * math.ceil(longest / 10) or 100)  # weak models would leave half a line empty
    return {
        "name": name,
        "metric": known_quantity(task["headline"]).title,
        "partial": "" if is_whole(task) else coverage(task),
        "chance": scale * 100 * chance if chance else None,
        "end": f"{100 / scale:.0f} %",
        "over_groups": write_with_stderr(means.get(MACRO)),
        "over_items": write_with_stderr(headline_row(task)),
        "categories": [{"name": c, "value": write_with_stderr(means.get(c))} for c in categories],
        "bars": [
            {
                "name": row["group"].replace("_", " "),
                "value": write_value(row["metric"], row["value"]),
                "n": row["n"],
                "number": colour_of.get(row["group"], 0),
                **{key: scale * value for key, value in _interval(row).items()},
            }
            for row in sorted(bars, key=lambda row: -row["value"])
        ],
    }


# ---------------------------------------------------------------------------- samples


def chance_of(samples: Samples) -> float | None:
    """How often guessing is right: 1 / number of choices, on average; None where none are given."""
    asked = [sample["request"] for sample in samples]
    counts = [len(r.get("continuations") or r.get("pairs") or ()) for r in asked]
    if not counts or min(counts) < 2:
        return None
    return float(np.mean([1 / count for count in counts]))


def picks(name: str, samples: Samples) -> dict[str, Any] | None:
    """How often each of the answers that all items share (A, B, ...) was likeliest, and right.

    A weak model that picks one letter whatever is asked shows here.
    """
    shared = {tuple(sample["request"].get("continuations", ())) for sample in samples}
    if len(shared) != 1 or len(choices := shared.pop()) < 2:
        return None
    if not all(isinstance(sample["gold"], int) for sample in samples):
        return None
    picked = Counter(int(np.argmax(sample["response"]["log_probs"])) for sample in samples)
    right = Counter(sample["gold"] for sample in samples)
    share = 100 / len(samples)
    return {
        "name": name,
        "choices": [
            {"text": text.strip(), "picked": share * picked[i], "right": share * right[i]}
            for i, text in enumerate(choices)
        ],
    }


def _examples(task: Task, samples: Samples) -> Iterator[dict[str, Any]]:
    """A few right and wrong answers, or the best and the worst; which is as good as random."""
    metric = task["headline"]
    scored = [s for s in samples if metric in s["scores"] and None not in s["scores"][metric]]
    ratio = {s["id"]: s["scores"][metric][0] / (s["scores"][metric][1] or 1.0) for s in scored}
    mixed = sorted(scored, key=lambda sample: (sample["prompt_hash"], sample["id"]))
    if is_share(metric):
        parts = [
            ("right", [s for s in mixed if ratio[s["id"]] >= 0.5]),
            ("wrong", [s for s in mixed if ratio[s["id"]] < 0.5]),
        ]
    elif task["kind"] == "chat":
        parts = [("answer", mixed)]
    else:
        ordered = sorted(mixed, key=lambda sample: ratio[sample["id"]])
        parts = [("likeliest", ordered[:EXAMPLES]), ("least likely", ordered[::-1][:EXAMPLES])]
    for mark, of_part in parts:
        for sample in of_part[:EXAMPLES]:
            yield {"mark": mark, **_example(sample)}


def _example(sample: Mapping[str, Any]) -> dict[str, Any]:
    request, response, gold = sample["request"], sample["response"], sample["gold"]
    choices = request.get("continuations") or ["".join(pair) for pair in request.get("pairs", [])]
    prompt = request.get("prompt") or "\n\n".join(request.get("turns", []))
    shown = {
        "id": sample["id"],
        "group": sample["group"].replace("_", " "),
        "prompt": prompt if len(prompt) <= PROMPT_END else "…" + prompt[-PROMPT_END:],
        "choices": [],
        "texts": [],
        "gold": "",
    }
    if choices:
        log_probs = response["log_probs"]
        likeliest = int(np.argmax(log_probs))
        right = gold["labels"] if isinstance(gold, Mapping) else [i == gold for i in range(99)]
        shown["choices"] = [
            {
                "text": text.strip(),
                "log_prob": f"{p:.2f}",
                "is_right": r,
                "is_picked": i == likeliest,
            }
            for i, (text, p, r) in enumerate(zip(choices, log_probs, right, strict=False))
        ]
    else:
        texts = response.get("texts") or response.get("turns") or [_plain(response)]
        shown["texts"] = [text[:TEXT_LIMIT] for text in texts[:3]]
        shown["gold"] = _plain(gold)[:TEXT_LIMIT] if gold is not None else ""
    return shown


# ---------------------------------------------------------------------------- curves, chat


def _curves(
    by_step: Mapping[int, Mapping[str, Any]], chances: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """Headlines over checkpoints, one plot per metric; a task that is not whole has no point."""
    rows: dict[str, dict[str, list[tuple[int, Mapping[str, Any]]]]] = {}
    for step, results in by_step.items():
        for name, task in results["tasks"].items():
            row = headline_row(task)
            if row and row["value"] is not None and task["done"] == task["total"]:
                rows.setdefault(row["metric"], {}).setdefault(name, []).append((step, row))
    return plot_grid(
        [
            Plot(known_quantity(metric), {n: _line(p, chances.get(n)) for n, p in named.items()})
            for metric, named in rows.items()
        ]
    )


def _line(points: Sequence[tuple[int, Mapping[str, Any]]], chance: float | None) -> Line:
    steps = np.array([step for step, _ in points])
    values, errors = (
        np.array([float(row[key] or 0.0) for _, row in points]) for key in ("value", "stderr")
    )
    has_chance = points[0][1]["metric"].startswith("acc")
    return Line(Series(steps, values), Series(steps, errors), chance if has_chance else None)


JUDGED = {
    "win_rate": "Win rate",
    "won_share": "Questions won",
    "lost_share": "Questions lost",
    "lc_win_rate": "Win rate at equal length",
    "judge_score": "Grade, 1 to 10",
    "ties": "Ties",
    "words": "Words per answer",
    "words_a": "Words per answer",
    "words_b": "Words per answer of the other",
    "longer_wins": "Longer answer wins",
    "first_seat_share": "Answer shown first wins",
    "flips": "Verdict changes with the seats",
    "parse_failures": "No verdict to be read",
    "pairs_left_out": "Pairs left out for that",
}


def _chat_table(chat: Mapping[str, Any]) -> dict[str, Any] | None:
    """Judged tasks as columns; and ratings where there are several opponents."""
    if not chat:
        return None
    found = {
        name: {r["metric"]: r for r in told["rows"] if r["group"] == ALL}
        for name, told in chat.items()
        if told["rows"]
    }
    metrics = list(dict.fromkeys(metric for of_it in found.values() for metric in of_it))
    metrics = sorted(metrics, key=[*JUDGED, *metrics].index)
    heads = [
        {"name": name, "against": chat[name].get("against"), "judge": chat[name]["judge"]}
        for name in found
    ]
    return {
        "heads": heads,
        "rows": [
            {
                "title": JUDGED.get(metric, metric),
                "cells": [write_with_stderr(of_it.get(metric)) for of_it in found.values()],
            }
            for metric in metrics
        ],
        "failed": [(n, told["reason"]) for n, told in chat.items() if told.get("reason")],
        "elo": {name: told["elo"] for name, told in chat.items() if told.get("elo")},
    }
