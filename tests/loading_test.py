"""Every format is found by its content, and what comes in is what was there."""

import dataclasses
import functools
import json
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax import loading
from easylm_jax.checkpoint import restore_params
from easylm_jax.convert import write_native
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.formats.easylm import write_easylm
from easylm_jax.formats.foreign import Model, foreign_tensors, import_params
from easylm_jax.formats.gguf import write_gguf
from easylm_jax.formats.hf import write_hf
from easylm_jax.formats.meta import write_meta
from easylm_jax.formats.names import META
from easylm_jax.loading import (
    find_chat_template,
    find_format,
    find_tokenizer,
    frozen_base,
    load,
    open_foreign,
    open_model,
    params_for_training,
    save_tokenizer,
    target_params,
    training_template,
)
from easylm_jax.mesh import make_mesh
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import PARAM_RULES, Llama, RopeScaling, init_params, output_logits
from easylm_jax.models.lora import LoraConfig, init_adapters
from easylm_jax.models.presets import PRESETS
from easylm_jax.models.quantized import dequantize, quantize_base
from easylm_jax.preflight import check_same_model
from easylm_jax.sharding import tree_shardings
from easylm_jax.text.jinja_template import JinjaTemplate
from easylm_jax.text.template import find_template, with_markers
from easylm_jax.text.tokenizer import ByteTokenizer, train_sentencepiece
from easylm_jax.tree import named_leaves
from tests.tiny import assert_close, tiny_config

CONFIG = tiny_config(vocab_size=264)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
# llama2.c fixes what is not in its header; ours is as it says.
LLAMA2C = tiny_config(vocab_size=264, norm_eps=1e-5, rope_theta=10_000.0)
FOREIGN = ("hf", "gguf", "meta", "easylm", "llama2c")
ROOT = Path(__file__).parents[1]
WRITERS = {"hf": write_hf, "meta": write_meta, "easylm": write_easylm}


@functools.cache
def random_params(config):
    return jax.jit(functools.partial(init_params, config))(jax.random.key(1))


def random_model(config=CONFIG, **rest) -> Model:
    return Model(config, random_params(config), **rest)


def llama2c_bytes(model: Model) -> bytes:
    """By hand, since we do not write the format: header, tensors stacked by layer, rope tables."""
    cfg, tensors = model.config, dict(foreign_tensors(model, META))
    header = (cfg.d_model, cfg.d_ff, cfg.num_layers, cfg.num_heads, cfg.num_kv_heads)
    content = struct.pack("<7i", *header, -cfg.vocab_size, cfg.max_seq_len)
    layer = "layers.{}.{}.weight"
    stacked = ("attention_norm", *(f"attention.w{x}" for x in "qkvo"), "ffn_norm")
    order = ["tok_embeddings.weight"]
    for name in (*stacked, *(f"feed_forward.w{i}" for i in "123")):
        order += [layer.format(i, name) for i in range(cfg.num_layers)]
    arrays = [tensors[name] for name in (*order, "norm.weight")]
    rope = np.zeros(cfg.max_seq_len * cfg.head_dim, np.float32)
    arrays += [rope, tensors["output.weight"]]
    return content + b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)


def write(name: str, model: Model, folder: Path) -> str:
    """The model in a format, under a name that says nothing about it."""
    path = str(folder / ("thing.bin" if name == "llama2c" else "thing"))
    if name == "native":
        write_native(model, path)
    elif name == "llama2c":
        Path(path).write_bytes(llama2c_bytes(model))
    elif name == "gguf":
        write_gguf(model, path, dtype="f32")
    else:
        WRITERS[name](model, path, dtype="float32")
    return path


def same_bits(a, b) -> bool:
    a, b = named_leaves(a), named_leaves(b)
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes()
        for n in a
    )


