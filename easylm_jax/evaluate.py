"""Evaluate a model on tasks.

    python -m easylm_jax.evaluate --model=PATH --tasks=llama1 --data=DIR --out=DIR
    python -m easylm_jax.evaluate --compare A B

`--tasks` are names, YAML files, text:GLOB, or recipes, which are lists of tasks with published
numbers; `--list_tasks` shows them. OUT gets samples/<task>.jsonl, results.json and report.html;
the same command goes on where a killed one was. `--base` also evaluates the model that this one was
fine-tuned from, in OUT/base, and puts both in one table. Answers to chat tasks are judged by
`--judge`, against those of `--against`.

What it is not: the tasks (`evals/task.py`), the asking (`evals/runner.py`) or the arithmetic
(`evals/results.py`).
"""

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import os
import shlex
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from easylm_jax.array_types import Params
from easylm_jax.config import is_for_user, run_main
from easylm_jax.evals.chat_answers import (
    Answers,
    Question,
    questions_of,
    read_answers,
    save_answers,
)
from easylm_jax.evals.code import require_permission
from easylm_jax.evals.compare import compare, format_comparison
from easylm_jax.evals.jobs import Prepared, plan, prepare
from easylm_jax.evals.judge import BIASED, Judge, parse_judge
from easylm_jax.evals.judgements import file_name, grade, judge_pairs
from easylm_jax.evals.panel import format_panel, panel
from easylm_jax.evals.recipes import find_recipe, recipe_names
from easylm_jax.evals.results import (
    Row,
    SampleFile,
    format_table,
    headline_row,
    read_results,
    read_samples,
    summarise,
    to_json,
    write_results,
    write_stderr,
    write_value,
)
from easylm_jax.evals.runner import run_items, still_asked, with_shots_that_fit
from easylm_jax.evals.task import find_task, task_names
from easylm_jax.evals.win_rate import Game, elo
from easylm_jax.language_model import LanguageModel
from easylm_jax.loading import load, open_model
from easylm_jax.models.llama import FloatName
from easylm_jax.progress import Progress, format_duration
from easylm_jax.text.template import ChatTemplate, find_template
from easylm_jax.tree import named_leaves

WRITE_SECONDS = 15.0  # between results.json of a task that is not whole yet


# ---- one model ----------------------------------------------------------------------------------


