"""Each rule of EasyLM's `fields` language, with ids and weights worked out by hand.

The byte tokenizer spells a character by its byte + 3, with BOS 1 and EOS 2: "a" is 100, " " is 35.
"""

import base64
import random
import warnings

import numpy as np
import pytest

from easylm_jax.text import fields as fields_lib
from easylm_jax.text.example import encode_example
from easylm_jax.text.fields import FieldsConfig, fields_example
from easylm_jax.text.tokenizer import load_tokenizer
from tests.text.small_tokenizers import small_tokenizer

BYTES = load_tokenizer("bytes")
IDS = base64.b64encode(np.array([7, 70000, 9], "<i4").tobytes()).decode()
RECORD = {"a": "a", "b": "bb", "": "-", "ids": IDS, "n,+[": "n", "n]": "m", "spec": "[b],<|7|>"}

GOLDEN = [  # fields, options beside add_bos_token=False and add_eos_token=False, ids, weights
    ("a", {}, [100], [1]),
    ("a,b", {}, [100, 101, 101], [1, 1, 1]),
    ("a+b", {}, [100, 35, 101, 101], [1, 1, 1, 1]),
    ("b+a+a", {"subfield_separator": ""}, [101, 101, 100, 100], [1, 1, 1, 1]),
    ("[a+b],a", {}, [100, 35, 101, 101, 100], [0, 0, 0, 0, 1]),
    ("[a],[b]", {}, [100, 101, 101], [0, 0, 0]),
    ("<|bos|>,a,[<|eos|>]", {}, [1, 100, 2], [1, 1, 0]),
    ("[<|300|>],<|0|>", {}, [300, 0], [0, 1]),
    ("{ids},a", {}, [7, 70000, 9, 100], [1, 1, 1, 1]),
    ("[{ids}]", {}, [7, 70000, 9], [0, 0, 0]),
    ("{ids}", {"base64_token_dtype": "u2"}, [7, 0, 4464, 1, 9, 0], [1] * 6),
    # BOS never has weight; the EOS that is added always has, unless told to follow the last part.
    ("a", {"add_bos_token": True, "add_eos_token": True}, [1, 100, 2], [0, 1, 1]),
    ("[a]", {"add_eos_token": True}, [100, 2], [0, 1]),
    ("[a]", {"add_eos_token": True, "eos_weight": "last_field"}, [100, 2], [0, 0]),
    ("[a],a", {"add_eos_token": True, "eos_weight": "last_field"}, [100, 100, 2], [0, 1, 1]),
    # Text before the first part: also inside its brackets, never before ids or a special token.
    ("[a],a", {"prepend_text": "b "}, [101, 35, 100, 100], [0, 0, 0, 1]),
    ("<|bos|>,a", {"prepend_text": "b"}, [1, 100], [1, 1]),
    ("{ids},a", {"prepend_text": "b"}, [7, 70000, 9, 100], [1, 1, 1, 1]),
    # Each object names its own.
    ("a", {"fields_from_example": "spec"}, [101, 101, 7], [0, 0, 1]),
    # Ours: white space and escapes.
    (" [ a + b ] , a", {}, [100, 35, 101, 101, 100], [0, 0, 0, 0, 1]),
    (" [ <| 9 |> ],{ ids }", {}, [9, 7, 70000, 9], [0, 1, 1, 1]),
    (r"n\,\+\[,[n\,\+\[+a]", {}, [113, 113, 35, 100], [1, 0, 0, 0]),
    # As in EasyLM: a bracket that is not closed between two commas is part of a name.
    ("n]", {}, [112], [1]),
    ("a,,a", {}, [100, 48, 100], [1, 1, 1]),
]


def _encode(record, tokenizer=BYTES, **options):
    example = fields_example(record, FieldsConfig(**options), where="data.jsonl:3")
    ids, weights = encode_example(example, tokenizer)
    return ids.tolist(), weights.tolist()


@pytest.mark.parametrize("fields, options, ids, weights", GOLDEN)
def test_golden(fields, options, ids, weights):
    options = dict(add_bos_token=False, add_eos_token=False) | options
    assert _encode(RECORD, fields=fields, **options) == (ids, weights)


def test_parts_are_tokenised_separately_and_joined_ones_at_once():
    """SentencePiece puts its space before every part, and may merge across a separator."""
    tokenizer = small_tokenizer("sentencepiece")
    rng = random.Random(0)
    for _ in range(20):
        one, two = ("".join(rng.choices("etaoin </s>", k=rng.randint(1, 9))) for _ in range(2))
        ids, _ = _encode({"x": one, "y": two}, tokenizer, fields="[x+y],y,x")
        assert ids == [
            tokenizer.bos_id,
            *tokenizer.encode(f"{one} {two}"),
            *tokenizer.encode(two),
            *tokenizer.encode(one),
            tokenizer.eos_id,
        ]


def test_koala_data_as_its_pipeline_wrote_them():
    """Loss on the answers and the EOS after each, none on the opener, the user or the markers."""
    record = {"u": "USER:", "g": "GPT:", "h0": "hi", "g1": "yo", "h2": "so", "g3": "no"}
    record["fields"] = "[u+h0+g],g1,<|eos|>,[u+h2+g],g3,<|eos|>"
    opener = "BEGINNING OF CONVERSATION: "
    options = dict(fields_from_example="fields", prepend_text=opener, add_eos_token=False)
    ids, weights = _encode(record, **options)
    spelled = [(f"{opener}USER: hi GPT:", 0), ("yo", 1), ("\0", 1)]
    spelled += [("USER: so GPT:", 0), ("no", 1), ("\0", 1)]
    expected = [(1, 0)] + [(2 if c == "\0" else ord(c) + 3, w) for text, w in spelled for c in text]
    assert list(zip(ids, weights, strict=True)) == expected


def test_two_ends_are_warned_of_once():
    fields_lib._warn_of_two_ends.cache_clear()
    with pytest.warns(UserWarning, match="add_eos_token"):
        ids, weights = _encode({"a": "a"}, fields="a,<|eos|>")
    assert (ids, weights) == ([1, 100, 2, 2], [0, 1, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _encode({"a": "a"}, fields="a,<|eos|>")


@pytest.mark.parametrize(
    "record, options, words",
    [
        ({"a": "x"}, {"fields": "a,b"}, ["data.jsonl:3", "'b'", "only 'a'"]),
        ({"a": "x", "b": "y"}, {"fields": "[a,b]"}, ["data.jsonl:3", "'[a'", "brackets"]),
        ({"a": 1}, {"fields": "a"}, ["data.jsonl:3", "'a'", "int", "expected a text"]),
        ({"a": "x"}, {"fields": ""}, ["data.jsonl:3", "fields is empty"]),
        ({"a": "x"}, {"fields": "a,<|end|>"}, ["data.jsonl:3", "'<|end|>'", "<|eos|>"]),
        ({"a": "x"}, {"fields_from_example": "f"}, ["data.jsonl:3", "no field 'f'"]),
        ({"a": "AAAA"}, {"fields": "{a}"}, ["data.jsonl:3", "'a'", "i4", "base64_token_dtype"]),
        ({"a": "A"}, {"fields": "[{a}]"}, ["data.jsonl:3", "'a'", "base64"]),
    ],
)
def test_what_is_wrong_names_the_example_and_the_field(record, options, words):
    with pytest.raises(ValueError) as caught:
        _encode(record, **options)
    assert [word for word in words if word not in str(caught.value)] == []
