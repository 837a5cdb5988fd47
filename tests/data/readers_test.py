"""Every layout with one record whose conversations are written out by hand, and what is left out.

With EASYLM_SHARED naming a folder with `data/`, whole published files too, against counts made
another way.
"""

import dataclasses
import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from easylm_jax.data.conversation import Conversation, find_pairs, prompt_key, to_json
from easylm_jax.data.documents import BadLine
from easylm_jax.data.readers import READERS, read_conversations, read_records


def _read(path, reader, **options):
    counts = Counter()
    found = read_conversations([str(path)], reader=reader, source="data", counts=counts, **options)
    return list(found), dict(counts)


def _of(tmp_path, reader, *records, **options):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return _read(path, reader, **options)


def _turns(*contents, system=""):
    """user, assistant, user ...; a pair is a user's content and input."""
    turns = [{"role": "system", "content": system}] if system else []
    for i, content in enumerate(contents):
        content, given = content if isinstance(content, tuple) else (content, None)
        turn = {"role": ("user", "assistant")[i % 2], "content": content}
        turns.append(turn | ({"input": given} if given else {}))
    return tuple(turns)


def _node(role, text, *replies, **options):
    return {"role": role, "text": text, "replies": list(replies)} | options


TREE = {
    "prompt": _node(
        "prompter",
        "q",
        _node("assistant", "worse", rank=1),
        _node(
            "assistant",
            "better",
            _node("prompter", "unanswered", rank=1),
            _node("prompter", "more", _node("assistant", "a"), _node("assistant", "b", rank=0)),
            rank=0,
        ),
        _node("assistant", "said no more", _node("prompter", "hm?"), rank=2),
        _node("assistant", "gone", deleted=True),
    )
}
SINGLE = [  # reader, record, conversations by id after "x.jsonl:1"
    ("alpaca", {"instruction": "i", "input": "", "output": "o"}, {"": _turns("i", "o")}),
    ("alpaca", {"instruction": "i", "input": "x", "response": "o"}, {"": _turns(("i", "x"), "o")}),
    (
        "dolly",
        {"instruction": "i", "context": "c", "response": "r", "category": "qa"},
        {"": _turns(("i", "c"), "r")},
    ),
    (
        "dolly",
        {"instruction": "i", "input": "c", "output": "r", "category": "qa"},
        {"": _turns(("i", "c"), "r")},
    ),
    (
        "self_instruct",
        {
            "instruction": "i",
            "instances": [{"input": "", "output": "o"}, {"input": "x", "output": "p"}],
        },
        {"/1": _turns("i", "o"), "/2": _turns(("i", "x"), "p")},
    ),
    ("prompt_completion", {"prompt": "p", "completion": "c"}, {"": _turns("p", "c")}),
    ("prompt_completion", {"prompt": "p", "response": "c"}, {"": _turns("p", "c")}),
    ("flan_cot", {"inputs": "p", "targets": "c"}, {"": _turns("p", "c")}),
    ("gpt4all", {"prompt": "p", "response": "c", "source": "url"}, {"": _turns("p", "c")}),
    (
        "orca",
        {"system_prompt": "s", "question": "q", "response": "r"},
        {"": _turns("q", "r", system="s")},
    ),
    ("orca", {"system_prompt": "", "question": "q", "response": "r"}, {"": _turns("q", "r")}),
    (
        "hc3",
        {"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]},
        {
            "/human/1": _turns("q", "a"),
            "/human/2": _turns("q", "b"),
            "/chatgpt/1": _turns("q", "c"),
        },
    ),
    (
        "hc3_chatgpt",
        {"question": "q", "human_answers": ["a", "b"], "chatgpt_answers": ["c"]},
        {"/chatgpt/1": _turns("q", "c")},
    ),
    (
        "hc3_human",
        {"question": "q", "human_answers": ["a"], "chatgpt_answers": ["c"]},
        {"/human/1": _turns("q", "a")},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a "},
                {"from": "gpt", "value": "b"},
                {"from": "user", "value": "c"},
                {"from": "bard", "value": "d"},
            ]
        },
        {"": _turns("a ", "b", "c", "d", system="s")},
    ),
    ("lima", {"conversations": ["a", "b", "c", "d"]}, {"": _turns("a", "b", "c", "d")}),
    (
        "lima",
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]},
        {"": _turns("a", "b", "c", "d")},
    ),
    (
        "oig",
        {"text": "Background: s\n<human>: a\nb\n<bot>: see <human>: c\n<human>: d\n<bot>:e"},
        {"": _turns("a\nb", "see <human>: c", "d", "e", system="Background: s")},
    ),
    (
        "baize",
        {
            "input": "The conversation between human and AI assistant.\n[|Human|] a\n[|AI|] b\nb\n"
            "[|Human|] c\n[|AI|] d\n[|Human|] "
        },
        {"": _turns("a", "b\nb", "c", "d")},
    ),
    (
        "oasst",
        TREE,
        {
            "/1": _turns("q", "worse"),
            "/2": _turns("q", "better", "more", "a"),
            "/3": _turns("q", "better", "more", "b"),
            "/4": _turns("q", "said no more"),
        },
    ),
    # Of the replies to the better answer, the one with a rank is the best, and has no answer.
    ("oasst_best", TREE["prompt"], {"/1": _turns("q", "better")}),
    ("messages", {"messages": list(_turns("a", "b"))}, {"": _turns("a", "b")}),
]


