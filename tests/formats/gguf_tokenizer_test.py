"""Tokenizers in GGUF metadata: the ids are llama.cpp's, there and back, and guesses are refused."""

import json
import os
import random

import gguf
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from easylm_jax.formats.gguf_header import read_header
from easylm_jax.formats.gguf_tokenizer import tokenizer_of, tokenizer_to_metadata
from easylm_jax.text.tokenizer import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    Tokenizer,
    train_sentencepiece,
)
from tests.text.small_tokenizers import small_tokenizer

FRAGMENTS = (
    "the cat,THE CAT's we'LL 12 345678 ٣४½ été ÉTÉ 漢字かな مرحبا नमस्ते 👩🏽‍🚀😀 --> $+=|~ <|x|> <s>"
)
SPACES = [" ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", ""]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
RULES = {  # name of the rule -> pre_tokenizer as published models have it
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "dbrx": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"
            ),
            BYTES,
        ]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(QWEN2), "isolated"), BYTES]
    ),
}
PRES = [*RULES, "llama-bpe", "tekken", "default", "starcoder"]


def mixed_texts(num: int = 300) -> list[str]:
    rng = random.Random(0)
    parts = [*FRAGMENTS, *FRAGMENTS.split(), *SPACES * 3]
    return ["".join(rng.choices(parts, k=40)) for _ in range(num)]


def byte_level(rule: str = "gpt-2") -> HuggingFaceTokenizer:
    """A byte-level BPE trained on the texts, with two special tokens."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = RULES[rule], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|x|>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(mixed_texts(), trainer)
    config = json.dumps({"eos_token": "</s>", "pad_token": "<|x|>"}).encode()
    return HuggingFaceTokenizer(model.to_str().encode(), config, name="trained")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    return train_sentencepiece(mixed_texts(), str(path), vocab_size=500)


def llama_cpp_encode(metadata: dict, path):
    """llama.cpp's own tokenizer, loaded from a file with this metadata and no tensors."""
    llama_cpp = pytest.importorskip("llama_cpp")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else kind
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=False)


def assert_llama_cpp_agrees(metadata: dict, path, *, round_trip: bool = True) -> None:
    tokenizer, encode = tokenizer_of(metadata, name="ours"), llama_cpp_encode(metadata, path)
    for text in mixed_texts():
        assert tokenizer.encode(text) == encode(text), text
        assert not round_trip or tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", PRES)
def test_byte_level_ids_are_llama_cpps(pre, tmp_path):
    metadata = tokenizer_to_metadata(byte_level(), vocab_size=512) | {"tokenizer.ggml.pre": pre}
    # Pieces that no merge makes: under some rules a whole word is found all the same.
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][::2]
    assert_llama_cpp_agrees(metadata, tmp_path / "v.gguf")


def test_bytes_without_a_piece_stop_merges_as_in_llama_cpp(tmp_path):
    metadata = tokenizer_to_metadata(byte_level(), vocab_size=512)
    metadata["tokenizer.ggml.merges"] = [
        m for m in metadata["tokenizer.ggml.merges"] if "3" not in m
    ]
    pieces = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [piece.replace("3", "[none]") for piece in pieces]
    assert_llama_cpp_agrees(metadata, tmp_path / "v.gguf", round_trip=False)


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_ids_are_llama_cpps(prefix, sentencepiece, tmp_path):
    metadata = tokenizer_to_metadata(sentencepiece, vocab_size=512)
    metadata["tokenizer.ggml.add_space_prefix"] = prefix
    assert_llama_cpp_agrees(metadata, tmp_path / "v.gguf")


def test_bytes_are_llama_cpps_too(tmp_path):
    metadata = tokenizer_to_metadata(ByteTokenizer(), vocab_size=300)
    encode = llama_cpp_encode(metadata, tmp_path / "v.gguf")
    again = tokenizer_of(metadata, name="ours")
    for text in mixed_texts(50):
        assert ByteTokenizer().encode(text) == encode(text) == again.encode(text)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_of_a_tokenizer_json_is_recognised(rule):
    tokenizer = byte_level(rule)
    metadata = tokenizer_to_metadata(tokenizer, vocab_size=512)
    assert metadata["tokenizer.ggml.pre"] == rule
    again = tokenizer_of(metadata, name="again")
    assert (again.vocab_size, again.eos_id) == (500, 1) and again.bos_id is None
    assert [again.encode(t) for t in mixed_texts()] == [tokenizer.encode(t) for t in mixed_texts()]
    assert tokenizer_to_metadata(again, vocab_size=512) == metadata


def test_sentencepiece_comes_back(sentencepiece):
    metadata = tokenizer_to_metadata(sentencepiece, vocab_size=600)
    again = tokenizer_of(metadata, name="again")
    assert (again.vocab_size, again.bos_id, again.eos_id) == (500, 1, 2)
    assert all(again.encode(text) == sentencepiece.encode(text) for text in mixed_texts())
    assert tokenizer_to_metadata(again, vocab_size=600) == metadata


def test_the_ends_that_a_file_names_are_those_of_its_sentencepiece():
    metadata = tokenizer_to_metadata(small_tokenizer("sentencepiece"), vocab_size=500)
    end = metadata["tokenizer.ggml.tokens"].index("<|im_end|>")  # no control piece
    said = {"eos_token_id": end, "bos_token_id": 2, "add_bos_token": False}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    tokenizer = tokenizer_of(metadata, name="ours")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (2, end, False)
    assert tokenizer_to_metadata(tokenizer, vocab_size=500) == metadata


def with_json(**changes) -> HuggingFaceTokenizer:
    content = json.loads(byte_level().files()["tokenizer.json"]) | changes
    return HuggingFaceTokenizer(json.dumps(content).encode(), b"", name="changed")


@pytest.mark.parametrize(
    "changes",
    [
        dict(normalizer={"type": "Lowercase"}),
        dict(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}),
        dict(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]},
        ),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(changes):
    with pytest.raises(ValueError, match="cannot be written to GGUF"):
        tokenizer_to_metadata(with_json(**changes), vocab_size=512)


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("pre", "chameleon", "rule 'chameleon' .* known are gpt-2"),
        ("model", "t5", "of kind 't5'; gpt2"),
        ("merges", None, "no metadata key tokenizer.ggml.merges"),
    ],
)
def test_other_tokenizers_are_refused(key, value, says):
    metadata = tokenizer_to_metadata(byte_level(), vocab_size=512) | {
        f"tokenizer.ggml.{key}": value
    }
    with pytest.raises(ValueError, match=says):
        tokenizer_of({k: v for k, v in metadata.items() if v is not None}, name="x.gguf")


SMOLLM2 = os.environ.get("EASYLM_SMOLLM2", "")


@pytest.mark.skipif(not os.path.exists(SMOLLM2), reason="EASYLM_SMOLLM2 names no file")
def test_smollm2(tmp_path):
    metadata = read_header(SMOLLM2).metadata
    own = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    assert_llama_cpp_agrees(own, tmp_path / "v.gguf")
    tokenizer = tokenizer_of(metadata, name="SmolLM2")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, False)
    written = tokenizer_to_metadata(tokenizer, vocab_size=49152)
    assert {key: own[key] for key in written} == written
