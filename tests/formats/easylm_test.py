"""EasyLM's files as EasyLM and flax write them: streams, trees, train states, chunks, prefixes."""

import dataclasses
import json

import flax.serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from easylm_jax.formats import easylm
from easylm_jax.formats.easylm import is_easylm, open_easylm, write_easylm
from easylm_jax.formats.foreign import (
    Model,
    check_tensors,
    foreign_shapes,
    foreign_tensors,
    import_params,
)
from easylm_jax.formats.names import EASYLM
from easylm_jax.models.llama import Llama, RopeScaling, output_logits
from easylm_jax.models.presets import PRESETS
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.reference import numpy_meta
from tests.tiny import assert_close, on_one_device, tiny_config, tiny_params

CONFIG = tiny_config()


def easylm_tree(dtype="float32", params=None):
    """Parameters as the nested dict that EasyLM's model has."""
    tensors = foreign_tensors(Model(CONFIG, params or tiny_params()), EASYLM)
    return unflatten_dict({n: np.asarray(x).astype(dtype) for n, x in tensors}, sep="/")


def write_stream(path, tree):
    """As EasyLM's StreamingCheckpointer does."""
    packer = msgpack.Packer()
    with open(path, "wb") as file:
        for key, value in flatten_dict(tree).items():
            file.write(packer.pack((key, flax.serialization.to_bytes(value))))


def assert_holds(foreign, tree):
    expected = flatten_dict(tree, sep="/")
    assert dict(foreign.shapes) == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        got = foreign.read(name)
        assert got.dtype == x.dtype
        assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(x).tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_streams_and_trees_of_flax(tmp_path, dtype):
    path, tree = str(tmp_path / "checkpoint"), easylm_tree(dtype)
    for outer in (tree, {"params": tree}):
        write_stream(path, outer)
        assert is_easylm(path)
        assert_holds(open_easylm(path, CONFIG), tree)
        assert_holds(open_easylm(f"params::{path}", CONFIG), tree)
        (tmp_path / "tree").write_bytes(flax.serialization.msgpack_serialize(outer))
        assert is_easylm(str(tmp_path / "tree"))
        assert_holds(open_easylm(f"flax_params::{tmp_path}/tree", CONFIG), tree)


def test_train_state_gives_its_parameters_alone(tmp_path):
    tree = easylm_tree()
    moments = jax.tree.map(lambda x: x + 1, tree)
    state = {
        "step": np.int32(7),
        "params": {"params": tree},
        "opt_state": {"1": {"0": {"mu": {"params": moments}, "count": np.int32(7)}}},
    }
    write_stream(tmp_path / "streaming_train_state", state)
    path = str(tmp_path / "streaming_train_state")
    assert is_easylm(path)
    assert_holds(open_easylm(f"trainstate_params::{path}", CONFIG), tree)


def test_arrays_that_flax_cuts_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    tree = easylm_tree()
    write_stream(tmp_path / "stream", tree)
    assert_holds(open_easylm(str(tmp_path / "stream"), CONFIG), tree)
    (tmp_path / "tree").write_bytes(flax.serialization.msgpack_serialize(tree))
    assert_holds(open_easylm(str(tmp_path / "tree"), CONFIG), tree)


def test_header_walk_agrees_with_msgpack():
    """Objects of every kind and length that msgpack has."""
    values = [
        0,
        127,
        128,
        2**16,
        2**40,
        -1,
        -32,
        -33,
        -(2**40),
        1.5,
        None,
        True,
        False,
        "",
        "é" * 9,
    ]
    values += ["x" * 40, "x" * 300, "x" * 70_000, [], list(range(20)), list(range(70_000))]
    values += [{}, {str(i): i for i in range(20)}, {str(i): [i] for i in range(70_000)}]
    for value in values:
        content = msgpack.packb(value)
        assert easylm._decode(content, 0) == (value, len(content))
    for n in (0, 1, 2, 3, 4, 8, 16, 17, 300, 70_000):
        for value in (b"a" * n, msgpack.ExtType(5, b"a" * n)):
            content = msgpack.packb(value)
            found, end = easylm._decode(content, 0)
            assert end == len(content) == found.start + n
            assert found.kind == (None if isinstance(value, bytes) else 5)