@pytest.mark.parametrize("reader, record, expected", SINGLE)
def test_layouts_without_a_verdict(tmp_path, reader, record, expected):
    found, counts = _of(tmp_path, reader, record)
    assert {c.id: c.messages for c in found} == {f"x.jsonl:1{k}": v for k, v in expected.items()}
    assert {(c.source, c.quality, c.pair, c.score) for c in found} == {("data", "", "", None)}
    assert counts == {}


HEAD = "\n\nHuman: a\n\nAssistant: the word Human: x\n\nHuman: b\n\nAssistant: "
HH = ("a", "the word Human: x", "b")
PANDA = {"instruction": "i", "input": "x", "response1": "1", "response2": "2"}
WEBGPT = {
    "question": {"full_text": "q", "id": "1"},
    "answer_0": "no",
    "score_0": -0.5,
    "quotes_0": {"title": [], "extract": []},
    "answer_1": "yes",
    "score_1": 0.5,
    "quotes_1": {"title": ["T", "U"], "extract": ["e", "f"]},
}


def _votes(*votes):
    return PANDA | {f"annotator{i}": vote for i, vote in enumerate(votes, start=1)}


JUDGED = [  # reader, record, good, bad, scores
    ("hh", {"chosen": HEAD + "good ", "rejected": HEAD}, (*HH, "good"), (*HH, ""), None),
    ("hh", {"text": [HEAD + "1", HEAD + "2"], "score": [0.0, 1.0]}, (*HH, "2"), (*HH, "1"), (1, 0)),
    (
        "webgpt",
        {"text": [f"## Human:\nq\n\nx\n\n## Assistant:\n{a}" for a in "ab"], "score": [1.5, 0.5]},
        ("q\n\nx", "a"),
        ("q\n\nx", "b"),
        (1.5, 0.5),
    ),
    ("pandalm", _votes(1, 1, 0), (("i", "x"), "1"), (("i", "x"), "2"), None),
    ("pandalm", _votes(1, 2, 2), (("i", "x"), "2"), (("i", "x"), "1"), None),
    ("pairs", {"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c"), ("p", "r"), None),
    (
        "pairs",
        {"prompt": list(_turns("a", "b", "c")), "chosen": "c", "rejected": "r"},
        ("a", "b", "c", "c"),
        ("a", "b", "c", "r"),
        None,
    ),
]


@pytest.mark.parametrize("reader, record, good, bad, scores", JUDGED)
def test_layouts_with_a_verdict(tmp_path, reader, record, good, bad, scores):
    found, counts = _of(tmp_path, reader, record, validate=False)
    assert [(c.id, c.quality, c.pair) for c in found] == [
        ("x.jsonl:1/chosen", "good", "x.jsonl:1"),
        ("x.jsonl:1/rejected", "bad", "x.jsonl:1"),
    ]
    assert [c.messages for c in found] == [_turns(*good), _turns(*bad)]
    assert tuple(c.score for c in found) == (scores or (None, None))
    assert find_pairs(found) == [tuple(found)] and counts == {}


def test_sources_of_an_answer_are_the_input_of_its_question(tmp_path):
    (good, bad), _ = _of(tmp_path, "webgpt", WEBGPT)
    phrase, *sources = good.messages[0].pop("input").split("\n")
    assert phrase.endswith(":") and sources == ["[1] T: e", "[2] U: f"]
    assert (good.messages, bad.messages) == (_turns("q", "yes"), _turns("q", "no"))
    assert (good.score, bad.score) == (0.5, -0.5)
    assert prompt_key(good) == prompt_key(bad)  # they stay on one side of a split


