"""Answers to chat questions: asked of a model, measured, written and read in published layouts.

The kind `chat` of `task.py`: Koala, Vicuna bench, MT-bench with its second turn, Self-Instruct.
What it is not: the judging (`judgements.py`); alone, answers only have a style (`style.py`). Called
by `runner.py`, `judgements.py` and evaluate.py.

A task's `chat` has `temperatures`, by the category that is an item's group, in place of
`generate.temperature`; and `references`, a file of answers to judge others by, under --data.
"""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from easylm_jax.data.readers import read_records
from easylm_jax.evals import style
from easylm_jax.evals.task import Item, Task
from easylm_jax.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Question:
    """`reference` has an answer for every turn, or there is none."""

    id: str
    turns: tuple[str, ...]
    category: str = ""
    reference: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model said, turn by turn, by question id or, in layouts that have no ids, by the
    question's text as `text_key` spells it. `questions` are by the same, where the file has them.
    """

    model: str
    turns: dict[str, list[str]]
    questions: dict[str, list[str]] = dataclasses.field(default_factory=dict)


# -------------------------------------------------------------------- kind chat: asking, scoring


def ask(lm: LanguageModel, task: Task, items: Sequence[Item]) -> list[dict[str, Any]]:
    """`{"turns": [answer, ...]}` of every item: turn after turn, many conversations at once."""
    temperatures = task.chat["temperatures"] if "temperatures" in task.chat else {}

    def kind(place: int) -> tuple[float, int]:
        item = items[place]
        own = temperatures[item.group] if item.group in temperatures else task.generate.temperature
        return float(own), len(item.turns)

    answers: dict[int, list[str]] = {place: [] for place in range(len(items))}
    by_kind = sorted(answers, key=kind)
    for (temperature, num_turns), places in itertools.groupby(by_kind, key=kind):
        places = list(places)
        for turn in range(num_turns):
            made = lm.chat_batch(
                [messages_of(items[p].turns[: turn + 1], answers[p]) for p in places],
                max_new_tokens=task.generate.max_new_tokens,
                temperature=temperature,
                top_p=task.generate.top_p,
                stop=task.generate.until,
                seed=[items[p].seed + turn for p in places],
            )
            for place, answer in zip(places, made, strict=True):
                answers[place].append(answer)
    return [{"turns": answers[place]} for place in range(len(items))]


def score(task: Task, item: Item, response: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Style, over all turns: see `style.py`. Preferences come from a judge or from people."""
    measured = [style.measure(answer) for answer in response["turns"]]
    return {
        name: (sum(m[name][0] for m in measured), sum(m[name][1] for m in measured))
        for name in style.ABOUT
    }


