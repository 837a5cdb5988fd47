"""Evaluation prompts are found whatever their case and spacing, reported by name, and no others."""

import gzip
import json
import random
import re
from collections import Counter

import pytest

from easylm_jax.data.decontaminate import drop_contaminated, index_prompts, read_prompts
from tests.data.cleaning_test import pair, talk, with_input
from tests.data.dedup_test import text

LONG = "Name, in one sentence, the three largest of all the lakes that lie in southern Finland."
SHORT = "Name the largest lake."


def run(groups, prompts, ngram=13):
    counts, hits = Counter(), {}
    index = index_prompts(prompts, ngram=ngram)
    kept = list(drop_contaminated(groups, counts, index=index, hits=hits))
    assert sum(map(len, groups)) == sum(map(len, kept)) + counts.total()
    return kept, counts, hits


def test_a_planted_prompt_is_found_in_any_turn_case_and_spacing():
    changed = re.sub(r"\W+", " \n", LONG).upper()
    groups = [
        (talk("hi", "yo", f"Please: {changed} Thanks", "ok", id="turn"),),
        (talk("hi", f"You asked: {LONG[6:-9]}?", id="answer"),),  # 13 of 15 words
        tuple(pair(LONG, "Saimaa", "Ladoga")),
        (talk("Name, in one sentence, the three largest of all the lakes", "fine"),),  # 11 words
        (talk(SHORT.lower(), "Saimaa", id="short"),),
        (talk(f"Please. {SHORT}", "fine"),),  # short prompts only as a whole
        (with_input(talk("Answer this:", "Saimaa", id="input"), LONG),),
    ]
    prompts = {"lakes": {"17": [LONG], "18": [SHORT]}, "other": {"1": ["Never asked"]}}
    kept, counts, hits = run(groups, prompts)
    assert kept == [groups[3], groups[5]]
    assert counts == {"prompt of lakes": 6}
    assert hits == {
        "lakes": {"17": ["turn", "answer", "p:1/chosen", "p:1/rejected", "input"], "18": ["short"]}
    }
    assert len(run(groups, prompts, ngram=8)[0]) == 1  # 11 words are now enough


@pytest.mark.parametrize("ngram", [8, 13])
def test_agrees_with_a_search_of_all_runs(ngram):
    """Against comparing joined strings, on random texts of which some share a stretch."""
    rng = random.Random(ngram)
    prompts = {"eval": {str(i): [" ".join(text(rng, rng.randint(3, 40)))] for i in range(30)}}
    runs = set()
    for (prompt,) in prompts["eval"].values():
        words = prompt.split()
        runs |= {" ".join(words[i : i + ngram]) for i in range(len(words) - ngram + 1)}
    groups, expected = [], []
    for i in range(200):
        words = rng.choice([*prompts["eval"].values()])[0].split()
        length, at = rng.randint(1, 20), rng.randint(0, 20)
        spoken = [*text(rng, 20)[:at], *words[2 : 2 + length], *text(rng, 20)]
        groups.append((talk(" ".join(spoken), "ok " * ngram, id=str(i)),))
        if not any(" ".join(spoken[j : j + ngram]) in runs for j in range(len(spoken))):
            expected.append(groups[-1])
    kept, _, _ = run(groups, prompts, ngram)
    assert kept == expected
    assert 0 < len(kept) < len(groups)


def test_prompts_are_read_from_what_evaluations_ship(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "k", "prompt": "one"}\n{"question": "two"}\n')
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "three", "input": "four"}]))
    turns = json.dumps({"question_id": 81, "turns": ["five", "six"]})
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(turns.encode()))
    (tmp_path / "d.txt").write_text("seven")
    prompts = read_prompts([str(tmp_path / "*")])
    assert [[t.strip() for t in texts] for texts in prompts.values()] == [
        ["one"], ["two"], ["three\nfour"], ["five", "six"], ["seven"]
    ]  # fmt: skip
    assert list(prompts) == ["k", "a.jsonl:2", "b.json:1", "81", "d.txt"]
    (tmp_path / "e.jsonl").write_text('{"gold": 1}')
    with pytest.raises(ValueError, match="e.jsonl:1 has none of the fields prompt"):
        read_prompts([str(tmp_path / "e.jsonl")])
