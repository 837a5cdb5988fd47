"""Templates write the published strings, prompts are prefixes, contents yield no special ids."""

import dataclasses
import json
import random

import numpy as np
import pytest

from easylm_jax.text.example import Example, Segment, encode_example
from easylm_jax.text.jinja_template import JinjaTemplate
from easylm_jax.text.template import (
    TEMPLATES,
    end_token,
    find_template,
    render,
    template_from_json,
    template_to_json,
    with_markers,
)
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.text.small_tokenizers import CHAT, KINDS, random_texts, small_tokenizer

TURNS = [("user", " u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2 ")]
TURNS += [("user", "u3"), ("assistant", "a3")]

# Of the projects' own code and papers: the opening, the opening with the system message "Be kind.",
# three turns with contents as in TURNS. What is learnt stands between « and ».
CURIOUS = "A chat between a curious user and an artificial intelligence assistant. The assistant "
CURIOUS += "gives helpful, detailed, and polite answers to the user's questions."
BELOW = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."
IM = "⟨<|im_start|>⟩"
PUBLISHED = {
    "llama2": [
        "⟨bos⟩[INST] ",
        "⟨bos⟩[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n",
        "u1 [/INST]« a1 ⟨eos⟩»",
        "⟨bos⟩[INST] u2 [/INST]« a2 ⟨eos⟩»",
        "⟨bos⟩[INST] u3 [/INST]« a3 ⟨eos⟩»",
    ],
    "koala": [
        "⟨bos⟩BEGINNING OF CONVERSATION: ",
        None,
        "USER:  u1 GPT:«a1⟨eos⟩»",
        "USER: u2 GPT:«a2 ⟨eos⟩»",
        "USER: u3 GPT:«a3⟨eos⟩»",
    ],
    "hindsight": [
        "⟨bos⟩",
        None,
        "User:  u1 Answer:« a1⟨eos⟩»",
        "User: u2 Answer:« a2 ⟨eos⟩»",
        "User: u3 Answer:« a3⟨eos⟩»",
    ],
    "vicuna": [
        f"⟨bos⟩{CURIOUS} ",
        "⟨bos⟩Be kind. ",
        "USER:  u1 ASSISTANT:« a1⟨eos⟩»",
        "USER: u2 ASSISTANT:« a2 ⟨eos⟩»",
        "USER: u3 ASSISTANT:« a3⟨eos⟩»",
    ],
    "alpaca": [
        f"⟨bos⟩{BELOW}. {REQUEST}\n\n",
        "⟨bos⟩Be kind.\n\n",
        "### Instruction:\n u1\n\n### Response:«a1⟨eos⟩»",
        "### Instruction:\nu2\n\n### Response:«a2 ⟨eos⟩»",
        "### Instruction:\nu3\n\n### Response:«a3⟨eos⟩»",
    ],
    "lima": ["⟨bos⟩", None, " u1⟨eot⟩«a1⟨eot⟩»", "u2⟨eot⟩«a2 ⟨eot⟩»", "u3⟨eot⟩«a3⟨eot⟩»"],
    "tulu": [
        "⟨bos⟩",
        "⟨bos⟩<|system|>\nBe kind.\n",
        "<|user|>\n u1\n<|assistant|>\n«a1⟨eos⟩»\n",
        "<|user|>\nu2\n<|assistant|>\n«a2 ⟨eos⟩»\n",
        "<|user|>\nu3\n<|assistant|>\n«a3⟨eos⟩»\n",
    ],
    "guanaco": [
        "⟨bos⟩",
        None,
        "### Human:  u1### Assistant:« a1»",
        "### Human: u2### Assistant:« a2 »",
        "### Human: u3### Assistant:« a3»",
    ],
    "baize": [
        "⟨bos⟩The conversation between human and AI assistant.\n",
        "⟨bos⟩Be kind.\n",
        "[|Human|]  u1\n[|AI|]« a1»",
        "\n[|Human|] u2\n[|AI|]« a2 »",
        "\n[|Human|] u3\n[|AI|]« a3»",
    ],
    "orca": [
        "⟨bos⟩",
        "⟨bos⟩### System:\nBe kind.\n\n",
        "### User:\n u1\n\n### Assistant:\n«a1⟨eos⟩»",
        "### User:\nu2\n\n### Assistant:\n«a2 ⟨eos⟩»",
        "### User:\nu3\n\n### Assistant:\n«a3⟨eos⟩»",
    ],
    "wizardlm": [
        "⟨bos⟩",
        None,
        " u1\n\n### Response:«a1⟨eos⟩»",
        "u2\n\n### Response:«a2 ⟨eos⟩»",
        "u3\n\n### Response:«a3⟨eos⟩»",
    ],
    "gpt4all": ["", None, " u1\n«a1⟨eos⟩»", "u2\n«a2 ⟨eos⟩»", "u3\n«a3⟨eos⟩»"],
    "chatml": [
        "",
        f"{IM}system\nBe kind.⟨<|im_end|>⟩\n",
        f"{IM}user\n u1⟨<|im_end|>⟩\n{IM}assistant\n«a1⟨<|im_end|>⟩»\n",
        f"{IM}user\nu2⟨<|im_end|>⟩\n{IM}assistant\n«a2 ⟨<|im_end|>⟩»\n",
        f"{IM}user\nu3⟨<|im_end|>⟩\n{IM}assistant\n«a3⟨<|im_end|>⟩»\n",
    ],
    "plain": ["⟨bos⟩", "⟨bos⟩Be kind.", " u1«a1⟨eos⟩»", "u2«a2 ⟨eos⟩»", "u3«a3⟨eos⟩»"],
}
BOS_COUNT = {"llama2": 3, "gpt4all": 0, "chatml": 0}  # in three turns; 1 of all others
ANSWERS = {"llama2": " {} ", **dict.fromkeys(("hindsight", "vicuna", "guanaco", "baize"), " {}")}
ALONE = ("koala", "lima")  # SentencePiece puts a space before their answers


