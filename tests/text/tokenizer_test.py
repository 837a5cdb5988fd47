"""Tokenizers keep text exactly, never take text for a special token, and count bytes right."""

import base64
import json

import numpy as np
import pytest

from easylm_jax.data.rows import check_joins_documents
from easylm_jax.text import tokenizer as tokenizer_lib
from tests.text.small_tokenizers import (
    CHAT,
    HARD,
    KINDS,
    fast_tokenizer,
    random_texts,
    sentences,
    small_tokenizer,
)


def _sentencepiece(folder):
    return tokenizer_lib.train_sentencepiece(sentences(60), str(folder / "t.model"), vocab_size=500)


@pytest.fixture(params=[*KINDS, "trained"], scope="module")
def tokenizer(request, tmp_path_factory):
    if request.param == "trained":
        return _sentencepiece(tmp_path_factory.mktemp("trained"))
    return small_tokenizer(request.param)


@pytest.mark.parametrize("texts", [HARD, random_texts(300)], ids=["hard", "random"])
def test_text_survives_and_bytes_add_up(tokenizer, texts):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        # LLaMA's own put a space before the text, unless its first character is spelled by bytes.
        prefix = tokenizer.prefix_space and text[:1] not in ("", tokenizer_lib.SPACE)
        assert sizes[ids].sum() == len(text.encode()) + prefix
        going_on = tokenizer.encode_continuation(text)
        assert tokenizer.decode(going_on, continuation=True) == text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_text_never_yields_a_special_id(tokenizer):
    specials = set(np.flatnonzero(tokenizer.token_bytes() == 0))
    assert {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.specials().values()} <= specials
    for text in [*HARD, *random_texts(100)]:
        assert not specials & set(tokenizer.encode(text))
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""


def test_save_and_load_give_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "saved"))
    again = tokenizer_lib.load_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (again.add_bos, again.prefix_space) == (tokenizer.add_bos, tokenizer.prefix_space)
    for text in HARD:
        assert again.encode(text) == tokenizer.encode(text)


def test_special_tokens_are_found_by_name(tokenizer):
    assert tokenizer.special_id("bos") == tokenizer.special_id("<s>") == tokenizer.bos_id
    with pytest.raises(ValueError, match="no special token '<zzz>'"):
        tokenizer.special_id("<zzz>")


def test_training_is_reproducible_and_splits_digits(tmp_path):
    first, second = _sentencepiece(tmp_path), _sentencepiece(tmp_path)
    assert first.fingerprint == second.fingerprint
    assert (first.bos_id, first.eos_id) == (1, 2)
    assert len(first.encode("12121212")) == 8


def test_decoding_is_that_of_the_libraries():
    # Ours is made of the bytes of each id; theirs knows nothing of it.
    for kind in ("sentencepiece", "byte_level"):
        tokenizer = small_tokenizer(kind)
        for text in [*HARD, *random_texts(100)]:
            ids = tokenizer.encode(text)
            assert tokenizer._model.decode(ids) == text


def test_spelled_special_tokens_are_ids_in_the_text_of_templates_alone():
    text = "<|im_start|>user\nthe red<|im_end|>\n<|im_end|>"
    for kind in ("sentencepiece", "byte_level"):
        tokenizer = small_tokenizer(kind)
        start, end = map(tokenizer.special_id, CHAT[:2])
        expected = [start, *tokenizer.encode("user\nthe red"), end, *tokenizer.encode("\n"), end]
        assert tokenizer.encode_with_specials(text) == expected
        assert not {start, end} & set(tokenizer.encode(text))
    # The library's own splitting, which `encode` has turned off.
    assert fast_tokenizer().encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    "config, bos_id, eos_id, add_bos",
    [
        ({}, 0, 1, True),  # the file itself puts <s> before a text
        ({"add_bos_token": False}, 0, 1, False),
        ({"bos_token": None, "eos_token": "<|im_end|>"}, 0, 4, True),
        ({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, 2, 2, False),  # GPT-2
        ({"bos_token": "absent", "eos_token": "</s>", "add_bos_token": True}, None, 1, False),
    ],
)
def test_bos_is_what_the_files_say(tmp_path, config, bos_id, eos_id, add_bos):
    fast_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (bos_id, eos_id, add_bos)
    expected = [bos_id] if add_bos else []
    assert tokenizer.prompt_ids("the") == expected + tokenizer.encode("the")
    if bos_id is None or bos_id == eos_id:
        with pytest.raises(ValueError, match="joining documents needs a tokenizer with a BOS"):
            check_joins_documents(tokenizer)