@pytest.mark.parametrize("name", FOREIGN)
def test_the_format_is_found_by_content_and_read_into_a_mesh(name, tmp_path):
    model = random_model(CONFIG if name != "llama2c" else LLAMA2C)
    path = write(name, model, tmp_path)
    assert find_format(path) == name
    opened = open_model(path)
    check_same_model(opened.config, model.config, path)
    target = target_params(opened.config, make_mesh("1,2,1,4"))
    params = opened.read(target)
    assert same_bits(params, model.params)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, target)


def test_a_stream_alone_needs_the_name_of_its_model(tmp_path, monkeypatch):
    model = random_model()
    stream = Path(write("easylm", model, tmp_path)) / "streaming_params"
    (stream.parent / "config.json").unlink()
    with pytest.raises(ValueError, match="streaming_params"):
        open_model(f"params::{stream}")
    monkeypatch.setitem(PRESETS, "tests", CONFIG)
    opened = open_model(f"params::{stream}", model="tests")
    assert same_bits(opened.read(target_params(CONFIG, make_mesh("1,-1,1,1"))), model.params)


def test_a_run_is_found_by_its_folder_its_checkpoints_and_a_step(tmp_path, monkeypatch):
    model = random_model(tokenizer=ByteTokenizer(), chat_template=TEMPLATE)
    write_native(model, str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path / "run" / "checkpoints" / "00000000")
    for path in (".", "..", "../..", str(tmp_path / "run"), str(tmp_path / "run" / "checkpoints")):
        opened = open_model(path)
        assert opened.config == CONFIG and opened.chat_template == TEMPLATE
        assert opened.tokenizer().fingerprint == ByteTokenizer().fingerprint
        target = target_params(CONFIG, make_mesh("1,1,1,1", jax.devices()[:1]))
        assert same_bits(opened.read(target), model.params)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json does not say of what model"):
        open_model(str(tmp_path / "run"))


def test_what_is_no_model_is_told_with_what_was_sought(tmp_path):
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5_000))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    cases = {
        "absent": "there is no such file or folder",
        "noise": "the file is none of GGUF",
        "empty": "the file is none of GGUF",
        "folder": "the folder holds none of checkpoints/",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint or model: {message}"):
            open_foreign(str(tmp_path / name))


# Training from it


@pytest.mark.parametrize("name", [*FOREIGN, "native"])
def test_a_run_starts_from_any_format(name, tmp_path):
    model = random_model(CONFIG if name != "llama2c" else LLAMA2C)
    path = write(name, model, tmp_path)
    target = target_params(model.config, make_mesh("1,4,1,2"))
    assert same_bits(params_for_training(path, target, model.config), model.params)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rope_theta=5e5), r"model.rope_theta \(expected 500000.0, got 10000.0\)"),
        (dict(norm_eps=1e-6), r"model.norm_eps \(expected 1e-06, got 1e-05\)"),
        (dict(num_heads=2, head_dim=16, num_kv_heads=1), r"num_heads \(expected 2, got 4\)"),
        (dict(tie_embeddings=True), r"tie_embeddings \(expected True, got False\)"),
        (dict(rope_scaling=RopeScaling()), r"rope_scaling.factor \(expected 8.0"),
        (dict(d_ff=64), r"model.d_ff \(expected 64, got 48\)"),
    ],
)
def test_a_run_does_not_start_from_another_model(change, message, tmp_path):
    path = write("gguf", random_model(), tmp_path)
    asked = dataclasses.replace(CONFIG, **change)
    target = target_params(asked, make_mesh("1,-1,1,1"))
    with pytest.raises(ValueError, match=f"not the model that this configuration.*{message}"):
        params_for_training(path, target, asked)


def test_what_the_model_does_not_depend_on_may_differ(tmp_path):
    path = write("gguf", random_model(), tmp_path)
    asked = dataclasses.replace(CONFIG, remat="full", dtype="bfloat16", max_seq_len=32)
    params_for_training(path, target_params(asked, make_mesh("1,-1,1,1")), asked)


# Adapters beside it