def test_comparisons_of_one_post_are_one_prompt(tmp_path):
    def comparison(post, choice):
        summaries = [{"text": " first"}, {"text": " second"}]
        return {"info": {"title": "t", "post": post}, "summaries": summaries, "choice": choice}

    posts = [f"post {number}" for number in range(40)]
    records = [comparison(post, choice) for choice in (0, 1) for post in posts]
    found, _ = _of(tmp_path, "summarize", *records)
    assert [c.messages[1]["content"] for c in found] == ["first", "second"] * 40 + [
        "second",
        "first",
    ] * 40
    prompts = [c.messages[0]["content"] for c in found]
    assert prompts[:80] == prompts[80:]
    tasks = Counter(prompt.split("\n\n")[0] for prompt in prompts)
    assert len(tasks) == 4
    assert prompts[6].split("\n\n")[1:] == ["Title: t", "post 3"]


LEFT_OUT = [  # reader, record, reason
    ("hh", {"text": [HEAD + "1", HEAD + "2"], "score": [1.0, 1.0]}, "tie"),
    ("hh", {"chosen": HEAD + "1", "rejected": HEAD[:-16] + "\n\nAssistant: 2"}, "prompts differ"),
    ("hh", {"chosen": HEAD + "1", "rejected": HEAD + "1"}, "equal answers"),
    ("webgpt", WEBGPT | {"score_0": 0.5}, "tie"),
    ("pandalm", _votes(0, 0, 2), "tie"),
    ("pandalm", _votes(1, 0, 2), "tie"),
    ("hc3", {"question": "q", "human_answers": [], "chatgpt_answers": []}, "no answer"),
    ("oasst", {"prompt": _node("prompter", "q")}, "no answer"),
]


@pytest.mark.parametrize("reader, record, reason", LEFT_OUT)
def test_what_says_nothing_is_counted_and_is_no_error(tmp_path, reader, record, reason):
    assert _of(tmp_path, reader, record) == ([], {reason: 1})


BAD = [  # reader, record, reason, words of the sentence
    (
        "alpaca",
        {"instruction": "i"},
        "no field 'output' or 'response'",
        ["its fields are 'instruct"],
    ),
    ("alpaca", {"instruction": None, "output": "o"}, "no field 'instruction'", []),
    ("alpaca", {"instruction": 3, "output": "o"}, "'instruction' is not a text", ["a int"]),
    ("alpaca", {"instruction": "i", "output": " "}, "empty message of the assistant", []),
    ("alpaca", {"instruction": "\ud800", "output": "o"}, "not Unicode", ["surrogate"]),
    ("sharegpt", {"conversations": [{"from": "x", "value": "v"}]}, "unknown role", ["'x'"]),
    ("sharegpt", {"conversations": ["v"]}, "'conversations' holds not an object", ["holds a str"]),
    ("sharegpt", {"conversations": {}}, "'conversations' is not a list", []),
    (
        "sharegpt",
        {"conversations": [{"from": "gpt", "value": "v"}]},
        "starts with the assistant",
        [],
    ),
    ("lima", {"conversations": ["a"]}, "no answer at the end", []),
    ("lima", {"instruction": "i", "output": "o", "history": [["a", 1]]}, "not a text", []),
    ("hh", {"chosen": "hello", "rejected": "x"}, "no dialogue", ["'hello'"]),
    ("hh", {"chosen": "pre" + HEAD + "1", "rejected": HEAD}, "text before the dialogue", ["'pre'"]),
    ("hh", {"text": [HEAD + "1"], "score": [1]}, "no two texts", []),
    ("hh", {"text": [HEAD + "1", HEAD], "score": [1, "2"]}, "no two scores", ["'2'"]),
    ("webgpt", WEBGPT | {"question": "q"}, "'question' is not an object", []),
    ("webgpt", WEBGPT | {"quotes_1": {"title": ["T"]}}, "titles without extracts", []),
    ("pandalm", _votes(1, 1, 3), "unknown vote", ["'3'"]),
    ("summarize", {"info": {"post": "p"}, "summaries": [], "choice": 2}, "no choice", ["2 of 0"]),
    ("messages", {"messages": [{"role": "user"}]}, "messages of another form", []),
]


