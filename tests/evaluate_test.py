"""The command: what a run leaves behind, how it goes on, and what it says when it cannot."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import easylm_jax
from easylm_jax import evaluate as command
from easylm_jax.convert import write_native
from easylm_jax.data.source import DataConfig
from easylm_jax.evals import runner
from easylm_jax.evals.jobs import plan, prepare
from easylm_jax.evals.judge import parse_judge
from easylm_jax.evals.results import problems, read_results, read_samples
from easylm_jax.evaluate import evaluate_path, judge_chat
from easylm_jax.measurements import measured_tasks
from easylm_jax.metrics import read_metrics
from easylm_jax.optim import OptimConfig
from easylm_jax.text.tokenizer import ByteTokenizer
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig, train
from tests.command import write_text
from tests.loading_test import random_model
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
DATA = str(ROOT / "experiments/quickstart/eval")
CONFIG = tiny_config(vocab_size=264, max_seq_len=4096)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("model") / "tiny")
    write_native(random_model(CONFIG, tokenizer=ByteTokenizer()), folder)
    return folder


def prepared(*tasks, limit=6, allow_code=False, data=DATA, shots=None):
    jobs = plan(tasks, shots=shots)
    return [prepare(job, data, limit=limit, allow_code=allow_code) for job in jobs]


def run(model, out, *tasks, **options):
    jobs = prepared(*tasks, **options)
    return evaluate_path(model, jobs, str(out), name="tiny", template="plain")[0]


def headline(results, task):
    rows = results["tasks"][task]["rows"]
    return next(r for r in rows if r.metric == results["tasks"][task]["headline"])


def test_accuracy_is_that_of_one_likelihood_at_a_time(model, tmp_path):
    results = run(model, tmp_path, "hellaswag")
    lm = easylm_jax.load(model)
    right = []
    for item in prepared("hellaswag")[0].items:
        found = [lm.loglikelihood([pair])[0].log_prob for pair in item.pairs]
        lengths = [len(continuation) - 1 for _, continuation in item.pairs]
        right.append(np.argmax(np.array(found) / lengths) == item.gold)
    row = headline(results, "hellaswag")
    assert (row.value, row.n) == (np.mean(right), 6)
    assert row.stderr == pytest.approx(np.std(right, ddof=1) / 6**0.5)
    task = read_results(tmp_path)["tasks"]["hellaswag"]
    assert (task["done"], task["total"], task["available"]) == (6, 6, 100)


def test_a_killed_run_goes_on_and_ends_with_the_same_samples(model, tmp_path, monkeypatch):
    monkeypatch.setitem(runner.CHUNK, "choice", 2)
    whole = run(model, tmp_path / "whole", "hellaswag", limit=8)
    asked, ask = [], runner.choice.ask

    def ask_and_die(lm, task, items, **options):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(item.id for item in items)
        return ask(lm, task, items, **options)

    monkeypatch.setattr(runner.choice, "ask", ask_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "killed", "hellaswag", limit=8)
    with (tmp_path / "killed/samples/hellaswag.jsonl").open("a") as file:
        file.write('{"id": "half a li')  # as a kill leaves it
    asked.append("no more deaths")
    again = run(model, tmp_path / "killed", "hellaswag", limit=8)
    assert len(asked) == 5 + 4 and len(set(asked)) == 9
    first, second = (
        sorted(read_samples(tmp_path / name, "hellaswag"), key=lambda s: s["id"])
        for name in ("whole", "killed")
    )
    assert first == second
    assert whole["tasks"]["hellaswag"]["rows"] == again["tasks"]["hellaswag"]["rows"]


def test_tasks_of_an_earlier_start_stay_and_another_model_is_refused(model, tmp_path):
    run(model, tmp_path, "hellaswag", limit=2)
    run(model, tmp_path, "mmlu", limit=6)
    assert read_results(tmp_path)["tasks"].keys() == {"hellaswag", "mmlu"}
    other = str(tmp_path / "other")
    write_native(
        random_model(dataclasses.replace(CONFIG, d_ff=64), tokenizer=ByteTokenizer()), other
    )
    with pytest.raises(ValueError, match="another --out"):
        run(other, tmp_path, "hellaswag", limit=2)


def test_a_task_that_fails_is_reported_and_the_others_go_on(model, tmp_path, capsys):
    results = run(model, tmp_path, "piqa", "humaneval", "hellaswag", limit=2)
    status = {name: task["status"] for name, task in results["tasks"].items()}
    assert status == {"piqa": "failed", "humaneval": "failed", "hellaswag": "whole"}
    reasons = [results["tasks"][name]["reason"] for name in ("piqa", "humaneval")]
    assert "piqa/valid.jsonl" in reasons[0] and "--allow_code_execution" in reasons[1]
    assert "FAILED" in capsys.readouterr().out


def test_kept_answers_are_scored_as_is_asked_now(model, tmp_path, monkeypatch):
    quiz = tmp_path / "quiz.yaml"
    text = "{name: quiz, about: '', kind: generate, data: [{test: quiz.jsonl}], gold: '{{ gold }}',"
    text += " prompt: '{{ question }}', metrics: [exact_match], headline: exact_match,"
    text += " generate: {max_new_tokens: 4}, normaliser: %s}"
    (tmp_path / "quiz.jsonl").write_text('{"question": "Which?", "gold": "b"}\n')
    quiz.write_text(text % "harness")
    made = {"texts": ["The b."]}
    monkeypatch.setattr(runner.answers, "ask", lambda lm, task, items: [made] * len(items))
    asked = dict(data=str(tmp_path), limit=None)
    first = run(model, tmp_path / "out", str(quiz), **asked)
    quiz.write_text(text % "llama")
    monkeypatch.delattr(runner.answers, "ask")  # nothing is left to ask
    second = run(model, tmp_path / "out", str(quiz), **asked)
    values = [headline(results, "quiz").value for results in (first, second)]
    assert values == [0.0, 1.0]
    assert read_samples(tmp_path / "out", "quiz")[0]["scores"] == {"exact_match": [1.0, 1.0]}


def test_prompts_that_are_too_long_have_fewer_shots(model, tmp_path):
    job = prepared("mmlu", limit=6)[0]
    lm = easylm_jax.load(model)
    short = dataclasses.replace(lm, config=dataclasses.replace(lm.config, max_seq_len=1200))
    items, shortened = runner.with_shots_that_fit(
        short, job.job.task, job.items, shots=5, ask_with=job.ask_with
    )
    whole = {"status": "whole", "done": 6, "total": 6, "available": 6}
    ((mark, name, sentence),) = problems({"mmlu": whole | {"shortened": 2}})
    assert (mark, name) == ("fewer shots", "mmlu") and sentence.startswith("2 prompts have fewer")
    assert 0 < shortened <= 6 and [i.id for i in items] == [i.id for i in job.items]
    for item, whole in zip(items, job.items, strict=True):
        length = max(len(a + b) for a, b in item.pairs) + 1  # bytes and BOS
        shots = item.pairs[0][0].count("Answer:") - 1
        assert length <= 1200
        one_more = {i.id: i for i in job.ask_with(min(shots + 1, 5))}[item.id]
        fits = max(len((a + b).encode()) for a, b in one_more.pairs) + 1 <= 1200
        assert item == whole if shots == 5 else not fits


def test_a_bug_in_one_task_is_told_and_the_others_go_on(model, tmp_path, monkeypatch, capsys):
    score = runner.choice.score

    def broken(task, item, response):
        return {}["lost"] if task.name == "mmlu" else score(task, item, response)

    monkeypatch.setattr(runner.choice, "score", broken)
    results = run(model, tmp_path, "mmlu", "hellaswag", limit=6)
    assert results["tasks"]["mmlu"]["status"] == "failed"
    assert results["tasks"]["hellaswag"]["status"] == "whole"
    assert "Traceback" in capsys.readouterr().err


def test_other_settings_need_another_folder(model, tmp_path):
    run(model, tmp_path, "hellaswag", limit=2)
    jobs = prepared("mmlu", limit=6)
    with pytest.raises(ValueError, match="dtype float32, expected bfloat16"):
        evaluate_path(model, jobs, str(tmp_path), name="x", template="plain", dtype="bfloat16")


def test_one_name_for_two_things_is_refused():
    with pytest.raises(ValueError, match="boolq is asked for in two ways"):
        plan(["llama1", "boolq"])
    assert len(plan(["piqa", "piqa"])) == 1


def test_a_context_longer_than_the_models_fails_in_one_sentence(tmp_path):
    short = str(tmp_path / "short")
    write_native(random_model(tokenizer=ByteTokenizer()), short)  # 64 tokens
    results = run(short, tmp_path / "out", "mmlu", limit=2)  # without a shot, too
    task = results["tasks"]["mmlu"]
    assert task["status"] == "failed" and "context of 64" in task["reason"]


def test_recipes_name_their_shots_and_bring_published_numbers():
    jobs = {job.name: job for job in plan(["llama1", "truthfulqa"])}
    assert {"nq_open_llama", "nq_open_llama_5shot", "nq_open_llama_64shot"} <= jobs.keys()
    assert jobs["nq_open_llama_5shot"].shots == 5
    assert {p["model"] for p in jobs["piqa"].published} >= {"LLaMA-7B", "LLaMA-65B"}


@pytest.mark.parametrize("name, near", [("helaswag", "hellaswag"), ("llama", "llama1")])
def test_an_unknown_name_has_its_nearest(name, near):
    with pytest.raises(ValueError, match=near):
        plan([name])


@pytest.mark.parametrize("judge, longer_wins", [("always_a", 0.5), ("longest", 1.0)])
def test_judges_that_do_not_read_are_exposed(model, tmp_path, judge, longer_wins):
    jobs = prepared("vicuna_bench", limit=4)
    evaluate_path(model, jobs, str(tmp_path / "a"), name="a", template="plain")
    answers = tmp_path / "other.jsonl"
    rows = [json.loads(x) for x in (tmp_path / "a/answers/vicuna_bench.jsonl").open()]
    for row in rows:
        row["model_id"], row["choices"] = "short", [{"turns": ["no"]}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parsed = parse_judge(judge, load=easylm_jax.load)
    chat = judge_chat(parsed, jobs, str(tmp_path / "a"), data=DATA, against=[str(answers)])
    found = {row.metric: row.value for row in chat["vicuna_bench"]["rows"] if row.group == ""}
    assert chat["vicuna_bench"]["against"] == "short"
    assert found["win_rate"] == (0.5 if judge == "always_a" else 1.0)
    assert found["ties"] == (1.0 if judge == "always_a" else 0.0)
    assert found["longer_wins"] == longer_wins


def test_several_opponents_are_rated_and_one_name_counts_once(model, tmp_path):
    jobs = prepared("vicuna_bench", limit=3)
    evaluate_path(model, jobs, str(tmp_path / "a"), name="a", template="plain")
    rows = [json.loads(x) for x in (tmp_path / "a/answers/vicuna_bench.jsonl").open()]
    against = []
    for file, name, answer in (
        ("1", "short", "no"),
        ("2", "long", "no " * 999),
        ("3", "long", "?"),
    ):
        changed = {"model_id": name, "choices": [{"turns": [answer]}]}
        against.append(str(tmp_path / f"{file}.jsonl"))
        Path(against[-1]).write_text("".join(json.dumps(row | changed) + "\n" for row in rows))
    judge = parse_judge("longest", load=easylm_jax.load)
    chat = judge_chat(judge, jobs, str(tmp_path / "a"), data=DATA, against=against)
    assert list(chat["vicuna_bench"]["elo"]) == ["long", "a", "short"]
    assert chat["vicuna_bench, long"]["against"] == "long"
    (refused,) = [told["reason"] for told in chat.values() if told.get("reason")]
    assert "'long' is the name of several" in refused


def test_the_command_with_a_base_ends_in_a_table_a_panel_and_a_report(model, tmp_path):
    tuned = str(tmp_path / "tuned")
    config = tiny_config(vocab_size=264, max_seq_len=4096, rope_theta=500.0)
    write_native(random_model(config, tokenizer=ByteTokenizer()), tuned)
    out = tmp_path / "out"
    arguments = f"--model={tuned} --base={model} --tasks=hellaswag,vicuna_bench --data={DATA}"
    arguments += f" --out={out} --limit=3 --template=plain --judge=longest"
    done = call(*arguments.split())
    assert done.returncode == 0, done.stderr
    assert "3 of 100, PARTIAL" in done.stdout and "preference" in done.stdout
    results = read_results(out)
    kinds = [row[0] for row in results["panel"]["rows"]]
    assert {"preference", "style", "ability"} == set(kinds)
    assert (out / "report.html").stat().st_size > 10_000
    compared = call("--compare", str(out / "base"), str(out))
    assert "hellaswag" in compared.stdout and compared.returncode == 0


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--tasks=hellaswag", "--out=x"], "--model is needed"),
        (["--model=x", "--tasks=helaswag", "--out=x"], "hellaswag"),
        (["--model=nowhere", "--tasks=hellaswag", f"--data={DATA}", "--out=x"], "nowhere"),
        (
            ["--model={model}", "--tasks=humaneval", f"--data={DATA}", "--out=x"],
            "allow_code_execution",
        ),
        (["--model=x", "--tasks=mmlu", "--out=x", "--judge=longest"], "none of --tasks is chat"),
        (["--compare", "nowhere"], "two --out folders"),
        (["--compare", "nowhere", "neither"], "results.json"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments, sentence, model):
    done = call(*(argument.format(model=model) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert sentence in done.stderr


def call(*arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", "easylm_jax.evaluate", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )


def test_every_task_is_listed():
    lines = list(command.list_tasks())
    assert len(lines) > 24 and all(len(line) > 40 for line in lines)


@pytest.mark.slow
def test_a_run_measures_tasks_as_the_command_does_afterwards(tmp_path):
    text = write_text(tmp_path)
    train(
        TrainConfig(
            model=dataclasses.replace(CONFIG, residual_dropout=(0.1, 0.1)),
            tokenizer="bytes",
            data=DataConfig(files=(text,), heldout_files=(text,)),
            duration="4 steps",
            batch_size=8,
            seq_len=32,
            optim=OptimConfig(lr=3e-3, warmup="1 steps"),
            checkpoint=CheckpointConfig(every="4 steps"),
            eval=EvalConfig("2 steps", tasks=("hellaswag",), task_data=DATA, task_items=4),
            mesh="2,2,1,2",
        ),
        str(tmp_path / "run"),
    )
    rows = [row for row in read_metrics(tmp_path / "run") if "eval/hellaswag/acc_norm" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    expected = headline(
        run(str(tmp_path / "run"), tmp_path / "out", "hellaswag", limit=4), "hellaswag"
    )
    assert rows[-1]["eval/hellaswag/acc_norm"] == pytest.approx(expected.value)
    assert rows[-1]["eval/hellaswag/acc_norm_stderr"] == pytest.approx(expected.stderr)


def test_a_task_that_runs_programs_is_no_part_of_training():
    with pytest.raises(ValueError, match="eval.tasks has 'humaneval'"):
        measured_tasks(EvalConfig(tasks=("humaneval",), task_data=DATA))