def adapters_run(folder: Path, config, lora: LoraConfig) -> str:
    """A run of adapters, none of them zero, whose base is a file of random parameters."""
    base = folder / "base"
    write_hf(random_model(CONFIG), str(base), dtype="float32")
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    adapters = init_adapters(shapes, lora, jax.random.key(2))
    keys = iter(jax.random.split(jax.random.key(3), 99))
    adapters = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), adapters)
    write_native(Model(config, adapters), str(folder / "run"))
    file = folder / "run" / "config.json"
    saved = json.loads(file.read_text())
    saved |= {"init_from": str(base), "lora": dataclasses.asdict(lora)}
    file.write_text(json.dumps(saved))
    return str(folder / "run")


@pytest.mark.parametrize(
    "base, param_dtype",
    [
        ("nf4", "float32"),
        pytest.param("nf4", "bfloat16", marks=pytest.mark.slow),
        pytest.param("full", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_adapters_are_merged_into_what_they_were_trained_beside(base, param_dtype, tmp_path):
    """In whatever type they are asked for, and then rounded once."""
    config = dataclasses.replace(CONFIG, param_dtype=param_dtype)
    lora = LoraConfig(rank=4, alpha=6.0, base=base, targets=("q", "up", "down"))
    run = adapters_run(tmp_path, config, lora)
    mesh = make_mesh("1,4,1,2")
    frozen = named_leaves(frozen_base(str(tmp_path / "base"), config, lora, mesh))
    adapters = named_leaves(restored_adapters(run, config, lora))
    whole, rounded = (load(run, mesh=mesh, dtype=dtype).params for dtype in ("float32", "bfloat16"))
    merged = named_leaves(whole)
    for path, kernel in plain_kernels(frozen, base).items():
        if f"{path}/lora_a" in adapters:
            a, b = (np.asarray(adapters[f"{path}/{x}"], np.float64) for x in ("lora_a", "lora_b"))
            kernel = kernel + 1.5 * np.einsum("lir,lro->lio", a, b)
        for layer in range(CONFIG.num_layers):
            name = f"{path.replace('layers/', f'layers_{layer}/')}/kernel"
            assert_close(merged[name], kernel[layer], rtol=1e-6)
    assert same_bits(rounded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole))
    for name, rule in named_leaves(tree_shardings(whole, mesh, PARAM_RULES)).items():
        assert merged[name].sharding.is_equivalent_to(rule, merged[name].ndim)


def restored_adapters(run: str, config, lora: LoraConfig):
    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    shapes = jax.eval_shape(functools.partial(init_adapters, shapes, lora), jax.random.key(0))
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return restore_params(
        f"{run}/checkpoints",
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes),
    )


def plain_kernels(frozen, base: str) -> dict[str, np.ndarray]:
    """Path of each linear layer of the blocks -> its kernel, dequantised."""
    last = "kernel" if base == "full" else base
    paths = [n.removesuffix(f"/{last}") for n in frozen if n.endswith(last) and "layers" in n]
    if base == "full":
        return {path: np.asarray(frozen[f"{path}/kernel"], np.float64) for path in paths}
    return {
        path: np.asarray(
            dequantize({n: frozen[f"{path}/{n}"] for n in (base, "absmax")}, jnp.float32),
            np.float64,
        )
        for path in paths
    }


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_quantised_base_is_read_a_layer_at_a_time_and_lies_as_the_rules_say(
    scan_layers, tmp_path, monkeypatch
):
    config, mesh = dataclasses.replace(CONFIG, scan_layers=scan_layers), make_mesh("1,4,1,2")
    path, lora = write("hf", random_model(), tmp_path), LoraConfig(base="nf4")
    asked = []

    def watched(foreign, target):
        asked.append(named_leaves(target))
        return import_params(foreign, target)

    monkeypatch.setattr(loading, "import_params", watched)
    frozen = frozen_base(path, config, lora, mesh)
    assert {leaf.ndim for leaves in asked for leaf in leaves.values()} == {1, 2}
    assert all(len({name.split("/")[0] for name in leaves}) == 1 for leaves in asked)
    target = target_params(config, mesh)
    assert same_bits(frozen, quantize_base(params_for_training(path, target, config), "nf4"))
    rules = named_leaves(tree_shardings(frozen, mesh, PARAM_RULES))
    assert {n: x.sharding for n, x in named_leaves(frozen).items()} == rules
    write_native(random_model(config), str(tmp_path / "ours"))
    ours = frozen_base(str(tmp_path / "ours"), config, lora, mesh)
    assert {n: x.sharding for n, x in named_leaves(ours).items()} == rules
    if scan_layers:  # with the same random parameters, that is
        assert same_bits(ours, frozen)


# Tokenizers


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["ab", "abc", "the cat", "a dog", "on and on"] * 40
    return train_sentencepiece(words, str(folder / "tokenizer.model"), vocab_size=280)


@pytest.mark.parametrize("name", ["hf", "gguf", "meta", "native"])
def test_a_tokenizer_comes_out_of_any_model_that_has_one(name, sentencepiece, tmp_path):
    config = tiny_config(vocab_size=sentencepiece.vocab_size)
    model = random_model(config, tokenizer=sentencepiece, chat_template=TEMPLATE)
    path = write(name, model, tmp_path)
    text = "the cat and\n  a döner 🐈"
    assert find_tokenizer(path).encode(text) == sentencepiece.encode(text)
    if name != "meta":  # which has no place for one
        assert find_chat_template(path) == TEMPLATE


def test_the_folder_of_a_run_keeps_tokenizer_and_template(sentencepiece, tmp_path):
    save_tokenizer(sentencepiece, TEMPLATE, str(tmp_path / "a"))
    found = find_tokenizer(str(tmp_path / "a"))
    save_tokenizer(found, find_chat_template(str(tmp_path / "a")), str(tmp_path / "b"))
    assert find_tokenizer(str(tmp_path / "b")).fingerprint == sentencepiece.fingerprint
    assert find_chat_template(str(tmp_path / "b")) == TEMPLATE
    assert find_chat_template("bytes") is None


def test_a_model_without_a_tokenizer_is_told(tmp_path):
    path = write("gguf", random_model(), tmp_path)
    with pytest.raises(ValueError, match="came without a tokenizer"):
        find_tokenizer(path)


# The language model


@pytest.mark.parametrize("name", ["native", "hf", "gguf"])
def test_every_id_that_ends_an_answer_is_kept(name, tmp_path):
    model = random_model(tokenizer=ByteTokenizer(), stop_ids=(2, 260, 263))  # as Llama 3 Instruct
    assert load(write(name, model, tmp_path)).stop_ids == (2, 260, 263)


def test_the_ids_that_end_an_answer_are_where_transformers_looks(tmp_path):
    folder = Path(write("hf", random_model(tokenizer=ByteTokenizer()), tmp_path))
    assert open_model(str(folder)).stop_ids == (2,)  # the tokenizer's
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert open_model(str(folder)).stop_ids == (5, 7)
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ValueError, match="generation_config.json has eos_token_id = '</s>'"):
        open_model(str(folder))


