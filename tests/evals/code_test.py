"""pass@k against counting subsets; programs of HumanEval and MBPP, right and wrong; permission."""

import dataclasses
import itertools
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from easylm_jax.evals import code, sandbox
from easylm_jax.evals.task import find_task, make_items, select_metric
from easylm_jax.language_model import LanguageModel

QUICKSTART = str(Path(__file__).parents[2] / "experiments" / "quickstart" / "eval")
SHARED = Path(os.environ.get("EASYLM_SHARED", "/nowhere")) / "data" / "eval"
needs_sandbox = pytest.mark.skipif(
    not sandbox.guards().seccomp, reason="this machine cannot hold programs back"
)


class Written(LanguageModel):
    """A model that has the same texts for every prompt, and keeps what it was asked."""

    def generate_until(self, requests, **_):
        self.asked.extend(requests)
        return [[SimpleNamespace(text=text) for text in self.texts] for _ in requests]


def written(*texts):
    lm = object.__new__(Written)
    lm.__dict__.update(texts=texts, asked=[])
    return lm


def references(name, data_dir, **kwargs):
    """Items, and for each a response that holds its reference solution."""
    task = find_task(name)
    items = make_items(task, data_dir, **kwargs)
    return task, items, [{"texts": ["\n" + item.gold]} for item in items]


def test_pass_at_k_counts_the_subsets_with_a_right_program():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([i < c for i in range(n)], k))
                expected = sum(map(any, draws)) / len(draws)
                assert math.isclose(code.pass_at_k(n, c, k), expected, abs_tol=1e-12), (n, c, k)


def test_pass_at_k_of_many_is_what_exact_integers_say():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 1000))
        c, k = int(rng.integers(0, n + 1)), int(rng.integers(1, n + 1))
        none_right = math.comb(n - c, k) * 10**18 // math.comb(n, k) / 10**18
        assert abs(code.pass_at_k(n, c, k) - (1 - none_right)) < 1e-12


def test_pass_at_k_is_unbiased():
    """Over draws of n programs its mean is 1 - (1-p)^k, which 1 - (1-c/n)^k misses."""
    n, k, p = 10, 5, 0.3
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance[c] * code.pass_at_k(n, c, k) for c in range(n + 1))
    naive = sum(chance[c] * (1 - (1 - c / n) ** k) for c in range(n + 1))
    assert abs(mean - (1 - (1 - p) ** k)) < 1e-12 < 0.02 < abs(naive - mean)


@pytest.mark.parametrize("n, c, k", [(5, 2, 6), (5, 6, 1), (5, -1, 1), (5, 2, 0)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match="within n"):
        code.pass_at_k(n, c, k)


def test_humaneval_prompts_and_programs():
    task = find_task("humaneval")
    items = make_items(task, QUICKSTART)
    assert len(items) == 164 and items[0].id == "HumanEval/0"
    for item in items:
        assert item.doc["prompt"] == item.prompt + "\n"  # no tokenizer is led astray by an end
        body = "\n" + item.doc["canonical_solution"]
        assert code.program_of(task, item, body) == (
            item.doc["prompt"] + item.doc["canonical_solution"] + "\n" + item.doc["test"]
            + f"\ncheck({item.doc['entry_point']})\n"
        )  # fmt: skip


def test_mbpp_prompts_have_the_papers_form_and_shots():
    items = make_items(find_task("mbpp"), QUICKSTART)
    assert [item.id for item in items] == [str(i) for i in range(11, 71)]  # of 11 to 510
    first = items[0].prompt
    assert first.startswith(
        "You are an expert Python programmer, and here is your task: Write a function to find the "
        "similar elements from the given two tuple lists. Your code should pass these tests:\n\n"
        "assert similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)\n"
        "assert similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)\n"
        "assert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)\n"
        "[BEGIN]\ndef similar_elements(test_tup1, test_tup2):\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\n  return (res) \n[DONE]\n\n"
        "You are an expert Python programmer, and here is your task: Write a python function to "
        "identify non-prime numbers."
    )
    assert first.count("[BEGIN]\n") == first.count("\n[DONE]\n\n") == 3
    assert first.count("import heapq") == 1  # problem 4, the last shot
    assert first.endswith('assert remove_Occ("PHP","P") == "H"\n[BEGIN]') and "\r" not in first


def test_mbpp_sets_up_what_needs_the_code_after_it():
    """As problems 367 and 927 have it, whose set-up makes trees of the class that is asked for."""
    task = find_task("mbpp")
    (item,) = make_items(task, QUICKSTART, limit=1)
    doc = item.doc | {"test_setup_code": "x = Node(3)", "test_list": ["assert x.v == 3", "y = 1"]}
    text = "\nclass Node:\n    def __init__(self, v):\n        self.v = v\n"
    names: dict = {}
    exec(code.program_of(task, dataclasses.replace(item, doc=doc), text), names)
    assert names["y"] == 1


@needs_sandbox
@pytest.mark.parametrize("name, limit", [("humaneval", 25), ("mbpp", 25)])
def test_references_pass_and_empty_bodies_fail(name, limit):
    task, items, right = references(name, QUICKSTART, limit=limit)
    wrong = [{"texts": ["\n    pass\n"]} for _ in items]
    for responses, expected in ((right, 1.0), (wrong, 0.0)):
        found = code.run(task, items, responses)
        scores = [code.score(task, item, r) for item, r in zip(items, found, strict=True)]
        assert scores == [{"pass@1": (expected, 1.0)}] * limit


@needs_sandbox
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="EASYLM_SHARED has no data/eval")
def test_all_references_pass():
    for name, count in (("humaneval", 164), ("mbpp", 500)):
        task, items, right = references(name, str(SHARED))
        found = code.run(task, items, right)
        assert [r["outcomes"][0]["status"] for r in found] == ["passed"] * count