def messages_of(questions: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """A conversation that ends with the last question."""
    said = itertools.zip_longest(questions, answers)
    roles = itertools.cycle(("user", "assistant"))
    texts = [text for pair in said for text in pair if text is not None]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


# ------------------------------------------------------------------- questions and their answers


def questions_of(task: Task, items: Sequence[Item], data_dir: str) -> list[Question]:
    """What the items ask, with the references that the task names, of those that have one."""
    references: dict[str, list[str]] = {}
    if "references" in task.chat:
        references = read_answers(str(pathlib.Path(data_dir) / task.chat["references"])).turns
    return [
        Question(item.id, item.turns, item.group, tuple(references.get(item.id, ())))
        for item in items
    ]


def align(answers: Answers, questions: Sequence[Question]) -> dict[str, list[str]]:
    """The model's answers by question id; it may have answered others as well.

    Raises:
      ValueError: it has not answered all of them, or not every turn.
    """
    found: dict[str, list[str]] = {}
    lacking = []
    for question in questions:
        turns = answers.turns.get(question.id, answers.turns.get(text_key(question.turns[0]), []))
        if len(turns) < len(question.turns):
            turn = f" turn {len(turns) + 1}" if turns else ""
            lacking.append(question.id + turn)
        found[question.id] = turns[: len(question.turns)]
    if lacking:
        named = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise ValueError(
            f"{answers.model} has no answer to {len(lacking)} of the {len(questions)} questions "
            f"({named}): compare answers to the same questions, or fewer of them (--limit)"
        )
    return found


def text_key(question: str) -> str:
    """A question's text without regard to white space."""
    return " ".join(question.split())


# ----------------------------------------------------------------------------------------- files


def save_answers(
    folder: str, task: Task, samples: Sequence[Mapping[str, Any]], *, model: str
) -> Answers:
    """The answers in a run's samples, also written for those who judge elsewhere.

    FOLDER/TASK.jsonl is FastChat's model_answer; FOLDER/TASK.alpaca_eval.json AlpacaEval's outputs,
    of tasks of one turn.
    """
    answers = Answers(model, {s["id"]: list(s["response"]["turns"]) for s in samples})
    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    write_fastchat(str(place / f"{task.name}.jsonl"), answers)
    if all(len(s["request"]["turns"]) == 1 for s in samples):
        rows = [
            {
                "instruction": s["request"]["turns"][0],
                "output": s["response"]["turns"][0],
                "generator": model,
                "dataset": task.name,
            }
            for s in samples
        ]
        text = json.dumps(rows, ensure_ascii=False, indent=1)
        (place / f"{task.name}.alpaca_eval.json").write_text(text, encoding="utf-8")
    return answers


def write_fastchat(path: str, answers: Answers) -> None:
    """One JSON object per answer, as FastChat's gen_model_answer writes them."""
    with open(path, "w", encoding="utf-8") as file:
        for question_id, turns in answers.turns.items():
            digest = hashlib.sha256(f"{answers.model}\n{question_id}".encode()).hexdigest()
            row = {
                "question_id": int(question_id) if question_id.isdigit() else question_id,
                "answer_id": digest[:22],
                "model_id": answers.model,
                "choices": [{"index": 0, "turns": turns}],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_answers(path: str, *, model: str = "") -> Answers:
    """Answers of one model, in any of these layouts (JSON or JSONL):

        {"question_id", "model_id", "choices": [{"turns": [...]}]}   FastChat, llm_judge
        {"question_id", "model_id", "text"}                          FastChat, Vicuna's blog
        {"question_id", "generation_truncated"}                      artidoro/qlora
        {"instruction", "output", "generator"}                       AlpacaEval
        {"instruction", "input", "response"}                         Self-Instruct, predictions

    `model` is its name; else that in the file, else the file's.
    """
    turns: dict[str, list[str]] = {}
    questions: dict[str, list[str]] = {}
    names: dict[str, None] = {}
    for where, record in read_records([path], counts=Counter()):
        key, question, said = _read_record(record, where)
        if "question_id" in record and key in turns:
            raise ValueError(f"{where} answers question {key} a second time: keep one answer each")
        turns.setdefault(key, said)
        if question:
            questions.setdefault(key, [question])
        names |= dict.fromkeys(str(record[n]) for n in ("model_id", "generator") if n in record)
    if len(names) > 1 and not model:
        raise ValueError(f"{path} has answers of {', '.join(names)}: expected those of one model")
    name = model or next(iter(names), pathlib.Path(path).name.split(".")[0])
    return Answers(name, turns, questions)


def _read_record(record: Mapping[str, Any], where: str) -> tuple[str, str, list[str]]:
    """The key of the question, its text if it is there, and the answers to its turns."""
    if "question_id" in record:
        key = str(record["question_id"])
        if "choices" in record:
            return key, "", list(record["choices"][0]["turns"])
        for name in ("generation_truncated", "generation"):
            if name in record:
                return key, record["text"], [record[name].strip()]
        if "text" in record:
            return key, "", [record["text"].strip()]
    if "instruction" in record:
        question = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        for name in ("output", "response"):
            if name in record:
                return text_key(question), question, [record[name].strip()]
    raise ValueError(
        f"{where} is no answer in a layout of FastChat, AlpacaEval, qlora or Self-Instruct; its "
        f"fields are {', '.join(record)}"
    )
