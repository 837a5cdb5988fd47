"""What is trained on of conversations and records: texts, weights, markers, and what is left out.

Examples are compared as strings: `^` is BOS, `$` is EOS, and what has a loss weight stands in
brackets. Whole runs are in `tests/train_finetuning_test.py`.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig, heldout_pairs, make_source, open_examples
from easylm_jax.text.fields import FieldsConfig
from easylm_jax.text.template import find_template
from easylm_jax.text.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
HINDSIGHT = ChatConfig(template="hindsight", judged=("good", "bad"), conditional=True)
PLAIN = ChatConfig(template="plain")


def talk(*contents: str, **rest) -> dict:
    """A conversation at rest; the user begins."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return {"messages": messages, **rest}


def two_answers(*shared: str, good: str = "g", bad: str = "b", pair: str = "p") -> list[dict]:
    return [
        talk(*shared, good, quality="good", pair=pair, id=f"{pair}/good"),
        talk(*shared, bad, quality="bad", pair=pair, id=f"{pair}/bad"),
    ]


def write(folder: Path, records: list, name: str = "x.jsonl") -> str:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def encode(folder: Path, records: list, chat: ChatConfig | None, *, seq_len: int = 256, **data):
    files = (write(folder, records),)
    template = find_template(chat.template) if chat else None
    cfg = DataConfig(files=files, chat=chat, **data)
    return open_examples(cfg, files, TOKENIZER, seq_len=seq_len, template=template)


def shown(ids: np.ndarray, weights: np.ndarray) -> str:
    signs = {TOKENIZER.bos_id: "^", TOKENIZER.eos_id: "$"}
    text, inside = "", False
    for i, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        if bool(weight) != inside:
            text, inside = text + "[]"[inside], not inside
        text += signs.get(i) or TOKENIZER.decode([i])
    return text + "]" * inside


def texts(encoded) -> list[str]:
    return [shown(*encoded[i]) for i in range(len(encoded))]


# ---- what is trained on -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, expected",
    [
        (
            dict(),
            [
                "^User: u Answer:[ a$]User: v A helpful answer:[ g$]",
                "^User: u Answer:[ a$]User: v An unhelpful answer:[ b$]",
            ],
        ),
        (  # Koala's way
            dict(mark_shared_turns=True),
            [
                "^User: u A helpful answer:[ a$]User: v A helpful answer:[ g$]",
                "^User: u An unhelpful answer:[ a$]User: v An unhelpful answer:[ b$]",
            ],
        ),
        (dict(judged=("good",)), ["^User: u Answer:[ a$]User: v A helpful answer:[ g$]"]),
        (
            dict(conditional=False),
            [
                "^User: u Answer:[ a$]User: v Answer:[ g$]",
                "^User: u Answer:[ a$]User: v Answer:[ b$]",
            ],
        ),
        (
            dict(judged=("good_bad", "bad_good")),
            [
                "^User: u Answer:[ a$]User: v A helpful answer:[ g] An unhelpful answer:[ b$]",
                "^User: u Answer:[ a$]User: v An unhelpful answer:[ b] A helpful answer:[ g$]",
            ],
        ),
        (
            dict(judged=("bad", "bad_good"), loss_on="last"),
            [
                "^User: u Answer: a$User: v An unhelpful answer:[ b$]",
                "^User: u Answer: a$User: v An unhelpful answer: b A helpful answer:[ g$]",
            ],
        ),
        (
            dict(judged=("good",), loss_on="all"),
            ["^[User: u Answer: a$User: v A helpful answer: g$]"],
        ),
    ],
)
def test_which_answers_are_trained_on_and_which_bear_a_marker(change, expected, tmp_path):
    cfg = dataclasses.replace(HINDSIGHT, **change)
    encoded = encode(tmp_path, two_answers("u", "a", "v"), cfg)
    assert texts(encoded) == expected
    single = {"good", "bad"} & set(cfg.judged)
    left_out = {f"judged {q}": 1 for q in ("good", "bad") if q not in single}
    assert encoded.counts == left_out