def test_a_native_model_may_have_layers_of_their_own(tmp_path):
    config = dataclasses.replace(CONFIG, scan_layers=False)
    model = random_model(config)
    write_native(model, str(tmp_path / "apart"))
    assert same_bits(load(str(tmp_path / "apart")).params, model.params)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_load_gives_the_logits_of_the_model(dtype, tmp_path):
    model = random_model(tokenizer=ByteTokenizer(), chat_template=TEMPLATE)
    write_native(model, str(tmp_path / "run"))
    lm = load(str(tmp_path / "run"), dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(lm.params)} == {jnp.dtype(dtype)}
    ids = np.random.default_rng(0).integers(3, 264, (1, 12))
    segments, positions = jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None]
    hidden, _ = Llama(CONFIG).apply({"params": model.params}, jnp.asarray(ids), segments, positions)
    expected = np.asarray(output_logits(model.params, hidden))[0]
    got = np.asarray(lm.logits(ids[0].tolist())).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, atol=1e-5 if dtype == "float32" else 0.02)


def test_a_model_trained_with_a_kernel_of_a_tpu_answers_on_this_machine(tmp_path):
    """The window is part of the model, the kernel is not."""
    there = AttentionConfig(implementation="splash", block_q=512, block_k=512, sliding_window=4)
    params = random_model().params
    run = Model(dataclasses.replace(CONFIG, attention=there), params, ByteTokenizer())
    write_native(run, str(tmp_path / "run"))
    here = dataclasses.replace(CONFIG, attention=AttentionConfig(sliding_window=4))
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 264, (1, 12)))
    places = jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None]
    hidden, _ = Llama(here).apply({"params": params}, ids, *places)
    got = np.asarray(load(str(tmp_path / "run")).logits(ids[0].tolist()))
    expected = np.asarray(output_logits(params, hidden))
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-5)