def _messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def _answer(content, quality):
    return {"role": "assistant", "content": content, "quality": quality}


def _written(segments: list[Segment]) -> str:
    texts = [f"⟨{s.text}⟩" if s.special else s.text for s in segments]
    marked = [f"«{text}»" if s.weight else text for text, s in zip(texts, segments, strict=True)]
    return "".join(marked).replace("»«", "")


def _ids(segments, tokenizer):
    return encode_example(Example(tuple(segments)), tokenizer)


def _random_dialogue(rng, template, *, num_turns=3):
    """With a system message, inputs, qualities and pairs of answers where they have a place."""
    texts = iter(random_texts(5 * num_turns + 1, seed=rng.random(), longest=20))
    messages = _messages([("system", next(texts))] * bool(template.opening_with_system))
    for _ in range(num_turns):
        asked = {"role": "user", "content": next(texts), "input": rng.choice([" ", next(texts)])}
        judged = [_answer(next(texts), "good"), _answer(next(texts), "bad")]
        rng.shuffle(judged)
        plain = _messages([("assistant", next(texts))])
        answers = rng.choice([plain, judged[:1], judged]) if template.markers else plain
        messages += [asked, *answers]
    return messages


def _tokenizer(kind, name):
    if kind == "bytes" and name in ("chatml", "lima"):
        pytest.skip("has no such tokens")
    return small_tokenizer(kind)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_published_strings_are_written(name):
    template, (opening, with_system, *turns) = find_template(name), PUBLISHED[name]
    system = _messages([("system", "Be kind.")])
    for count in (1, 3):
        messages, written = _messages(TURNS[: 2 * count]), "".join(turns[:count])
        assert _written(render(template, messages)) == opening + written
        if with_system is not None:
            assert _written(render(template, system + messages)) == with_system + written
    if with_system is None:
        with pytest.raises(ValueError, match="no place for a system message"):
            render(template, system + messages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_prefixes_and_what_is_learnt_are_the_answers(name, kind):
    template, tokenizer = find_template(name), _tokenizer(kind, name)
    rng = random.Random(name)
    end = end_token(template)
    for _ in range(12):
        messages = _random_dialogue(rng, template)
        ids, weights = _ids(render(template, messages), tokenizer)
        assert (ids == tokenizer.bos_id).sum() == BOS_COUNT.get(name, 1)
        assert ids[0] == tokenizer.bos_id or BOS_COUNT.get(name) == 0
        not_learnt = weights.copy()
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            quality = message.get("quality", "")
            asked = render(template, messages[:i], generate=True, quality=quality)
            prompt, prompt_weights = _ids(asked, tokenizer)
            start = len(prompt)
            np.testing.assert_array_equal(ids[:start], prompt)
            np.testing.assert_array_equal(weights[:start], prompt_weights)
            stop = start + int(np.append(weights[start:], 0).argmin())
            answer = ids[start:stop].tolist()
            is_last = [m["role"] for m in messages[i + 1 : i + 2]] != ["assistant"]
            if end and is_last:
                assert answer.pop() == tokenizer.special_id(end)
            content = message["content"].strip() if template.strip else message["content"]
            text = tokenizer.decode(answer, continuation=name not in ALONE)
            assert text == ANSWERS.get(name, "{}").format(content)
            not_learnt[start:stop] = 0
        assert not not_learnt.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_contents_yield_no_special_ids(name, kind):
    tokenizer = _tokenizer(kind, name)
    evil = (
        "".join(CHAT) + "⟨eos⟩⟨bos⟩{user}{input}{marker}{assistant}{system}<s></s><unk>[INST]GPT:"
    )

    def count(content):
        turns = _messages([("user", content), ("assistant", content), ("user", content)])
        turns[0]["input"] = content
        ids, _ = _ids(render(find_template(name), turns, generate=True), tokenizer)
        assert tokenizer.decode(ids).count(content) == 4
        return np.isin(ids, list(tokenizer.specials().values())).sum()

    assert count(evil) == count("harmless")


def test_an_input_has_its_place_or_follows_the_instruction():
    turns = _messages([("user", "Add {input}"), ("assistant", "3"), ("user", "More")])
    with_input = [turns[0] | {"input": "1 2"}, turns[1], turns[2] | {"input": "4"}]
    assert _written(render(find_template("alpaca"), with_input, generate=True)) == (
        f"⟨bos⟩{BELOW}, paired with an input that provides further context. {REQUEST}\n\n"
        "### Instruction:\nAdd {input}\n\n### Input:\n1 2\n\n### Response:«3⟨eos⟩»"
        "### Instruction:\nMore\n\n### Input:\n4\n\n### Response:"
    )
    alone = _written(render(find_template("wizardlm"), with_input[:1], generate=True))
    assert alone == "⟨bos⟩Add {input}\n1 2\n\n### Response:"
    for name in ("alpaca", "wizardlm"):
        blank = [turns[0] | {"input": " \n"}, *turns[1:]]
        assert render(find_template(name), blank) == render(find_template(name), turns)


# ---- quality ------------------------------------------------------------------------------------


def test_a_pair_is_one_sequence():
    asked = {"role": "user", "content": "u1"}
    pair = [asked, _answer("yes", "good"), _answer("no", "bad")]
    assert _written(render(find_template("hindsight"), pair)) == (
        "⟨bos⟩User: u1 A helpful answer:« yes» An unhelpful answer:« no⟨eos⟩»"
    )
    swapped = [asked, pair[2], pair[1], asked]
    assert _written(render(find_template("koala"), swapped, generate=True, quality="bad")) == (
        "⟨bos⟩BEGINNING OF CONVERSATION: USER: u1 An Unhelpful Answer:«no» GPT:«yes⟨eos⟩»"
        "USER: u1 An Unhelpful Answer:"
    )
    # What is asked after a judged answer is the other one of the pair.
    second = render(find_template("hindsight"), pair[:2], generate=True, quality="bad")
    assert _written(second).endswith("« yes» An unhelpful answer:")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["koala", "hindsight"])