@needs_sandbox
def test_ask_writes_and_runs_every_program_once(monkeypatch):
    task = find_task("humaneval")
    task = dataclasses.replace(
        task,
        metrics=("pass@1", "pass@2"),
        generate=dataclasses.replace(task.generate, n=4),
    )
    items = make_items(task, QUICKSTART, limit=1)
    ran = []
    monkeypatch.setattr(
        sandbox,
        "run_programs",
        lambda programs, run=sandbox.run_programs, **how: ran.extend(programs) or run(programs),
    )
    right = "\n" + items[0].gold
    lm = written(right, "\n    return 1", right, "\n    while")
    (response,) = code.ask(lm, task, items, allow_code_execution=True)
    (request,) = lm.asked
    assert (request.prompt, request.n, request.max_new_tokens) == (items[0].prompt, 4, 512)
    assert request.until == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert len(ran) == 3
    statuses = [outcome["status"] for outcome in response["outcomes"]]
    assert statuses == ["passed", "failed", "passed", "failed"]
    assert response["outcomes"][1]["message"].startswith("AssertionError")
    scores = code.score(task, items[0], response)
    assert scores == {"pass@1": (0.5, 1.0), "pass@2": (pytest.approx(5 / 6), 1.0)}


def test_nothing_is_written_or_run_without_permission(monkeypatch):
    monkeypatch.setattr(sandbox, "run_programs", None)
    lm = written("\n    pass")
    task = find_task("humaneval")
    items = make_items(task, QUICKSTART, limit=1)
    with pytest.raises(ValueError, match="--allow_code_execution"):
        code.ask(lm, task, items)
    monkeypatch.setattr(sandbox, "guards", lambda: sandbox.Guards(0, False))
    with pytest.raises(ValueError, match="needs Linux with seccomp"):
        code.ask(lm, task, items, allow_code_execution=True)
    assert not lm.asked


@needs_sandbox
def test_what_a_task_file_can_get_wrong_is_said_before_anything_is_written():
    task = find_task("humaneval")
    (item,) = make_items(task, QUICKSTART, limit=1)
    lm = written("\n    pass")
    for metric in ("pass@2", "pass@0", "acc"):
        with pytest.raises(ValueError, match=f"humaneval: metric '{metric}' is none of pass@1$"):
            select_metric(task, metric)
    ends_in_newline = dataclasses.replace(item, prompt=item.prompt + "\n")
    with pytest.raises(ValueError, match="HumanEval/0: the prompt ends in white space"):
        code.ask(lm, task, [ends_in_newline], allow_code_execution=True)
    assert not lm.asked


@pytest.mark.parametrize("name", ["humaneval_pass100", "mbpp_pass80"])
def test_tasks_of_many_programs_draw_enough(name):
    task = find_task(name)
    assert max(int(metric.removeprefix("pass@")) for metric in task.metrics) <= task.generate.n
    assert task.headline == f"pass@{name.rpartition('pass')[2]}"
    assert task.code == find_task(name.partition("_")[0]).code
