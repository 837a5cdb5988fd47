"""`prepare_chat` loses nothing uncounted, splits by question, and writes data sets whole or not."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from etils import epath

from configs.data import koala
from easylm_jax.config import as_config_dict, from_config_dict
from easylm_jax.data.conversation import Conversation, find_pairs, from_json, prompt_key, to_json
from easylm_jax.data.documents import match_files
from easylm_jax.data.readers import READERS, read_conversations
from easylm_jax.prepare_chat import ChatPrepareConfig, DatasetConfig, counts_table, prepare_chat
from tests.data.cleaning_test import pair, talk
from tests.data.dedup_test import text

ROOT = Path(__file__).parents[1]
SIDES = ("train", "test")  # as HH is published
PROMPT = "Name, in one sentence, the three largest of all the lakes in southern Finland, please."


def write(path: Path, conversations: list[Conversation], rest: str = "") -> None:
    lines = [json.dumps(to_json(c)) for c in conversations]
    path.write_text("\n".join([*lines, rest]))


def read(path: Path) -> list[Conversation]:
    counts: Counter[str] = Counter()
    found = list(read_conversations((str(path),), reader="messages", source="x", counts=counts))
    assert not counts
    return found


@pytest.fixture
def cfg(tmp_path):
    """Two data sets with questions in common; `a` holds one of everything that is dropped."""
    rng = random.Random(0)
    asked = [" ".join(text(rng, 5)) for _ in range(150)]
    a = [talk(q, " ".join(text(rng, 30)), id=f"a:{i}") for i, q in enumerate(asked)]
    long = [[asked[2], *(" ".join(text(rng, 12)) for _ in range(19))] for _ in range(4)]
    a += [
        talk(asked[0].upper(), a[0].messages[1]["content"], id="again"),
        talk(asked[1], "ChatGPT cannot say", id="keyword"),
        talk(PROMPT, "I cannot", id="contaminated"),
        talk("a", "b", id="short"),
        *(talk(*texts, id=f"long{i}") for i, texts in enumerate(long)),
    ]
    write(tmp_path / "a.jsonl", a, '{"messages": [{"role": "user", "content": "left alone"}]}\n')
    b = [
        c
        for i, q in enumerate(asked)
        for c in pair(q.title(), " ".join(text(rng, 9)), "no " * 9, id=f"b:{i}")
    ]
    write(tmp_path / "b.jsonl", b)
    (tmp_path / "eval.jsonl").write_text(json.dumps({"id": "e7", "prompt": PROMPT}))
    return ChatPrepareConfig(
        datasets={
            "a": DatasetConfig(
                "messages",
                (str(tmp_path / "a.jsonl"),),
                forbidden=("chatgpt",),
                min_characters=3,
                duplicates="exchange",
            ),
            "b": DatasetConfig("messages", (str(tmp_path / "b.jsonl"),), max_examples=41),
        },
        decontaminate={"lakes": (str(tmp_path / "eval.jsonl"),)},
        tokenizer="bytes",
        max_tokens=400,
        validation_fraction=0.3,
        on_bad_line="skip",
    )


def test_every_conversation_is_kept_or_counted(cfg, tmp_path):
    out = tmp_path / "out"
    reports = prepare_chat(from_config_dict(ChatPrepareConfig, as_config_dict(cfg)), str(out))
    a, b = reports["a"], reports["b"]
    assert a["read"] == 158
    assert a["dropped"] == {
        "holds 'chatgpt'": 1,
        "under 3 characters": 1,
        "same exchange": 1,
        "prompt of lakes": 1,
    }
    assert a["left_out_by_reader"].total() == 1
    assert a["contamination"] == {"lakes": {"e7": ["contaminated"]}}
    assert b["read"] == 300 and b["kept"] == b["written"] == 40  # pairs are whole
    written = {}
    for name, report in reports.items():
        sides = [read(out / name / f"{side}.jsonl") for side in ("train", "validation")]
        assert [len(side) for side in sides] == [report["train"], report["validation"]]
        assert report["read"] == report["kept"] + sum(report["dropped"].values())
        written[name] = [c for side in sides for c in side]
        assert len(written[name]) == report["written"]
    pieces = [c for c in written["a"] if c.id.startswith("long")]
    assert len(written["a"]) == a["kept"] + len(pieces) - 4 and len(pieces) > 4
    assert {c.id.split("/")[0] for c in pieces} == {f"long{i}" for i in range(4)}
    assert len(find_pairs(written["b"])) == 20
    source = {c.id: c for c in read(tmp_path / "b.jsonl")}
    assert written["b"] == [dataclasses.replace(source[c.id], source="b") for c in written["b"]]
    table = counts_table(reports)
    assert "dropped: 1 same exchange" in table and "found: 1 prompts of lakes" in table
    assert json.loads((out / "counts.json").read_text())["datasets"]["b"] == b


def test_no_question_is_on_both_sides_of_any_data_set(cfg, tmp_path):
    datasets = cfg.datasets | {"b": dataclasses.replace(cfg.datasets["b"], max_examples=None)}
    reports = prepare_chat(dataclasses.replace(cfg, datasets=datasets), str(tmp_path))
    sides = {
        side: [c for name in datasets for c in read(tmp_path / name / f"{side}.jsonl")]
        for side in ("train", "validation")
    }
    opening = {side: set(map(prompt_key, found)) for side, found in sides.items()}
    assert not opening["train"] & opening["validation"]  # also of the pieces of what was split
    assert len({side for side, found in sides.items() for c in found if "long" in c.id}) == 1
    turns = sum(len(c.messages) // 2 for found in sides.values() for c in found if "long" in c.id)
    assert reports["a"]["lost_turns"] == {"turns on the other side of the split": 40 - turns}
    assert 4 < turns < 40
    assert 0.2 < len(opening["validation"]) / sum(map(len, opening.values())) < 0.4


def data_of(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): p.read_text() for p in sorted(out.glob("*/*.jsonl"))}


def test_the_same_input_gives_the_same_files_in_another_order(cfg, tmp_path):
    for name in ("one", "two"):
        prepare_chat(cfg, str(tmp_path / name))
    data = data_of(tmp_path / "one")
    assert data == data_of(tmp_path / "two") and len(data) == 4
    ids = [json.loads(line)["id"] for line in data["a/train.jsonl"].splitlines()]
    assert ids[:3] == ["a:129", "a:8", "a:101"]  # in every process and version


def test_a_finished_data_set_is_kept_and_others_settings_are_refused(cfg, tmp_path, capsys):
    out = tmp_path / "out"
    first = prepare_chat(cfg, str(out))
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    assert prepare_chat(cfg, str(out)) == json.loads(json.dumps(first))
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/*")} == before
    assert capsys.readouterr().out == "a: already done\nb: already done\n"
    for change in ({"ngram": 8}, {"max_tokens": 300}, {"tokenizer": "", "max_tokens": None}):
        with pytest.raises(ValueError, match="out/a was made with other settings or files"):
            prepare_chat(dataclasses.replace(cfg, **change), str(out))


@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_an_interrupted_run_leaves_nothing_half(cfg, tmp_path, monkeypatch, fails_at):
    whole = tmp_path / "whole"
    prepare_chat(cfg, str(whole))
    out = tmp_path / "out"
    kind = type(epath.Path("x"))
    write_text, calls = kind.write_text, []

    def interrupted(path, *arguments, **options):
        calls.append(path)
        if len(calls) == fails_at:
            write_text(path, "{")
            raise KeyboardInterrupt
        return write_text(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_chat(cfg, str(out))
    assert (out / "a").exists() == (fails_at == 4)
    assert not (out / "b").exists()
    prepare_chat(cfg, str(out))
    assert data_of(out) == data_of(whole)
    assert sorted(p.name for p in out.iterdir()) == ["a", "b", "counts.json"]


def test_settings_that_cannot_be_meant(cfg, tmp_path):
    with pytest.raises(ValueError, match="datasets is empty"):
        prepare_chat(dataclasses.replace(cfg, datasets={}), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="name the tokenizer"):
        dataclasses.replace(cfg, tokenizer="")
    gone = {"a": dataclasses.replace(cfg.datasets["a"], files=(str(tmp_path / "no*"),))}
    with pytest.raises(ValueError, match="no file matches .*no\\*"):
        prepare_chat(dataclasses.replace(cfg, datasets=gone), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "name, wrong, right",
    [
        ("validation_fraction", (-0.1, 1.0, float("nan")), (0.0, 0.99)),
        ("max_tokens", (0, -1), (1, None)),
        ("ngram", (0,), (1,)),
        ("max_examples", (0, -1), (1, None)),
        ("near_duplicates", (-0.1, 0.01, 1.1, float("nan")), (0.0, 0.02, 1.0)),
    ],
)
def test_numbers_that_cannot_be_meant(cfg, name, wrong, right):
    config = cfg if hasattr(cfg, name) else cfg.datasets["a"]
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name} is {value}: expected [^.]*[0-9N]"):
            dataclasses.replace(config, **{name: value})
    for value in right:
        dataclasses.replace(config, **{name: value})


def test_compared_answers_are_whole_and_on_one_side_or_counted(tmp_path):
    pairs = [pair(f"q{i}", "yes", "no", id=f"p{i}") for i in range(20)]
    apart = [dataclasses.replace(p[1], pair=f"p{i}") for i, p in enumerate(pairs[1:])]
    answers = [c for (good, _), bad in zip(pairs, apart, strict=False) for c in (good, bad)]
    write(tmp_path / "a.jsonl", [*answers, talk("q", "", quality="bad", pair="p19"), pairs[19][0]])
    dataset = DatasetConfig("messages", (str(tmp_path / "a.jsonl"),))
    cfg = ChatPrepareConfig({"a": dataset}, validation_fraction=0.5, on_bad_line="skip")
    report = prepare_chat(cfg, str(tmp_path / "out"))["a"]
    sides = [read(tmp_path / "out/a" / f"{side}.jsonl") for side in ("train", "validation")]
    assert 0 < sum(map(len, sides)) < 38
    assert all(len(find_pairs(side)) == len(side) / 2 for side in sides)
    assert not set.intersection(*(set(map(prompt_key, side)) for side in sides))
    assert report["dropped"] == {
        "the other answer was left out": 1,
        "questions on both sides": 38 - sum(map(len, sides)),
    }


def test_the_command_takes_what_of_koalas_data_is_there(tmp_path):
    (tmp_path / "preference/hh_rlhf").mkdir(parents=True)
    (tmp_path / "alpaca").mkdir()
    records = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(9)]
    (tmp_path / "alpaca/alpaca_data.json").write_text(json.dumps(records))
    told = {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: -"}
    (tmp_path / "preference/hh_rlhf/a.jsonl").write_text(json.dumps(told))
    command = [sys.executable, "-m", "easylm_jax.prepare", f"--out={tmp_path / 'out'}"]
    command += [f"--config=configs/data/koala.py:{tmp_path}", "--config.validation_fraction=0.5"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sharegpt: left out, no file matches" in done.stdout
    lines = (tmp_path / "out/alpaca").glob("[tv]*.jsonl")
    found = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    assert len(found) == 9 and from_json(found[0], where="x").source == "alpaca"
    assert json.loads((tmp_path / "out/hh_rlhf/counts.json").read_text())["kept"] == 2


def test_koalas_config_finds_hh_as_published_and_hc3_twice(tmp_path):
    for name in (
        *(
            f"hh_rlhf/{kind}-base/{side}.jsonl.gz"
            for kind in ("harmless", "helpful")
            for side in SIDES
        ),
        *(f"hh_rlhf/helpful-online/{side}.jsonl.gz" for side in SIDES),
        "hh_rlhf/red-team-attempts/red_team_attempts.jsonl.gz",
        "hc3/all.jsonl",
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    for folder in (tmp_path / "data", tmp_path):  # FOLDER/<name>/ and FOLDER/*/<name>/
        named = from_config_dict(ChatPrepareConfig, koala.get_config(str(folder))).datasets
        found = {str(f.relative_to(tmp_path)) for f in match_files(named["hh_rlhf"].files)}
        assert found == {
            f"data/hh_rlhf/{kind}/train.jsonl.gz"
            for kind in ("harmless-base", "helpful-base", "helpful-online")
        }
        assert named.keys() == {"hh_rlhf", "hc3_human", "hc3_chatgpt"}
        assert all(named[name].reader == name for name in ("hc3_human", "hc3_chatgpt"))
    (tmp_path / "data/hh_rlhf/mine_test.json").touch()
    assert "mine_test.json" in str(
        match_files(koala.get_config(str(folder)).datasets.hh_rlhf.files)
    )


def test_koalas_config_without_a_folder_names_all_and_with_an_empty_one_none(tmp_path, capsys):
    named = from_config_dict(ChatPrepareConfig, koala.get_config())
    assert set(koala.DATASETS) == set(named.datasets) and not capsys.readouterr().out
    assert all(dataset.reader in READERS for dataset in named.datasets.values())
    empty = from_config_dict(ChatPrepareConfig, koala.get_config(str(tmp_path)))
    assert not empty.datasets and "hh_rlhf: left out" in capsys.readouterr().out