def test_swapping_markers_changes_the_marker_of_the_judged_answer_alone(name, kind):
    template, tokenizer = find_template(name), small_tokenizer(kind)
    before = {**dict(template.markers)}
    for seed in range(10):
        texts = random_texts(6, seed=seed, longest=20)
        turns = _messages([("assistant" if i % 2 else "user", t) for i, t in enumerate(texts)])
        made = {}
        for quality in ("good", "bad"):
            turns[3] = _answer(texts[3], quality)
            made[quality] = _ids(render(template, turns), tokenizer)
        (good, good_weights), (bad, bad_weights) = made["good"], made["bad"]
        np.testing.assert_array_equal(good[good_weights > 0], bad[bad_weights > 0])
        # Both are alike up to the second question and from the second answer on.
        start = len(_ids(render(template, turns[:2]), tokenizer)[0])
        stop = int(np.flatnonzero(good_weights[start:])[0]) + start - len(good)
        for part in (slice(0, start), slice(stop, None)):
            np.testing.assert_array_equal(good[part], bad[part])
            np.testing.assert_array_equal(good_weights[part], bad_weights[part])
        middle = tokenizer.decode(bad[start:stop]), tokenizer.decode(good[start:stop])
        assert middle[0].endswith(before["bad"]) and middle[1].endswith(before["good"])
        assert middle[0].removesuffix(before["bad"]) == middle[1].removesuffix(before["good"])
        assert not good_weights[start:stop].any() and not bad_weights[start:stop].any()