def test_what_lies_beside_a_sentencepiece_model_wins(tmp_path):
    small_tokenizer("sentencepiece").save(str(tmp_path))
    said = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    said |= {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path / "tokenizer.model"))
    tokenizer.save(str(tmp_path / "again"))
    for one in (tokenizer, tokenizer_lib.load_tokenizer(str(tmp_path / "again"))):
        bos_id, eos_id = map(one.piece_id, CHAT[:2])
        assert (one.bos_id, one.eos_id, one.add_bos) == (bos_id, eos_id, False)
        assert one.prompt_ids("the") == one.encode("the")
    said = {"bos_token": None, "eos_token": "absent"}  # then the model's own
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)


META_SPLIT = (  # of llama3/tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_llama3s_ranks_give_the_ids_of_tiktoken(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    # A vocabulary in Llama 3's format: all bytes, then what BPE learns.
    learnt = fast_tokenizer()
    bytes_of = {c: bytes([b]) for b, c in enumerate(tokenizer_lib.BYTE_LEVEL)}
    vocab = sorted(learnt.get_vocab().items(), key=lambda item: item[1])
    tokens = [piece for piece, i in vocab if i not in learnt.get_added_tokens_decoder()]
    tokens = [b"".join(bytes_of[c] for c in piece) for piece in tokens]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    monkeypatch.setattr(tokenizer_lib, "LLAMA3_RANKS", len(ranks))
    tokenizer = tokenizer_lib.load_tokenizer(str(tmp_path))
    reference = tiktoken.Encoding(
        "reference",
        pat_str=META_SPLIT,
        mergeable_ranks=ranks,
        special_tokens={},
    )
    for text in [*HARD, *random_texts(200), *sentences(20), "1121212 x,\n 12"]:
        assert tokenizer.encode(text) == reference.encode(text, disallowed_special=())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(ranks) + 256
    assert tokenizer.special_id("<|begin_of_text|>") == tokenizer.bos_id == len(ranks)
    assert tokenizer.special_id("<|eot_id|>") == len(ranks) + 9
    assert tokenizer.special_id("<|reserved_special_token_2|>") == len(ranks) + 5
    assert tokenizer.add_bos and tokenizer.encode("<|eot_id|>") != [len(ranks) + 9]


@pytest.mark.parametrize("vocab_size", [200, 100_000])
def test_a_vocabulary_that_does_not_fit_is_one_sentence(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"of {vocab_size} pieces .* [Vv]ocab") as caught:
        tokenizer_lib.train_sentencepiece(sentences(20), str(tmp_path / "m"), vocab_size=vocab_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("added", [[], ["<|added|>"]])
def test_of_two_files_that_with_more_tokens_is_taken_and_else_the_original(tmp_path, added):
    original = _sentencepiece(tmp_path)
    (tmp_path / "t.model").rename(tmp_path / "tokenizer.model")
    converted = fast_tokenizer()
    converted.add_tokens([f"w{i}" for i in range(500 - converted.get_vocab_size())] + added)
    converted.save(str(tmp_path / "tokenizer.json"))
    taken = tokenizer_lib.load_tokenizer(str(tmp_path))
    assert (taken.fingerprint == original.fingerprint) == (not added)
    assert taken.vocab_size == 500 + len(added)


def test_wrong_files_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        tokenizer_lib.load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="holds none of"):
        tokenizer_lib.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(ValueError, match="holds 2 ranks where Llama 3 has 128000"):
        tokenizer_lib.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\0\1")
    with pytest.raises(ValueError, match="neither a SentencePiece model nor"):
        tokenizer_lib.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        tokenizer_lib.load_tokenizer(str(tmp_path / "tokenizer.json"))