def test_what_nobody_judged_is_always_used_and_keeps_the_neutral_marker(tmp_path):
    records = [talk("q", "n"), *two_answers("v")]
    for cfg in (HINDSIGHT, dataclasses.replace(HINDSIGHT, mark_shared_turns=True)):
        assert texts(encode(tmp_path, records, cfg))[0] == "^User: q Answer:[ n$]"
    only = dataclasses.replace(HINDSIGHT, judged=(), conditional=False)
    assert texts(encode(tmp_path, records, only)) == ["^User: q Answer:[ n$]"]


def test_every_example_says_where_it_is_from(tmp_path):
    cfg = dataclasses.replace(HINDSIGHT, judged=("good", "good_bad"))
    encoded = encode(tmp_path, [talk("q", "n"), *two_answers("v")], cfg)
    assert [(m["id"], m["quality"]) for m in encoded.meta] == [
        ("x.jsonl:1", ""),
        ("p/good", "good"),
        ("p/good", "good_bad"),
    ]


def test_records_spelled_out_in_easylms_language(tmp_path):
    fields = FieldsConfig("[question+context],answer")
    record = {"question": "q", "context": "c", "answer": "a"}
    encoded = encode(tmp_path, [record], None, fields=fields)
    assert texts(encoded) == ["^q c[a$]"]
    bad = [record, {"question": "q", "answer": "a"}]
    with pytest.raises(ValueError, match="^x.jsonl:2 has no field 'context', only"):
        encode(tmp_path, bad, None, fields=fields)
    encoded = encode(tmp_path, bad, None, fields=fields, on_bad_line="skip")
    assert len(encoded) == 1 and encoded.counts == {"does not fit data.fields": 1}
    with pytest.raises(ValueError, match="x.jsonl:1 holds the id 999, but the tokenizer has 259"):
        encode(tmp_path, [record], None, fields=FieldsConfig("<|999|>"))


def test_weights_count_tokens_or_examples(tmp_path):
    records = [talk("q", "a"), talk("q", "a long answer", "r", "and one more")]
    by_token = encode(tmp_path, records, PLAIN)
    assert [w.sum() for _, w in by_token] == [len("a$"), len("a long answer$and one more$")]
    assert {w for _, ws in by_token for w in ws.tolist()} == {0.0, 1.0}
    alike = dataclasses.replace(PLAIN, weighting="example")
    for (_, weights), (_, whole) in zip(encode(tmp_path, records, alike), by_token, strict=True):
        np.testing.assert_allclose(weights, whole / whole.sum(), rtol=1e-6)
        assert weights.sum() == pytest.approx(1)
    # The first token is no target: what it would weigh does not count.
    alike = dataclasses.replace(alike, template="gpt4all", loss_on="all")
    (_, weights), *_ = encode(tmp_path, records, alike)
    assert weights[0] > 0 and weights[1:].sum() == pytest.approx(1)


# ---- what does not fit --------------------------------------------------------------------------


def test_an_example_just_as_long_as_a_row_is_kept_and_a_longer_one_dropped_or_trimmed(tmp_path):
    records = [talk("q", "12345678"), talk("q", "123456789"), talk("a long question", "1")]
    # "^q12345678$" has ten pairs of a token and its target.
    dropped = encode(tmp_path, records, PLAIN, seq_len=10)
    assert texts(dropped) == ["^q[12345678$]"]
    assert dropped.counts == {"too long": 2}
    trim = dataclasses.replace(PLAIN, too_long="trim")
    trimmed = encode(tmp_path, records, trim, seq_len=10)
    assert texts(trimmed) == ["^q[12345678$]", "^q[123456789]"]  # no end that was not reached
    assert trimmed.counts == {"trimmed": 1, "too long": 1}  # nothing of the third could be learnt
    alike = dataclasses.replace(trim, weighting="example")
    assert [w.sum() for _, w in encode(tmp_path, records, alike, seq_len=10)] == pytest.approx(
        [1, 1]
    )
    with pytest.raises(ValueError, match=r"no example in .*x.jsonl can .*'too long': 3"):
        encode(tmp_path, records, PLAIN, seq_len=4)


