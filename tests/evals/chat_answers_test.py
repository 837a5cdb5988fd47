"""Answers: how they are asked for, and every layout in which others published theirs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import pytest

from easylm_jax.evals.chat_answers import (
    Answers,
    Question,
    align,
    ask,
    questions_of,
    read_answers,
    save_answers,
    score,
)
from easylm_jax.evals.task import Item, find_task, make_items
from easylm_jax.language_model import LanguageModel

DATA = Path(os.environ.get("EASYLM_SHARED", "/nowhere")) / "data" / "eval"


def write(path: Path, rows: list[Mapping]) -> str:
    text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "name, row, model, key",
    [
        ("a.jsonl", {"question_id": 7, "text": " yes ", "model_id": "m:v1"}, "m:v1", "7"),
        (
            "a.jsonl",
            {"question_id": 7, "model_id": "m", "choices": [{"index": 0, "turns": ["yes"]}]},
            "m",
            "7",
        ),
        (
            "7b-x.jsonl",
            {"question_id": 7, "text": "Is it?", "generation": "no", "generation_truncated": "yes"},
            "7b-x",
            "7",
        ),
        ("a.json", {"instruction": "Is  it?\n", "output": "yes", "generator": "m"}, "m", "Is it?"),
        (
            "davinci.jsonl",
            {"prompt": "?", "instruction": "Is", "input": "it?", "response": "\nyes"},
            "davinci",
            "Is it?",
        ),
    ],
)  # fmt: skip
def test_published_layouts_are_read(tmp_path, name, row, model, key):
    found = read_answers(write(tmp_path / name, [row]))
    assert (found.model, found.turns) == (model, {key: ["yes"]})
    assert align(found, [Question("7", ("Is it?",))]) == {"7": ["yes"]}
    assert read_answers(str(tmp_path / name), model="mine").model == "mine"


def test_files_that_say_no_clear_thing_are_refused(tmp_path):
    twice = [{"question_id": 1, "text": "a"}, {"question_id": 1, "text": "b"}]
    with pytest.raises(ValueError, match="x.jsonl:2 answers question 1 a second time"):
        read_answers(write(tmp_path / "x.jsonl", twice))
    two = [{"instruction": t, "output": "a", "generator": t} for t in "ab"]
    with pytest.raises(ValueError, match="has answers of a, b: expected those of one model"):
        read_answers(write(tmp_path / "x.json", two))
    with pytest.raises(ValueError, match="x.jsonl:1 is no answer in a layout .* prompt, answer"):
        read_answers(write(tmp_path / "x.jsonl", [{"prompt": "?", "answer": "!"}]))


def test_questions_without_an_answer_are_counted_and_named():
    questions = [Question(str(i), ("q", "r")) for i in range(10)]
    answers = Answers("m", {str(i): ["a", "b"] for i in range(3)} | {"3": ["a"], "99": ["a", "b"]})
    expected = r"m has no answer to 7 of the 10 questions \(3 turn 2, 4, 5, 6, 7, ...\)"
    with pytest.raises(ValueError, match=expected):
        align(answers, questions)
    assert align(answers, questions[:2]) == {"0": ["a", "b"], "1": ["a", "b"]}


def talker(calls: list) -> LanguageModel:
    """A model that answers with all that was said, and the temperature."""

    def chat_batch(conversations, **settings):
        calls.append((len(conversations), settings["temperature"], settings["seed"]))
        said = ["|".join(f"{m['role'][0]}:{m['content']}" for m in c) for c in conversations]
        return [f"<{text} at {settings['temperature']}>" for text in said]

    lm = mock.create_autospec(LanguageModel, instance=True)
    lm.chat_batch.side_effect = chat_batch
    return lm


def test_both_turns_are_asked_in_batches_each_at_its_categorys_temperature():
    task, calls = find_task("mt_bench"), []
    groups = ["math", "writing", "math", "stem", "writing"]
    items = [
        Item(str(i), g, {}, turns=(f"q{i}", f"r{i}") if i != 2 else ("q2",))
        for i, g in enumerate(groups)
    ]
    found = ask(talker(calls), task, items)
    temperatures = {"math": 0.0, "writing": 0.7, "stem": 0.1}
    for i, response in enumerate(found):
        t = temperatures[groups[i]]
        first = f"<u:q{i} at {t}>"
        both = [first, f"<u:q{i}|a:{first}|u:r{i} at {t}>"]
        assert response == {"turns": both[: len(items[i].turns)]}
    assert sorted(call[:2] for call in calls) == [(1, 0.0)] * 3 + [(1, 0.1)] * 2 + [(2, 0.7)] * 2
    seeds = [seed for _, _, of_call in calls for seed in of_call]
    assert len(set(seeds)) == 9  # one of every turn of every item, also if it is asked alone
    ask(talker(alone := []), task, items[4:])
    assert {seed for _, _, of_call in alone for seed in of_call} < set(seeds)


def test_answers_written_for_other_judges_come_back(tmp_path):
    task = find_task("koala")
    items = [Item(f"koala_{i}", "", {}, turns=(f"Question\n\n{i}?",)) for i in range(3)]
    responses = ask(talker([]), task, items)
    samples = [
        {"id": i.id, "request": {"turns": list(i.turns)}, "response": r}
        for i, r in zip(items, responses, strict=True)
    ]
    assert score(task, items[0], responses[0])["words"] == (4.0, 1.0)
    answers = save_answers(str(tmp_path), task, samples, model="runs/x")
    assert answers.turns == {i.id: r["turns"] for i, r in zip(items, responses, strict=True)}
    questions = questions_of(task, items, "/nowhere")
    for name in ("koala.jsonl", "koala.alpaca_eval.json"):
        found = read_answers(str(tmp_path / name))
        assert found.model == "runs/x"
        assert align(found, questions) == answers.turns


@pytest.mark.skipif(not DATA.exists(), reason="needs the gathered data")
def test_the_tasks_read_their_data_and_align_with_published_answers():
    found = {}
    for name in ("koala", "vicuna_bench", "mt_bench", "self_instruct"):
        task = find_task(name)
        items = make_items(task, str(DATA))
        questions = questions_of(task, items, str(DATA))
        turns = {len(q.turns) for q in questions}
        found[name] = (len(questions), turns, sum(bool(q.reference) for q in questions))
        for file in [*DATA.glob(f"{name}/model_answer/*"), *DATA.glob(f"{name}/predictions/*")]:
            assert len(align(read_answers(str(file)), questions)) == len(items)
    assert found == {
        "koala": (180, {1}, 0),
        "vicuna_bench": (80, {1}, 10),
        "mt_bench": (80, {2}, 30),
        "self_instruct": (252, {1}, 0),
    }
