"""Tokenizers keep text exactly, never take text for a special token, and count bytes right."""

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from easylm_jax.text import tokenizer as tokenizer_lib

HARD = [
    "",
    " ",
    "a",
    "  two  runs   of spaces ",
    "\n\nlines\r\n\tand tabs\n",
    "NUL \0 inside",
    "emoji \U0001f600\u200d\U0001f525, Ti\u1ebfng Vi\u1ec7t, \u4e2d\u6587, e\u0301 and \u00e9",
    "the \u2581 that SentencePiece uses for a space, \u2581\u2581 twice",
    "<s></s><unk><0x0A> <|endoftext|> bos",
    "2024-11-21 3.14159",
    "\ufeff byte order mark \u2028 and \x85",
]


def _texts(count: int) -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(400)]
    return [" ".join(rng.choices(words, k=40)) + "\n12 x,\n" for _ in range(count)]


def _sentencepiece(folder):
    return tokenizer_lib.train_sentencepiece(_texts(60), str(folder / "t.model"), vocab_size=500)


def _hugging_face(folder):
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(_texts(60), trainer)
    model.save(str(folder / "tokenizer.json"))
    return tokenizer_lib.load_tokenizer(str(folder / "tokenizer.json"))


@pytest.fixture(params=["bytes", "sentencepiece", "hugging_face"], scope="module")
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return tokenizer_lib.load_tokenizer("bytes")
    make = {"sentencepiece": _sentencepiece, "hugging_face": _hugging_face}[request.param]
    return make(tmp_path_factory.mktemp(request.param))


def _random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    alphabet = [c for text in HARD for c in text] + ["\U0010ffff", "\u0300", "<s>", "  "]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("texts", [HARD, _random_texts(300)], ids=["hard", "random"])
def test_text_survives_and_bytes_add_up(tokenizer, texts):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_text_never_yields_a_special_id(tokenizer):
    specials = set(np.flatnonzero(tokenizer.token_bytes() == 0))
    assert {tokenizer.bos_id, tokenizer.eos_id} <= specials
    for text in [*HARD, *_random_texts(100)]:
        assert not specials & set(tokenizer.encode(text))
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""


def test_save_and_load_give_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "saved"))
    again = tokenizer_lib.load_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
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


def test_dummy_prefix_is_one_byte_more(tmp_path):
    # The documented exception: LLaMA's own models put a space before the text.
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_texts(60)),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        minloglevel=2,
    )
    loaded = tokenizer_lib.load_tokenizer(str(tmp_path))
    ids = loaded.encode("some text")
    assert loaded.token_bytes()[ids].sum() == len("some text") + 1
    assert loaded.decode(ids) == "some text"


@pytest.mark.parametrize("vocab_size", [200, 100_000])
def test_a_vocabulary_that_does_not_fit_is_one_sentence(tmp_path, vocab_size):
    with pytest.raises(ValueError, match=f"of {vocab_size} pieces .* [Vv]ocab") as caught:
        tokenizer_lib.train_sentencepiece(_texts(20), str(tmp_path / "m"), vocab_size=vocab_size)
    assert "\n" not in str(caught.value)


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