def test_an_example_without_loss_is_named_or_counted_and_never_trained_on(tmp_path):
    fields = FieldsConfig("[q],a", add_eos_token=False)
    records = [{"q": "q", "a": "a"}, {"q": "q", "a": ""}]
    with pytest.raises(ValueError, match="^example x.jsonl:2 has no token with a loss weight"):
        encode(tmp_path, records, None, fields=fields)
    encoded = encode(tmp_path, records, None, fields=fields, on_bad_line="skip")
    assert texts(encoded) == ["^q[a]"] and encoded.counts == {"no loss": 1}
    # Loss on the very first token alone is none, since nothing predicts it.
    alone = FieldsConfig("q,[a]", add_bos_token=False, eos_weight="last_field")
    with pytest.raises(ValueError, match="^example x.jsonl:1 has no token with a loss weight"):
        encode(tmp_path, records, None, fields=alone)


SYSTEM = {"role": "system", "content": "s"}
BAD = [  # a line, what is counted, and what is said of it
    ("{", "not JSON", "x.jsonl:2 is not JSON"),
    ({"text": "q"}, "no field 'messages'", "x.jsonl:2 has no field 'messages'"),
    (talk("", "a"), "empty message of the user", "x.jsonl:2: message 1 is empty"),
    (talk("q", " "), "empty message of the assistant", "x.jsonl:2: message 2 is empty"),
    (talk("q"), "no answer at the end", "x.jsonl:2: it does not end with an answer"),
    (
        {"messages": talk("q", "a")["messages"][1:]},
        "starts with the assistant",
        "x.jsonl:2: message 1 is from the assistant",
    ),
    (
        {"messages": talk("q")["messages"] + talk("r", "a")["messages"]},
        "two turns of the user",
        "x.jsonl:2: message 2 is from the user",
    ),
    (
        {"messages": [SYSTEM] + talk("q", "a")["messages"]},
        "does not fit the template",
        "conversation x.jsonl:2: template 'hindsight' has no place for a system message",
    ),
    (talk("q", "a", quality="fair"), "unknown quality", "x.jsonl:2: quality is 'fair'"),
]


@pytest.mark.parametrize("bad, reason, words", BAD, ids=[reason for _, reason, _ in BAD])
def test_a_bad_conversation_is_one_sentence_or_counted(bad, reason, words, tmp_path):
    records = [*two_answers("q"), talk("q", "a")]
    records = [records[0], bad, *records[1:]]
    with pytest.raises(ValueError, match=words) as caught:
        encode(tmp_path, records, HINDSIGHT)
    assert "\n" not in str(caught.value)
    encoded = encode(tmp_path, records, HINDSIGHT, on_bad_line="skip")
    assert len(encoded) == 3 and encoded.counts == {reason: 1}


def test_every_conversation_is_kept_or_counted(tmp_path):
    cfg = dataclasses.replace(HINDSIGHT, judged=("good",), too_long="trim")
    kept = [*two_answers("q"), talk("q", "a" * 300), talk("q", "n")]  # of which "bad" is not asked
    records = [*kept, *(bad for bad, *_ in BAD), talk("q" * 300, "a")]
    encoded = encode(tmp_path, records, cfg, on_bad_line="skip")
    left_out = sum(encoded.counts.values()) - encoded.counts["trimmed"]
    assert len(encoded) + left_out == len(records)
    assert (len(encoded), encoded.counts["trimmed"]) == (3, 1)