def test_markers_are_set_by_name():
    changed = with_markers(find_template("hindsight"), {"bad": "A ⟨eos⟩ {user} answer:"})
    asked = _messages([("user", "u1")])
    written = [
        "".join(s.text for s in render(changed, asked, generate=True, quality=q) if not s.special)
        for q in ("", "good", "bad")
    ]
    assert written == [
        "User: u1 Answer:",
        "User: u1 A helpful answer:",
        "User: u1 A ⟨eos⟩ {user} answer:",
    ]
    assert changed.stop == ("A helpful answer:", "A ⟨eos⟩ {user} answer:")
    assert changed.hash != find_template("hindsight").hash
    with pytest.raises(ValueError, match="no marker for the quality 'fair'"):
        with_markers(changed, {"fair": "An answer:"})
    for quality in ("good", ""):
        with pytest.raises(ValueError, match="'vicuna' has no marker .* such as koala, hindsight"):
            with_markers(find_template("vicuna"), {quality: "An answer:"})


# ---- which tokens have loss ---------------------------------------------------------------------

JINJA = (
    "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}"
)


@pytest.mark.parametrize("name", [*TEMPLATES, "jinja"])
def test_loss_on_all_or_on_the_last_answer(name):
    tokenizer = small_tokenizer("sentencepiece")
    template = JinjaTemplate(JINJA, tokenizer) if name == "jinja" else find_template(name)
    rng = random.Random(name)
    for _ in range(10):
        messages = _random_dialogue(rng, find_template("orca" if name == "jinja" else name))
        ids, weights = _ids(render(template, messages), tokenizer)
        all_ids, all_weights = _ids(render(template, messages, loss_on="all"), tokenizer)
        last_ids, last_weights = _ids(render(template, messages, loss_on="last"), tokenizer)
        np.testing.assert_array_equal(ids, all_ids)
        np.testing.assert_array_equal(ids, last_ids)
        np.testing.assert_array_equal(all_weights, ids != tokenizer.bos_id)
        asked = messages[:-1] if messages[-2]["role"] == "user" else messages[:-2]
        judged = messages[len(asked)].get("quality", "")
        prompt, _ = _ids(render(template, asked, generate=True, quality=judged), tokenizer)
        expected = np.where(np.arange(len(ids)) < len(prompt), 0, weights)
        if len(asked) == len(messages) - 2:  # the last answer is the second one of a pair
            zero = len(prompt) + int(expected[len(prompt) :].argmin())
            expected[:zero] = 0
        np.testing.assert_array_equal(last_weights, expected)
        assert last_weights.any()


