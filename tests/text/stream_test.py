"""Streamed text is the decoded text, however the ids are dealt out, and ends at a stop string."""

import random
import time

import pytest

from easylm_jax.text.stream import TextStream
from tests.text.small_tokenizers import HARD, KINDS, random_texts, small_tokenizer


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return small_tokenizer(request.param)


def _streamed(tokenizer, chunks, stop=(), **options) -> list[str]:
    stream = TextStream(tokenizer, stop, **options)
    return [*(stream.push(chunk) for chunk in chunks), stream.close()]


def _one_by_one(ids):
    return [[i] for i in ids]


def _id_lists(tokenizer):
    rng = random.Random(2)
    texts = [*HARD, *(f" {text}" for text in HARD), *random_texts(60)]
    # Ids that no text has: broken UTF-8 anywhere, special tokens within.
    wild = [rng.choices(range(tokenizer.vocab_size), k=30) for _ in range(100)]
    return [tokenizer.encode(text) for text in texts] + wild


def test_a_stream_is_the_decoded_text_at_every_split(tokenizer):
    for ids in _id_lists(tokenizer):
        expected = tokenizer.decode(ids)
        assert "".join(_streamed(tokenizer, _one_by_one(ids))) == expected
        for split in range(len(ids) + 1):
            chunks = ids[:split], [], ids[split:]
            assert "".join(_streamed(tokenizer, chunks)) == expected
        going_on = _streamed(tokenizer, _one_by_one(ids), continuation=True)
        assert "".join(going_on) == tokenizer.decode(ids, continuation=True)


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    for text in [*HARD, *random_texts(60)]:
        ids, stream, got = tokenizer.encode(text), TextStream(tokenizer), ""
        for count, i in enumerate(ids, start=1):
            got += stream.push([i])
            assert got == tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert got == text


def _cut(text, stop):
    """By trying every end: the stop string that is complete first, the longest of those."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def test_stop_strings_cut_and_never_leak(tokenizer):
    rng = random.Random(3)
    cut = 0
    for _ in range(300):
        text = "".join(rng.choices("abc\U0001f600", k=rng.randint(0, 25)))
        stop = ["".join(rng.choices("abc\U0001f600", k=rng.randint(1, 5))) for _ in range(3)]
        ids, expected, so_far = tokenizer.encode(text), _cut(text, stop), ""
        for part in _streamed(tokenizer, _one_by_one(ids), stop):
            so_far += part
            assert expected.startswith(so_far)
        assert so_far == expected
        split = rng.randint(0, len(ids))
        assert "".join(_streamed(tokenizer, [ids[:split], ids[split:]], stop)) == expected
        cut += expected != text
    assert 50 < cut < 300


def test_finished_tells_that_a_stop_string_came(tokenizer):
    stream = TextStream(tokenizer, ["\nUSER:"])
    assert stream.push(tokenizer.encode("Hi\nUS")) == "Hi" and not stream.finished
    assert stream.push(tokenizer.encode_continuation("ER: more")) == "" and stream.finished
    assert stream.push(tokenizer.encode("more")) == stream.close() == ""


def test_a_token_costs_the_same_late_as_early(tokenizer):
    ids = tokenizer.encode("word and " * 2000)
    stream, seconds = TextStream(tokenizer, ["x" * 50, "word but"]), []
    for start in range(0, len(ids), len(ids) // 20):
        started = time.process_time()
        for i in ids[start : start + len(ids) // 20]:
            stream.push([i])
        seconds.append(time.process_time() - started)
    assert min(seconds[-6:-1]) < 4 * min(seconds[:5])