@pytest.mark.parametrize("reader, record, reason, words", BAD)
def test_bad_records_are_named_or_counted(tmp_path, reader, record, reason, words):
    good = {"chosen": HEAD + "1", "rejected": HEAD + "2"} if reader == "hh" else None
    records = [record] + ([good] if good else [])
    found, counts = _of(tmp_path, reader, *records, on_bad_line="skip")
    assert (len(found), counts) == (2 if good else 0, {reason: 1})
    with pytest.raises(BadLine) as caught:
        _of(tmp_path, reader, record)
    assert caught.value.reason == reason
    assert [word for word in ["x.jsonl:1", *words] if word not in str(caught.value)] == []


def test_an_empty_answer_leaves_the_other_one_of_its_pair(tmp_path):
    record = {"chosen": HEAD + "1", "rejected": HEAD}
    (left,), counts = _of(tmp_path, "hh", record, on_bad_line="skip")
    assert left.quality == "good" and counts == {"empty message of the assistant": 1}


def test_an_unknown_reader_names_those_near_it(tmp_path):
    with pytest.raises(ValueError, match="no reader 'sharegtp'; near it: sharegpt"):
        _read(tmp_path / "none.json", "sharegtp")


# ------------------------------------------------------------------------------------ files


def _random_records(count):
    rng = random.Random(0)
    alphabet = 'ab[]{}\n\r\u2028\x85\u00e9\U0001f600"\\'
    return [{"t": "".join(rng.choices(alphabet, k=9)), "n": i, "l": [i]} for i in range(count)]


def _jsonl(records):
    return "\n\n".join(map(json.dumps, records)).encode()


def _parquet(records, path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)


@pytest.mark.parametrize(
    "name, write, step",
    [
        ("a.json", lambda r: b"\xef\xbb\xbf \n" + json.dumps(r, indent=1).encode(), 1),
        ("a.json.gz", lambda r: gzip.compress(json.dumps(r, ensure_ascii=False).encode()), 1),
        ("a.json.zst", lambda r: zstandard.compress(_jsonl(r)), 2),
        ("a.json", _jsonl, 2),
        ("a.jsonl", _jsonl, 2),
        ("a.ndjson.gz", lambda r: gzip.compress(_jsonl(r)), 2),
        ("a.parquet", None, 1),
    ],
)
def test_records_of_every_kind_of_file_and_their_places(tmp_path, name, write, step):
    records = _random_records(30)
    if write:
        (tmp_path / name).write_bytes(write(records))
    else:
        _parquet(records, tmp_path / name)
    found = list(read_records([f"{tmp_path}/*"], counts=Counter()))
    assert found == [(f"{name}:{1 + step * i}", record) for i, record in enumerate(records)]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("b", "a"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        (tmp_path / "data" / folder / "train.jsonl").write_text("{}\n")
    found = list(read_records([f"{tmp_path}/data/*/*"], counts=Counter()))
    assert [where for where, _ in found] == ["a/train.jsonl:1", "b/train.jsonl:1"]


WHOLE = json.dumps([{"a": 1}, {"b": 2}]).encode()


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.json", WHOLE[:-3], "not JSON"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.json", WHOLE.replace(b"1", b"\xff"), "not UTF-8"),
        ("a.json.gz", gzip.compress(WHOLE)[:-9], "damaged file"),
        ("a.json.zst", zstandard.compress(WHOLE)[:-1], "damaged file"),
        ("a.json", b'[[1], {"c": 3}]', "not an object"),
        ("a.jsonl", b'{"c": 3}\n{"d": \n', "not JSON"),
        ("a.jsonl", b'7\n{"c": 3}', "not an object"),
        ("a.parquet", b"PAR1 and no more", "damaged file"),
    ],
)
def test_damaged_files_get_a_sentence_or_are_counted(tmp_path, name, content, reason):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadLine, match=f"{name}.* ") as caught:
        list(read_records([f"{tmp_path}/{name}"], counts=Counter()))
    assert caught.value.reason == reason and "\n" not in str(caught.value)
    counts = Counter()
    found = list(read_records([f"{tmp_path}/{name}"], counts=counts, on_bad_line="skip"))
    assert [record for _, record in found] == (
        [{"c": 3}] if b"c" in content[:20] and b'"c"' in content else []
    )
    assert counts == {reason: 1}