def test_logits_are_those_of_the_published_formulas(tmp_path):
    tree = easylm_tree()
    write_stream(tmp_path / "s", tree)
    params = import_params(open_easylm(str(tmp_path / "s"), CONFIG), on_one_device(CONFIG))
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, 12)
    ones, positions = jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None]
    hidden, _ = Llama(CONFIG).apply({"params": params}, jnp.asarray(tokens)[None], ones, positions)
    weights = {  # EasyLM's names are Meta's but for the ends, its matrices the transposed ones
        name.replace("transformer/wte/embedding", "tok_embeddings/weight")
        .replace("transformer/h/", "layers/")
        .replace("transformer/ln_f", "norm")
        .replace("lm_head", "output")
        .replace("kernel", "weight")
        .replace("/", "."): x if "wte" in name else x.T
        for name, x in flatten_dict(tree, sep="/").items()
    }
    expected = numpy_meta.logits(weights, tokens, heads=4, theta=1e4, eps=1e-5)
    assert_close(output_logits(params, hidden)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_written_streams_are_what_flax_reads(tmp_path, tied):
    config = tiny_config(tie_embeddings=tied, rope_scaling=RopeScaling(), rope_theta=3e5)
    params = tiny_params()
    if tied:
        del params["lm_head"]
    write_easylm(Model(config, params, ByteTokenizer()), str(tmp_path / "m"), dtype="bfloat16")
    with open(tmp_path / "m/streaming_params", "rb") as file:
        records = {
            tuple(k): flax.serialization.from_bytes(None, v) for k, v in msgpack.Unpacker(file)
        }
    assert {"/".join(key): x.shape for key, x in records.items()} == foreign_shapes(EASYLM, CONFIG)
    assert {x.dtype.name for x in records.values()} == {"bfloat16"}

    foreign = open_easylm(str(tmp_path / "m"))
    assert is_easylm(str(tmp_path / "m")) and foreign.config == config
    assert isinstance(foreign.tokenizer(), ByteTokenizer)
    got = import_params(foreign, on_one_device(config))
    expected = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_which_model_it_is(tmp_path):
    """Shapes of one published model are enough; those of LLaMA 1 and 2 are the same."""
    shapes = foreign_shapes(EASYLM, PRESETS["open_llama_3b"])
    assert easylm._matching_preset(shapes, "p") == PRESETS["open_llama_3b"]
    with pytest.raises(ValueError, match="those of llama_7b, llama2_7b: pass --model=PRESET"):
        easylm._matching_preset(foreign_shapes(EASYLM, PRESETS["llama_7b"]), "p")
    write_stream(tmp_path / "s", easylm_tree())
    with pytest.raises(ValueError, match="of no published model: pass --model=PRESET"):
        open_easylm(str(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"embedding \(expected \[512, 64\], got \[64, 32\]\)"):
        check_tensors(open_easylm(str(tmp_path / "s"), PRESETS["debug"]))


def test_other_files_get_a_sentence(tmp_path):
    path = tmp_path / "s"
    write_stream(path, easylm_tree())
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="ends early or is damaged"):
        open_easylm(str(path), CONFIG)
    with pytest.raises(ValueError, match="unknown prefix; there are params"):
        open_easylm(f"flax::{path}", CONFIG)
    write_stream(path, {"bert": {"kernel": np.zeros(3)}})
    with pytest.raises(ValueError, match="holds no LLaMA parameters"):
        open_easylm(str(path), CONFIG)
    for content in (
        b"PK\x03\x04" * 20,
        b"GGUF" * 20,
        b"\x92\x00" * 40,
        json.dumps([1] * 99).encode(),
    ):
        path.write_bytes(content)
        assert not is_easylm(str(path))
    assert not is_easylm(str(tmp_path))


def test_a_model_that_easylm_has_no_names_for_is_told(tmp_path):
    config = dataclasses.replace(CONFIG, qkv_bias=True)
    write_easylm(Model(CONFIG, tiny_params()), str(tmp_path))
    foreign = open_easylm(str(tmp_path), config)
    with pytest.raises(ValueError, match=f"format of {tmp_path} has no tensor for layers/.*bias"):
        import_params(foreign, on_one_device(config))


def test_a_head_of_its_own_is_read_whatever_the_configuration_says(tmp_path):
    write_easylm(Model(CONFIG, tiny_params()), str(tmp_path / "untied"))
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    foreign = open_easylm(str(tmp_path / "untied"), tied)
    assert foreign.config == CONFIG
    params = import_params(foreign, on_one_device(foreign.config))
    np.testing.assert_array_equal(params["lm_head"]["kernel"], tiny_params()["lm_head"]["kernel"])
    params.pop("lm_head")
    write_easylm(Model(tied, params), str(tmp_path / "tied"))
    assert open_easylm(str(tmp_path / "tied"), tied).config == tied