def test_the_last_answer_begins_where_the_one_before_it_ended():
    turns = [("user", "u"), ("assistant", "a1"), ("user", ""), ("assistant", "a2")]
    segments = render(find_template("plain"), _messages(turns), loss_on="last")
    assert _written(segments) == "⟨bos⟩ua1⟨eos⟩«a2⟨eos⟩»"


# ---- ids that others made -----------------------------------------------------------------------


def test_llama2_has_the_ids_of_metas_code():
    # Meta encodes "[INST] u [/INST] a " of each round in one piece, between BOS and EOS.
    tokenizer = small_tokenizer("sentencepiece")
    turns = [("user", "the red nut"), ("assistant", "is a hat"), ("user", "so"), ("assistant", "I")]
    ids, _ = _ids(render(find_template("llama2"), _messages(turns)), tokenizer)
    expected = []
    for (_, user), (_, answer) in (turns[:2], turns[2:]):
        text = tokenizer.encode(f"[INST] {user} [/INST] {answer} ")
        expected += [tokenizer.bos_id, *text, tokenizer.eos_id]
    np.testing.assert_array_equal(ids, expected)


def test_koala_answers_begin_like_words():
    # They were tokenised on their own, so SentencePiece put a space before them.
    tokenizer = small_tokenizer("sentencepiece")
    ids, weights = _ids(render(find_template("koala"), _messages(TURNS[:2])), tokenizer)
    assert list(ids[weights == 1]) == [*tokenizer.encode("a1"), tokenizer.eos_id]
    assert tokenizer.pieces[ids[weights == 1][0]].startswith(b" ")


def test_the_end_of_turn_is_the_vocabularys_own_or_llamas_id_0():
    class Llama(ByteTokenizer):
        def piece_id(self, piece: str) -> int | None:
            return {"<unk>": 0}.get(piece)

    assert Llama().special_id("eot") == 0
    for kind in ("sentencepiece", "byte_level"):
        tokenizer = small_tokenizer(kind)
        assert tokenizer.special_id("eot") == tokenizer.piece_id("<|eot_id|>")
    with pytest.raises(ValueError, match="no special token 'eot'"):
        ByteTokenizer().special_id("eot")


# ---- templates as data --------------------------------------------------------------------------


def test_hashes_tell_templates_apart_and_stay():
    assert len({template.hash for template in TEMPLATES.values()}) == len(TEMPLATES)
    # Saved in checkpoints: a change of this means that old ones meet another template.
    assert find_template("koala").hash == "d1c38c62ea1dd741"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_in_a_file_is_the_same_and_any_change_of_it_another(name, tmp_path):
    template, file = find_template(name), tmp_path / "template.json"
    fields = template_to_json(template)
    file.write_text(json.dumps(fields))
    assert find_template(str(file)) == template
    hashes = {template.hash}
    for field in dataclasses.fields(template):
        old = fields[field.name]
        new = {str: lambda x: x + "{system}{input}{marker}", bool: lambda x: not x}
        new |= {list: lambda x: [*x, "stop"], dict: lambda x: x | {"good": "Yes:"}}
        changed = fields | {field.name: new[type(old)](old)}
        if field.name == "markers":
            changed["answer_opening"] = fields["answer_opening"] or "{marker}"
        hashes.add(dataclasses.replace(template, **_as_fields(changed)).hash)
    assert len(hashes) == 1 + len(fields)


def test_fields_with_a_default_may_be_missing_as_in_files_of_earlier_versions():
    template, own = find_template("koala"), ("answer_joined", "markers", "stop")
    fields = template_to_json(template)
    for field in dataclasses.fields(template):
        less = {name: value for name, value in fields.items() if name != field.name}
        if field.default is dataclasses.MISSING:
            with pytest.raises(ValueError, match=f"unknown or missing: {field.name}$"):
                template_from_json(less)
        elif field.name not in own:
            assert template_from_json(less).hash == template.hash
        elif field.name != "markers":  # without which koala's `{marker}` has no meaning
            default = dataclasses.replace(template, **{field.name: field.default})
            assert template_from_json(less) == default