def test_the_template_a_run_was_trained_with_comes_before_that_of_its_tokenizer(tmp_path):
    model = random_model(tokenizer=ByteTokenizer(), chat_template=TEMPLATE)
    run = write("native", model, tmp_path)
    assert load(run).template.name == "the model's own"
    save_tokenizer(ByteTokenizer(), TEMPLATE, f"{run}/tokenizer", find_template("vicuna"))
    assert load(run).template.name == "vicuna"
    assert load(run, template="plain").template.name == "plain"


def test_a_run_trains_in_a_template_by_name_with_markers_or_in_its_tokenizers(tmp_path):
    save_tokenizer(ByteTokenizer(), TEMPLATE, str(tmp_path))
    tokenizer = ByteTokenizer()
    named = ChatConfig("koala", markers={"bad": "Badly:"})
    assert training_template(None, "bytes", tokenizer) is None
    template = training_template(named, "bytes", tokenizer)
    assert template == with_markers(find_template("koala"), {"bad": "Badly:"})
    own = training_template(ChatConfig("tokenizer"), str(tmp_path), tokenizer)
    assert own.hash == JinjaTemplate(TEMPLATE, tokenizer).hash
    with pytest.raises(ValueError, match="is 'tokenizer', but no chat template lies with bytes"):
        training_template(ChatConfig("tokenizer"), "bytes", tokenizer)
    with pytest.raises(ValueError, match="a Jinja template has no place for markers"):
        marked = ChatConfig("tokenizer", markers={"bad": "Badly:"})
        training_template(marked, str(tmp_path), tokenizer)


def test_of_templates_with_names_the_default_counts(tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(str(tmp_path)) == TEMPLATE


def test_wrong_arguments_of_load_are_told(tmp_path):
    big = random_model(tiny_config(vocab_size=128), tokenizer=ByteTokenizer())
    write_native(big, str(tmp_path / "big"))
    with pytest.raises(ValueError, match="tokenizer has 259 tokens, .* embedding has 128"):
        load(str(tmp_path / "big"))
    with pytest.raises(ValueError, match="dtype 'float8' is not one of float32"):
        load(str(tmp_path / "big"), dtype="float8")


THREE_LINES = """
import easylm_jax as el, sys
assert "jax" not in sys.modules
import easylm_jax.loading  # does not hide el.load
lm = el.load(sys.argv[1])
print(len(lm.generate(["Once upon a time"], max_new_tokens=4, temperature=0.7, seed=0)))
"""


@pytest.mark.slow
def test_the_three_lines_of_colab(tmp_path):
    write_native(random_model(tokenizer=ByteTokenizer()), str(tmp_path / "run"))
    command = [sys.executable, "-c", THREE_LINES, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split()[-1] == "1", done.stderr[-2000:]