def test_a_pair_whose_answers_have_two_prompts_cannot_be_one_sequence(tmp_path):
    good, bad = two_answers("q")
    bad["messages"][0]["content"] = "another question"
    cfg = dataclasses.replace(HINDSIGHT, judged=("good", "good_bad"))
    with pytest.raises(ValueError, match="p/good and p/bad answer different prompts"):
        encode(tmp_path, [good, bad], cfg)
    encoded = encode(tmp_path, [good, bad], cfg, on_bad_line="skip")
    assert len(encoded) == 1 and encoded.counts["pair with two prompts"] == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(), "no conversation has a verdict: read preference data"),
        (dict(conditional=False, judged=("good_bad",)), "no conversation has a verdict"),
        (dict(reader="mesages"), "there is no reader 'mesages'; near it: messages"),
        (dict(template="koalla"), "there is no template 'koalla'; near it: koala"),
    ],
)
def test_a_config_that_the_data_do_not_serve_is_one_sentence(change, words, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        encode(tmp_path, [talk("q", "a")], dataclasses.replace(HINDSIGHT, **change))
    assert "\n" not in str(caught.value)


def test_other_settings_that_cannot_be_meant(tmp_path):
    with pytest.raises(ValueError, match="judged has better: expected some of good, bad, good_bad"):
        ChatConfig(template="koala", judged=("good", "better"))
    with pytest.raises(ValueError, match="mark_shared_turns .* set conditional=True as well"):
        ChatConfig(template="koala", mark_shared_turns=True)
    with pytest.raises(ValueError, match="'plain' has no marker for answers of the quality 'good'"):
        encode(tmp_path, two_answers("q"), dataclasses.replace(HINDSIGHT, template="plain"))
    with pytest.raises(ValueError, match="data.chat and data.fields both say how to read"):
        encode(tmp_path, [talk("q", "a")], PLAIN, fields=FieldsConfig("q,a"))
    file = write(tmp_path, [talk("q", "a")])
    with pytest.raises(ValueError, match="no two answers in .*x.jsonl were compared"):
        heldout_pairs(
            DataConfig(files=(file,), heldout_files=(file,), chat=PLAIN), find_template("koala")
        )
    with pytest.raises(ValueError, match="eval.pairs needs data.chat and data.heldout_files"):
        heldout_pairs(DataConfig(files=(file,), chat=PLAIN), find_template("koala"))


# ---- epochs -------------------------------------------------------------------------------------


def source_of(folder: Path, records: list, *, seq_len: int, batch_size: int = 2, **data):
    cfg = DataConfig(files=(write(folder, records),), chat=PLAIN, **data)
    shape = dict(batch_size=batch_size, seq_len=seq_len, tokenizer=TOKENIZER)
    return make_source(cfg, **shape, rows=range(batch_size), template=find_template("plain"))


def test_an_epoch_is_its_rows_counted_by_hand(tmp_path):
    records = [talk("q", f"{n:02d}" + "." * (n % 3)) for n in range(24)]  # 4, 5 or 6 pairs, 120
    for packing, rows in dict(padded=24, stream=120 // 6).items():
        source = source_of(tmp_path, records, seq_len=6, packing=packing)
        assert source.tokens_per_epoch == rows * 6
    source = source_of(tmp_path, records[5::3], seq_len=12)  # seven of 6, two to a row
    assert source.tokens_per_epoch == 4 * 12


@pytest.mark.parametrize("packing, seq_len", [("padded", 4), ("best_fit", 8)])
def test_every_epoch_holds_every_example_once(packing, seq_len, tmp_path):
    records = [talk("q", f"{n:02d}") for n in range(24)]  # of four pairs
    source = source_of(tmp_path, records, seq_len=seq_len, packing=packing)
    steps, rest = divmod(source.tokens_per_epoch, 2 * seq_len)
    assert rest == 0
    for epoch in range(1, 4):
        learnt = []
        for _ in range(steps):
            batch, metrics = source.next()
            learnt += batch.targets[batch.weights > 0].tolist()
        answers = TOKENIZER.decode([i for i in learnt if i != TOKENIZER.eos_id])
        assert sorted(answers[i : i + 2] for i in range(0, 48, 2)) == [
            f"{n:02d}" for n in range(24)
        ]
        assert learnt.count(TOKENIZER.eos_id) == 24 and metrics["data/epochs"] == epoch


def test_a_run_goes_on_with_the_same_examples_only(tmp_path):
    records = [talk("q", f"{n:02d}") for n in range(24)]
    state = source_of(tmp_path, records, seq_len=8).state()
    source_of(tmp_path, records, seq_len=8).restore(state)
    changed = [*records[:-1], talk("q", "2e")]  # as many, and as long
    for others in (changed, records[::-1]):
        with pytest.raises(ValueError, match="trained on other packed data"):
            source_of(tmp_path, others, seq_len=8).restore(state)
    identity = encode(tmp_path, records, PLAIN).identity
    assert encode(tmp_path, records, PLAIN).identity == identity
    for change in (dict(loss_on="all"), dict(weighting="example")):  # the same ids
        assert encode(tmp_path, records, dataclasses.replace(PLAIN, **change)).identity != identity