def _as_fields(fields):
    markers, stop = tuple(fields["markers"].items()), tuple(fields["stop"])
    return fields | {"markers": markers, "stop": stop}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"prefix": ""}, "unknown or missing: prefix"),
        ({"user": None}, "unknown or missing: user"),
        ({"user": "Human:"}, "user is 'Human:': expected {user} somewhere"),
        ({"assistant": ""}, "assistant is '': expected {assistant} somewhere"),
        ({"answer_opening": "GPT:"}, "answer_opening is 'GPT:': expected {marker} somewhere"),
        ({"user_with_input": "{user}"}, "user_with_input is '{user}': expected {input} somewhere"),
        ({"opening": 1}, "opening is 1: expected a text"),
        ({"strip": "no"}, "strip is 'no': expected true or false"),
        ({"stop": [1]}, r"stop is \[1\]: expected a list of texts"),
        ({"markers": {"good": 1}}, "markers is .*: expected texts by quality"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_name(changes, sentence, tmp_path):
    fields = template_to_json(find_template("koala")) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        template_from_json(fields)
    file = tmp_path / "own.json"
    for content in (json.dumps(fields), "no json", "[]"):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"no template can be read from {file}") as caught:
            find_template(str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no template can be read from /nowhere"):
        find_template("/nowhere.json")


# ---- bad input ----------------------------------------------------------------------------------

GOOD, BAD = _answer("a", "good"), _answer("b", "bad")


@pytest.mark.parametrize(
    "turns, generate, sentence",
    [
        ([], False, "conversation is empty"),
        ([("assistant", "a")], False, "message 1 is from the assistant where the user"),
        ([("user", "a"), ("user", "b")], False, "message 2 is from the user where the assistant"),
        ([("user", "a"), ("system", "b")], False, "message 2 is from the system"),
        ([("system", "a"), ("assistant", "b")], False, "message 2 is from the assistant"),
        ([("human", "a")], False, "message 1 has the role 'human': expected one of system, user"),
        ([("user", "a"), ("assistant", "b")], True, "needs a message of the user before it"),
        ([("system", "a")], True, "needs a message of the user before it"),
    ],
)
def test_a_conversation_out_of_order_is_one_sentence(turns, generate, sentence):
    for name in ("plain", "koala"):
        with pytest.raises(ValueError, match=sentence) as caught:
            render(find_template(name), _messages(turns), generate=generate)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, answers, quality, sentence",
    [
        ("vicuna", [GOOD], "", "'vicuna' has no marker .* 'good': choose .* koala, hindsight"),
        ("vicuna", [], "bad", "'vicuna' has no marker .* 'bad': choose .* koala, hindsight"),
        ("koala", [], "best", "no marker for the quality 'best': expected one of '', 'good', 'ba"),
        ("koala", [BAD | {"quality": "1"}], "", "no marker for the quality '1'"),
        ("koala", [GOOD, BAD | {"quality": ""}], "", "message 3 is from the assistant where the u"),
        ("koala", [GOOD | {"quality": ""}, BAD], "", "message 3 is from the assistant where the u"),
        ("koala", [GOOD], "", "needs a message of the user before it"),
    ],
)
def test_a_quality_without_a_marker_or_a_pair_without_a_quality_is_one_sentence(
    name, answers, quality, sentence
):
    messages = [{"role": "user", "content": "u"}, *answers]
    with pytest.raises(ValueError, match=sentence) as caught:
        render(find_template(name), messages, generate=True, quality=quality)
    assert "\n" not in str(caught.value)


def test_an_unknown_template_is_one_sentence_with_those_near():
    with pytest.raises(ValueError, match="no template 'lama2'; near it: llama2"):
        find_template("lama2")
