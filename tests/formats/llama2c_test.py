"""stories260K tells its published story; its tokenizer merges as run.c does; files cut short."""

import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from easylm_jax.formats.foreign import Model as ForeignModel
from easylm_jax.formats.foreign import foreign_tensors, import_params
from easylm_jax.formats.llama2c import is_llama2c, open_llama2c, read_tokenizer
from easylm_jax.formats.names import META
from easylm_jax.loading import load
from easylm_jax.models.llama import Llama, output_logits
from tests.tiny import on_one_device, tiny_config, tiny_params

STORIES = Path(__file__).parents[1] / "data/stories260K/stories260K.bin"

# karpathy/llama2.c, doc/stories260K.md (MIT): `./run stories260K.bin -z tok512.bin -t 0.0`
PUBLISHED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in the park. \
One day, she saw a big, red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. \
She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to do." \
Her mom said, "Don't worry, Lily. We can help you.
"""


def test_stories260k_tells_its_published_story():
    """Greedy decoding gives the story if each of its tokens is the best one after those before."""
    foreign = open_llama2c(str(STORIES))
    tokenizer, config = foreign.tokenizer(), foreign.config
    story = np.array(tokenizer.encode(PUBLISHED.rstrip("\n")), np.int32)
    assert len(story) == 256 and tokenizer.decode(story) == PUBLISHED.rstrip("\n")
    params = import_params(foreign, on_one_device(config))
    assert sum(x.size for x in jax.tree.leaves(params)) == 260_032

    row = np.concatenate([[tokenizer.bos_id], story[:-1]])[None]
    ones, positions = np.ones_like(row), np.arange(256)[None]
    hidden, _ = jax.jit(Llama(config).apply)({"params": params}, row, ones, positions)
    best = output_logits(params, hidden)[0].argmax(-1)
    np.testing.assert_array_equal(best, story)


@pytest.mark.slow
def test_the_sampler_tells_the_story_too():
    """With the cache, streamed, its four key/value heads on four devices."""
    (told,) = load(str(STORIES), mesh="1,2,1,4").generate(
        [[1]], max_new_tokens=256, temperature=0.0, on_text=lambda *_: None
    )
    assert told.text.strip() == PUBLISHED.rstrip("\n")
    assert (len(told.ids), told.finish_reason) == (256, "length")


def test_tokenizer_merges_as_run_c_does():
    path = STORIES.with_name("tok512.bin")
    tokenizer = read_tokenizer(str(path), 512)
    pieces, score_of = {}, {}
    with path.open("rb") as file:
        file.read(4)
        while head := file.read(8):
            score, length = struct.unpack("<fi", head)
            piece = file.read(length).decode()
            score_of[piece] = score
            pieces[piece] = len(pieces)

    def merged(text):
        ids = [[c] if c in pieces else [f"<0x{b:02X}>" for b in c.encode()] for c in " " + text]
        words = [piece for char in ids for piece in char]
        while True:
            joined = [a + b for a, b in zip(words, words[1:], strict=False)]
            scores = [score_of.get(piece, -np.inf) for piece in joined]
            if max(scores, default=-np.inf) == -np.inf:
                return [pieces[word] for word in words]
            best = int(np.argmax(scores))
            words[best : best + 2] = [joined[best]]

    for text in [*PUBLISHED.splitlines(), "  two  spaces", "naïve 漢字 \U0001f600\n\ttab", "x" * 9]:
        assert tokenizer.encode(text) == merged(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 512)


def test_untied_head_lies_after_the_rope_tables(tmp_path):
    """A file written as export.py of llama2.c does, of a model with its own output matrix."""
    config, params = tiny_config(rope_theta=1e4, norm_eps=1e-5), tiny_params()
    tensors = dict(foreign_tensors(ForeignModel(config, params), META))
    header = [32, 48, 2, 4, 2, -64, 64]
    order = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo"]
    order += ["ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]
    names = [f"layers.{i}.{name}.weight" for name in order for i in range(2)]
    with open(tmp_path / "tiny.bin", "wb") as file:
        file.write(np.array(header, "<i4").tobytes())
        for name in ["tok_embeddings.weight", *names, "norm.weight"]:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())
        file.write(np.full(64 * 8, np.nan, "<f4").tobytes())
        file.write(np.ascontiguousarray(tensors["output.weight"]).tobytes())
    path = str(tmp_path / "tiny.bin")
    assert is_llama2c(path)
    foreign = open_llama2c(path)
    assert foreign.tokenizer is None and not foreign.config.tie_embeddings
    got = import_params(foreign, on_one_device(foreign.config))
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_wrong_files_get_a_sentence(tmp_path):
    content = STORIES.read_bytes()
    path = tmp_path / "m.bin"
    path.write_bytes(content[:-4])
    assert is_llama2c(str(STORIES)) and not is_llama2c(str(path))
    with pytest.raises(ValueError, match="asks for 1056540 bytes, got 1056536"):
        open_llama2c(str(path))
    path.write_bytes(b"PK\x03\x04" * 20)
    with pytest.raises(ValueError, match="no legacy llama2.c file"):
        open_llama2c(str(path))
    with pytest.raises(ValueError, match="no llama2.c tokenizer of 511 pieces"):
        read_tokenizer(str(STORIES.with_name("tok512.bin")), 511)