def evaluate(
    lm: LanguageModel, prepared: Sequence[Prepared], out: str, *, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Ask everything, write samples and results.json, and return what the latter holds.

    Samples of an earlier start with the same settings in `facts` are not asked for again, and tasks
    of an earlier start stay in results.json. A task that fails is reported and the others go on.
    """
    results = {**_earlier(out, facts), **facts}
    results["tasks"] |= {p.job.name: _result_of(p, [], 0.0) for p in prepared}
    for one in prepared:
        name = one.job.name
        try:
            if not one.reason:
                for result in _run(lm, one, out, settings=facts["settings"]):
                    results["tasks"][name] = result
                    write_results(out, results)
        except Exception as error:  # of whatever kind: hours of other tasks depend on going on
            results["tasks"][name] |= {"status": "failed", "reason": _reason(error)}
        print(f"{name}: {_in_short(results['tasks'][name])}", flush=True)
    write_results(out, results)
    return results


def _reason(error: Exception) -> str:
    """Why a task failed, in a sentence; of a bug the traceback is shown at once."""
    if is_for_user(error):
        return str(error)
    traceback.print_exception(error)
    return f"a bug, {type(error).__name__}: {error}"


def _earlier(out: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier start left of tasks and judgements, made with the same model and settings."""
    if not os.path.exists(os.path.join(out, "results.json")):
        return {"tasks": {}}
    earlier = read_results(out)
    for key, value in facts["settings"].items():
        if (before := earlier["settings"].get(key)) != value:
            raise ValueError(
                f"{out} has results of {earlier['model']} with {key} {before}, expected {value}: "
                "give another --out"
            )
    return {name: value for name, value in earlier.items() if name != "panel"}


def _run(
    lm: LanguageModel, one: Prepared, out: str, *, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The task's part of results.json, every so often and at the end."""
    job, start, shown = one.job, time.monotonic(), time.monotonic()
    names = ("generate", "unconditional", "code", "chat")  # of what no prompt's hash knows
    asked = {name: dataclasses.asdict(job.task)[name] for name in names}
    items, shortened = with_shots_that_fit(
        lm, job.task, one.items, shots=job.shots, ask_with=one.ask_with
    )
    one = dataclasses.replace(one, items=items, shortened=shortened)
    with SampleFile(out, job.name, settings={**settings, **asked}) as file:
        samples = still_asked(job.task, items, file.known)
        known = {sample["id"]: sample for sample in file.known}
        file.write(s for s in samples if s["scores"] != known[s["id"]]["scores"])
        progress = Progress(len(items), len(samples), label=job.name)
        answered = {sample["id"] for sample in samples}
        left = [item for item in items if item.id not in answered]
        # Without permission `prepare` leaves nothing to ask.
        for new in run_items(lm, job.task, left, allow_code_execution=True):
            file.write(new)
            samples += new
            progress.update(len(samples))
            if time.monotonic() - shown > WRITE_SECONDS:
                yield _result_of(one, samples, time.monotonic() - start)
                shown = time.monotonic()
        progress.close()
    yield _result_of(one, samples, time.monotonic() - start)


def _result_of(one: Prepared, samples: Sequence[Mapping[str, Any]], seconds: float) -> dict:
    task = one.job.task
    status = "whole" if one.items and len(samples) == len(one.items) else "partial"
    return {
        "status": "failed" if one.reason else status,
        "done": len(samples),
        "total": len(one.items),
        "available": one.available,
        "reason": one.reason,
        "shortened": one.shortened,  # items with fewer shots, to fit the context
        "seconds": seconds,
        "kind": task.kind,
        "about": task.about,
        "headline": task.headline,
        "categories": dict(task.categories),
        "rows": summarise(task, samples, shots=one.job.shots) if samples else [],
        "published": list(one.job.published),
    }


def _in_short(result: Mapping[str, Any]) -> str:
    row = headline_row(to_json(result))
    if result["status"] == "failed" or row is None:
        return f"FAILED: {result['reason']}"
    value = write_value(row["metric"], row["value"])
    stderr = write_stderr(row["metric"], row["stderr"])
    took = format_duration(result["seconds"])
    fewer = f"; {result['shortened']:,} prompts have fewer shots, to fit the model's context"
    end = fewer if result["shortened"] else ""
    return f"{row['metric']} {value}{f' ± {stderr}' if stderr else ''}  ({took}){end}"


def fingerprint(params: Params) -> str:
    """Of a model, by the first 64 numbers of each of its arrays: any training changes them."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(params).items()):
        few = leaf[(0,) * (leaf.ndim - 1)][:64]
        digest.update(name.encode() + np.asarray(few).tobytes())
    return digest.hexdigest()[:12]


def evaluate_path(
    path: str,
    prepared: Sequence[Prepared],
    out: str,
    *,
    name: str,
    default: ChatTemplate | None = None,
    **how: str | None,
) -> tuple[dict[str, Any], ChatTemplate | None]:
    """Load the model at `path` and evaluate it; its answers to chat tasks are files in OUT, too.

    `default` is the template of a model without one. Returned are what results.json holds, and the
    template that was used.
    """
    print(f"loading {path} ...", flush=True)
    lm = load(path, **how)
    lm = dataclasses.replace(lm, template=lm.template or default)
    if lm.tokenizer is None:
        raise ValueError(f"{path} came without a tokenizer: name one with --tokenizer")
    template = lm.template.name if lm.template else None
    settings = {
        "dtype": lm.config.dtype,
        "template": template,
        "bos": lm.tokenizer.bos_id is not None,
        "context": lm.config.max_seq_len,
        "fingerprint": fingerprint(lm.params),  # last, as it depends on the type, too
    }
    facts = {
        "model": path,
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "settings": settings,
    }
    if template is None:
        reason = "the model came without a chat template: name one, such as --template=plain"
        prepared = [
            dataclasses.replace(p, items=[], reason=reason) if p.job.task.kind == "chat" else p
            for p in prepared
        ]
    results = evaluate(lm, prepared, out, facts=facts)
    for one in prepared:
        if one.job.task.kind == "chat" and (samples := read_samples(out, one.job.name)):
            kept = still_asked(one.job.task, one.items, samples)
            save_answers(os.path.join(out, "answers"), one.job.task, kept, model=name)
    return results, lm.template


# ---- judging ------------------------------------------------------------------------------------


def judge_chat(
    judge: Judge, prepared: Sequence[Prepared], out: str, *, data: str, against: Sequence[str]
) -> dict[str, Any]:
    """What the judge says of OUT's answers to chat tasks: beside those of others, or graded alone.

    `against` are files of answers, or --out folders of other models. With several, also Elo.
    """
    chat: dict[str, Any] = {}
    for one in prepared:
        name = one.job.name
        file = os.path.join(out, "answers", f"{name}.jsonl")
        if one.job.task.kind != "chat" or not os.path.exists(file):
            continue
        answers = read_answers(file)
        try:
            questions = questions_of(one.job.task, one.items, data)
        except ValueError as error:
            told = {"judge": judge.name, "against": "", "rows": [], "reason": _reason(error)}
            chat[name] = told
            print(f"{name}: not judged: {told['reason']}", flush=True)
            continue
        games: list[Game] = []
        for place in against or [""]:
            try:
                other = _answers_of(place, name) if place else None
                title = f"{name}, {other.model}" if len(against) > 1 else name
                if title in chat:
                    raise ValueError(f"{other.model!r} is the name of several: give each its own")
                rows, of_pair = _judge(judge, answers, other, questions, out, name)
                told = {"rows": rows, "against": other.model if other else "", "reason": ""}
                games += of_pair
            except (ValueError, OSError) as error:
                title = f"{name}, {place}" if len(against) > 1 else name
                told = {"rows": [], "against": "", "reason": _reason(error)}
                print(f"{title}: not judged: {told['reason']}", flush=True)
            chat[title] = {"judge": judge.name} | told
        if len(against) > 1 and games:
            ratings = {model: rating._asdict() for model, rating in elo(games).items()}
            chat[name] = {"judge": judge.name, "against": "", "rows": [], "elo": ratings}
    return chat


def _judge(
    judge: Judge,
    answers: Answers,
    other: Answers | None,
    questions: Sequence[Question],
    out: str,
    name: str,
) -> tuple[list[Row], list[Game]]:
    """The rows of one comparison, or of grades where there is no other, and its games."""
    calls = sum(len(question.turns) for question in questions) * (2 if other else 1)
    kept = f"{name}.{file_name(other.model) if other else 'grades'}.jsonl"
    kept = os.path.join(out, "judgements", kept)
    with counting(calls, label=f"judging {name}") as on_done:
        if other is None:
            return grade(judge, answers, questions, kept, on_done=on_done), []
        if other.model == answers.model:
            raise ValueError(f"both have answers of {other.model!r}: name this one with --name")
        report = judge_pairs(judge, answers, other, questions, kept, on_done=on_done)
        return report.rows, report.games


def _answers_of(place: str, task_name: str) -> Answers:
    if os.path.isdir(place):
        place = os.path.join(place, "answers", f"{task_name}.jsonl")
    return read_answers(place)


@contextlib.contextmanager
def counting(total: int, *, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar that is told how much more is done."""
    progress, done = Progress(total, label=label), 0

    def add(number: int) -> None:
        nonlocal done
        done += number
        progress.update(done)

    try:
        yield add
    finally:
        progress.close()


# ---- the command --------------------------------------------------------------------------------


def list_tasks() -> Iterator[str]:
    """A line for every recipe and task."""
    for name in recipe_names():
        recipe = find_recipe(name)
        yield f"{name:18} recipe of {len(recipe.entries)} tasks. {recipe.about}"
    for name in task_names():
        task = find_task(name)
        yield f"{name:18} {task.kind}, {task.shots} shots, {task.headline}. {task.about}"


def _check_paths(options: flags.FlagValues, *, has_chat: bool) -> None:
    """Whether all that is named is there, before hours of work."""
    for path in options.against:
        if not os.path.exists(path):
            raise ValueError(f"--against has {path}, where there is nothing")
    if (options.judge or options.against) and not has_chat:
        raise ValueError("none of --tasks is chat, which alone is judged; --list_tasks shows kinds")
    if options.against and not options.judge:
        raise ValueError("--against is for a judge: name one with --judge")
    is_path = options.judge and not options.judge.startswith(("http://", "https://"))
    judges = [options.judge] if is_path and options.judge not in BIASED else []
    for path in filter(None, (options.model, options.base, *judges)):
        open_model(path)


def main(argv: list[str]) -> None:
    """The command line."""
    options = flags.FLAGS
    if options.list_tasks:
        print("\n".join(list_tasks()))
        return
    if options.compare:
        folders = [options.compare, *argv[1:]]
        if len(folders) != 2:
            raise ValueError(f"--compare takes two --out folders, got {len(folders)}: {folders}")
        print(format_comparison(compare(*folders)))
        return
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; lists are joined by commas")
    if lacking := [n for n in ("model", "tasks", "out") if not options[n].value]:
        raise ValueError(f"--{lacking[0]} is needed; --help shows all that can be said")
    if options.template:
        find_template(options.template)  # before minutes of loading
    jobs = plan(options.tasks, shots=options.shots)
    _check_paths(options, has_chat=any(job.task.kind == "chat" for job in jobs))
    prepared = [
        prepare(job, options.data, limit=options.limit, allow_code=options.allow_code_execution)
        for job in jobs
    ]
    if any(one.job.task.kind == "code" and not one.reason for one in prepared):
        print(require_permission(options.allow_code_execution), flush=True)
    if all(one.reason for one in prepared):
        raise ValueError("; ".join(f"{one.job.name}: {one.reason}" for one in prepared))
    how = {
        "dtype": options.dtype,
        "template": options.template,
        "tokenizer": options.tokenizer,
        "mesh": options.mesh,
    }
    out, against = options.out, list(options.against)
    try:
        name = options.name or os.path.basename(os.path.abspath(options.model))
        results, template = evaluate_path(options.model, prepared, out, name=name, **how)
        gc.collect()  # the model's memory, before the next one
        if options.base:
            base = f"{out}/base"
            evaluate_path(options.base, prepared, base, name="base", default=template, **how)
            gc.collect()
            against.append(base)
        if options.judge:
            judge = parse_judge(options.judge, load=load)
            results["chat"] = judge_chat(judge, prepared, out, data=options.data, against=against)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if options.base:
        try:
            results["panel"] = panel(compare(f"{out}/base", out), results.get("chat", {}))
        except ValueError as error:
            print(f"nothing to compare with the base: {error}", flush=True)
    write_results(out, results)
    print(f"\n{format_table(results)}")
    if "panel" in results:
        print(f"\n{format_panel(results['panel'])}")
    try:
        from easylm_jax.evaluation_report import write_evaluation_report

        print(f"\nreport: {write_evaluation_report(out)}")
        if os.path.basename(os.path.abspath(out)).isdecimal():  # OUT/<step>
            print(f"curves: {write_evaluation_report(os.path.dirname(os.path.abspath(out)))}")
    except ImportError as error:
        print(f"\nno report: {error}")
    failed = [task for task in results["tasks"].values() if task["status"] == "failed"]
    if failed or any(told.get("reason") for told in results.get("chat", {}).values()):
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The model: a file or folder of any format.")
    flags.DEFINE_list("tasks", None, "Tasks and recipes; see --list_tasks.")
    flags.DEFINE_string("data", ".", "The folder of the tasks' data; errors say what is missing.")
    flags.DEFINE_string("out", None, "Where results go; what is there already is gone on with.")
    flags.DEFINE_integer("limit", None, "At most so many items of each task.", lower_bound=1)
    flags.DEFINE_integer(
        "shots", None, "Examples in the prompt; default: the task's.", lower_bound=0
    )
    flags.DEFINE_string("base", None, "The model this one was tuned from, to compare with.")
    flags.DEFINE_string("judge", None, "Of chat: a model, http(s)://HOST#MODEL, longest, always_a.")
    flags.DEFINE_list("against", [], "Answers of others: files, or --out folders.")
    flags.DEFINE_bool("allow_code_execution", False, "Run what the model writes, in a sandbox.")
    flags.DEFINE_string("name", None, "Of the model in tables; default: the last part of --model.")
    flags.DEFINE_string("template", None, "Of chat: a name or .json file; default: the model's.")
    flags.DEFINE_string("tokenizer", None, "For a model without one: a file, folder or model.")
    flags.DEFINE_string("mesh", None, "Such as 1,-1,1,1; default: parameters over all devices.")
    flags.DEFINE_enum("dtype", "float32", typing.get_args(FloatName), "Of the arithmetic.")
    flags.DEFINE_string("compare", None, "--compare A B: two --out folders, paired by item.")
    flags.DEFINE_bool("list_tasks", False, "Show the tasks and recipes there are.")
    run_main(main)