def test_files_of_other_kinds_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match=r"a\.csv is none of \.json, .*: convert"):
        list(read_records([f"{tmp_path}/a.csv"], counts=Counter()))


def test_what_is_written_is_read_again(tmp_path):
    first, _ = _of(tmp_path, "hh", {"text": [HEAD + "1", HEAD + "2"], "score": [0.0, 1.0]})
    written = [to_json(conversation) | {"source": "another"} for conversation in first]
    again, counts = _of(tmp_path, "messages", *written)
    assert again == [dataclasses.replace(c, source="another") for c in first] and counts == {}


def test_null_is_none_as_in_a_table_of_what_is_written(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    judged, _ = _of(tmp_path, "hh", {"text": [HEAD + "1", HEAD + "2"], "score": [0.0, 1.0]})
    plain, _ = _of(tmp_path, "alpaca", {"instruction": "i", "input": "x", "output": "o"})
    table = pyarrow.Table.from_pylist([to_json(c) for c in [*judged, *plain]])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert _read(tmp_path / "a.parquet", "messages") == ([*judged, *plain], {})
    nulls = dict.fromkeys(("id", "source", "pair", "quality", "score"))
    (read,), _ = _of(tmp_path, "messages", nulls | {"messages": list(_turns("i", "o"))})
    assert read == Conversation("x.jsonl:1", _turns("i", "o"), source="data")


# ------------------------------------------------------------------------- published data sets

SHARED = Path(os.environ.get("EASYLM_SHARED", "/nowhere"), "data")
EMPTY, TWICE = "empty message of the assistant", "two turns of the assistant"
NO_TEXT = {"'response1' is not a text": 4, "'response2' is not a text": 2}
PUBLISHED = [  # reader, file, conversations, pairs, counts
    ("alpaca", "sft/alpaca/alpaca_union_20678.json", 20668, 0, {EMPTY: 10}),
    ("alpaca", "sft/rasbt/instruction-data.json", 1100, 0, {}),
    ("self_instruct", "sft/alpaca/seed_tasks.jsonl", 175, 0, {}),
    ("dolly", "sft/dolly/dolly_3k.json", 2996, 0, {}),
    ("prompt_completion", "sft/dolly/dolly_hhrlhf_train_small.jsonl", 1000, 0, {}),
    ("lima", "sft/lima/lima.json", 1029, 0, {}),
    ("sharegpt", "sft/vicuna/dummy_conversation.json", 500, 0, {}),
    ("oasst", "sft/oasst/en_100_tree.jsonl", 546, 0, {}),
    ("oasst", "sft/oasst/en_100_message.jsonl", 546, 0, {}),
    ("oasst_best", "sft/oasst/en_100_tree.jsonl", 100, 0, {}),
    (
        "hh",
        "preference/hh_rlhf/harmless-base_test.jsonl.gz",
        *(4602, 2299, {EMPTY: 4, TWICE: 8, "prompts differ": 5}),
    ),
    (
        "hh",
        "preference/hh_rlhf/dsp_harmless_test.json",
        *(4602, 2299, {EMPTY: 4, TWICE: 8, "prompts differ": 5}),
    ),
    (
        "hh",
        "preference/hh_rlhf/dsp_helpful_test.json",
        *(4669, 2333, {EMPTY: 5, TWICE: 12, "prompts differ": 9}),
    ),
    ("webgpt", "preference/webgpt/dsp_webgpt_test.json", 1312, 656, {"tie": 245}),
    (
        "pandalm",  # six answers there are `true`
        "preference/pandalm/testset-v1.json",
        *(1722, 835, {EMPTY: 52, "tie": 105, "empty message of the user": 2} | NO_TEXT),
    ),
]


@pytest.mark.skipif(not SHARED.exists(), reason="EASYLM_SHARED names no folder with data/")
@pytest.mark.parametrize("reader, file, conversations, pairs, counts", PUBLISHED)
def test_published_files(reader, file, conversations, pairs, counts):
    found, left_out = _read(SHARED / file, reader, on_bad_line="skip")
    assert (len(found), len(find_pairs(found)), left_out) == (conversations, pairs, counts)
    assert len({c.id for c in found}) == len(found)


def test_every_reader_is_tested():
    tested = {case[0] for case in [*SINGLE, *JUDGED]} | {"webgpt", "summarize"}
    assert set(READERS) == tested
