"""Folders of transformers come in, ours go out, and no logit differs; wrong folders get a sentence.

transformers makes the folders that come in and judges those that go out. `tests/reference` places
the weights into its models by a name map of its own.
"""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers
from safetensors.numpy import load_file, save_file

from easylm_jax.formats import hf
from easylm_jax.formats.foreign import Model, abstract_params, import_params
from easylm_jax.formats.hf_config import config_from_hf, config_to_hf
from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, Llama, RopeScaling, output_logits
from easylm_jax.models.presets import PRESETS
from easylm_jax.sharding import tree_shardings
from easylm_jax.text.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece
from easylm_jax.tree import named_leaves
from tests.reference import numpy_llama
from tests.reference.numpy_llama import Dims
from tests.tiny import BLOCKS, tiny_config

GQA = Dims(num_heads=4, num_kv_heads=2, head_dim=8)
SCALING = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=8.0, original_max_position=256)
CASES = {  # name -> (dims, whether q, k and v have biases)
    "mha": (Dims(num_heads=4, num_kv_heads=4, head_dim=8), False),
    "gqa": (GQA, False),
    "wide_heads": (Dims(num_heads=4, num_kv_heads=1, head_dim=10), False),
    "uneven_heads": (Dims(num_heads=3, num_kv_heads=3, head_dim=8), False),
    "tied": (dataclasses.replace(GQA, tied=True), False),
    "scaled_rope": (
        dataclasses.replace(
            GQA, rope_theta=9000.0, rope_scaling=numpy_llama.RopeScaling(**SCALING)
        ),
        False,
    ),
    "window": (dataclasses.replace(GQA, sliding_window=5), False),
    "bias": (GQA, True),
    "bias_window_tied": (dataclasses.replace(GQA, sliding_window=5, tied=True), True),
}
TOLERANCE = 3e-5  # logits reach 4, tied 20; the largest differences seen are 3e-6 and 1e-5
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }} \u2603{% endfor %}"


def random_model(case: str = "gqa", *, dtype: str = "float32") -> Model:
    """Our configuration and random parameters at which every term matters."""
    dims, qkv_bias = CASES[case]
    rng = np.random.default_rng(list(CASES).index(case))
    params = numpy_llama.random_params(dims, rng, vocab=64, width=32, ffn=48, qkv_bias=qkv_bias)
    config = tiny_config(
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        norm_eps=dims.norm_eps,
        rope_theta=dims.rope_theta,
        rope_scaling=RopeScaling(**SCALING) if dims.rope_scaling else None,
        tie_embeddings=dims.tied,
        qkv_bias=qkv_bias,
        attention=dataclasses.replace(BLOCKS, sliding_window=dims.sliding_window),
        param_dtype=dtype,
    )
    return Model(config, jax.tree.map(lambda x: jnp.asarray(x, dtype), params))


def target(config, mesh: str = "1,1,1,1", devices: int = 1):
    """The parameters as shapes, laid out on the first devices."""
    shapes, mesh = abstract_params(config), make_mesh(mesh, jax.devices()[:devices])
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh, PARAM_RULES),
    )


def read_back(folder, **changes) -> Model:
    foreign = hf.open_hf(str(folder))
    config = dataclasses.replace(foreign.config, **changes)
    return Model(config, import_params(foreign, target(config)))


def assert_same_bits(a, b) -> None:
    a, b = named_leaves(a), named_leaves(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


TOKENS = np.random.default_rng(9).integers(0, 64, (2, 24))


def our_logits(model: Model) -> np.ndarray:
    config = dataclasses.replace(model.config, remat="none")
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    ids = (jnp.asarray(TOKENS), jnp.ones_like(positions), positions)
    hidden, _ = Llama(config).apply({"params": model.params}, *ids)
    return np.asarray(output_logits(model.params, hidden))


def their_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(TOKENS), use_cache=False).logits.numpy()


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers_in_and_out(case, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.reference.torch_llama import to_hf

    model = random_model(case)
    if case != "uneven_heads":  # transformers has no Llama of such a shape
        theirs = to_hf(model.params, CASES[case][0])
        theirs.save_pretrained(tmp_path / "theirs")
        came_in = read_back(tmp_path / "theirs")
        assert_same_bits(came_in.params, model.params)
        error_in = np.abs(our_logits(came_in) - their_logits(theirs)).max()
        print(f"{case}: in {error_in:.1e}")
        assert error_in < TOLERANCE

    hf.write_hf(model, str(tmp_path / "ours"))
    went_out, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    error_out = np.abs(our_logits(model) - their_logits(went_out.eval())).max()
    print(f"{case}: out {error_out:.1e}")
    assert error_out < TOLERANCE


@pytest.mark.parametrize(
    "case, dtype",
    [*((case, "float32") for case in CASES), ("gqa", "bfloat16"), ("bias_window_tied", "bfloat16")],
)
def test_out_and_in_again_is_the_same_bit_for_bit(case, dtype, tmp_path):
    model = random_model(case, dtype=dtype)
    hf.write_hf(model, str(tmp_path), dtype=dtype)
    back = read_back(tmp_path, param_dtype=dtype)
    assert_same_bits(back.params, model.params)
    window = back.config.attention.sliding_window
    # How a model is computed is not part of the format, what it computes is.
    said = dataclasses.replace(model.config.attention, sliding_window=window)
    assert dataclasses.replace(back.config, attention=said, remat="none") == model.config


@pytest.mark.parametrize("name", PRESETS)
def test_published_shapes_survive_config_json(name):
    said = json.loads(json.dumps(config_to_hf(PRESETS[name])))
    assert config_from_hf(said, "config.json") == PRESETS[name]


def test_shards_hold_what_one_file_holds(tmp_path, monkeypatch):
    model = random_model()
    hf.write_hf(model, str(tmp_path / "whole"))
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 20_000)
    hf.write_hf(model, str(tmp_path / "shards"))
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "shards" / "model.safetensors").exists()
    whole, union = load_file(tmp_path / "whole" / "model.safetensors"), {}
    for file in files:
        shard = load_file(file)
        assert sum(x.nbytes for x in shard.values()) <= 20_000
        assert {name for name, f in index["weight_map"].items() if f == file.name} == set(shard)
        union |= shard
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    assert whole.keys() == union.keys()
    assert all(whole[name].tobytes() == union[name].tobytes() for name in whole)
    assert_same_bits(read_back(tmp_path / "shards").params, model.params)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_is_widened_exactly(stored, tmp_path):
    model = random_model()
    hf.write_hf(model, str(tmp_path), dtype=stored)
    foreign = hf.open_hf(str(tmp_path))
    assert foreign.read("lm_head.weight").dtype == stored
    expected = jax.tree.map(lambda x: np.asarray(x).astype(stored).astype("float32"), model.params)
    assert_same_bits(read_back(tmp_path).params, expected)


def test_a_mesh_of_eight_gets_the_same_parameters(tmp_path):
    model = random_model("bias")
    hf.write_hf(model, str(tmp_path))
    foreign = hf.open_hf(str(tmp_path))
    asked = target(foreign.config, "fsdp:4,tensor:2", devices=8)
    params = import_params(foreign, asked)
    assert_same_bits(params, model.params)
    for name, leaf in named_leaves(params).items():
        assert leaf.sharding == named_leaves(asked)[name].sharding
    up = params["layers"]["mlp"]["up"]["kernel"].addressable_shards
    assert len({str(shard.index) for shard in up}) == 8
    hf.write_hf(Model(foreign.config, params), str(tmp_path / "again"))  # gathered, it is the same
    files = [folder / "model.safetensors" for folder in (tmp_path, tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.torch
@pytest.mark.parametrize("sharded", [False, True])
def test_old_bin_files(sharded, tmp_path):
    torch = pytest.importorskip("torch")
    model = random_model("tied")
    hf.write_hf(model, str(tmp_path))
    weights = {k: torch.tensor(v) for k, v in load_file(tmp_path / "model.safetensors").items()}
    (tmp_path / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if sharded:
        weight_map = {}
        for i, name in enumerate(weights):
            weight_map[name] = f"pytorch_model-0000{i % 2 + 1}-of-00002.bin"
        for file in set(weight_map.values()):
            part = {name: weights[name] for name in weights if weight_map[name] == file}
            torch.save(part, tmp_path / file)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_bits(read_back(tmp_path).params, model.params)


# ---- configurations -----------------------------------------------------------------------------

LLAMA1 = {  # a file of the first conversions, with nothing that could be left out
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}
QWEN2 = LLAMA1 | {"model_type": "qwen2", "num_hidden_layers": 4, "sliding_window": 100}


def test_what_is_left_out_is_as_transformers_has_it():
    config = config_from_hf(LLAMA1, "config.json")
    assert config == PRESETS["llama_7b"]
    assert config_from_hf(LLAMA1 | {"model_type": "mistral"}, "c").attention.sliding_window == 4096


def test_rope_of_new_and_old_files_is_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | scaling}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | scaling}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling}
    configs = [config_from_hf(LLAMA1 | rope, "config.json") for rope in (old, older, new)]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].rope_theta == 5e5 and configs[0].rope_scaling == RopeScaling()


@pytest.mark.parametrize(
    "said, window",
    [
        ({}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 100),
        ({"use_sliding_window": True, "max_window_layers": 4}, None),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4}, 100),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 4}, None),
    ],
)
def test_windows_of_qwen2(said, window):
    assert config_from_hf(QWEN2 | said, "config.json").attention.sliding_window == window


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "gpt2"}, "of type 'gpt2': known are llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "by 'yarn'.*'llama3'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "not say for low_freq_factor"),
        ({"hidden_size": "wide"}, "says 'wide' for hidden_size: expected a positive int"),
        ({"vocab_size": None}, "says None for vocab_size"),
        ({"rms_norm_eps": True}, "says True for rms_norm_eps"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 3}, "in 1 of 4 layers"),
    ],
)
def test_other_models_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_from_hf(LLAMA1 | changes, "config.json")


# ---- tokenizers and templates -------------------------------------------------------------------

TEXTS = ["Hello world", "  two  spaces\n", "na\u00efve \U0001f600", "x = 12", "<|user|>hi", "a<s>b"]


def random_texts(count: int) -> list[str]:
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 6))) for _ in range(60)]
    return [" ".join(rng.choices(words + TEXTS, k=12)) for _ in range(count)]


def make_tokenizer(kind: str, folder):
    """Trained on a few words; LLaMA's own puts a space before a text, ours does not."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "byte_level":
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        special = ["<s>", "</s>", "<|user|>"]
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, show_progress=False, special_tokens=special, initial_alphabet=alphabet
        )
        model.train_from_iterator(random_texts(100), trainer)
        model.save(str(folder / "tokenizer.json"))
        return load_tokenizer(str(folder / "tokenizer.json"))
    path = str(folder / "t.model")
    if kind == "sentencepiece":
        return train_sentencepiece(random_texts(100), path, vocab_size=400)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts(100)),
        model_prefix=path.removesuffix(".model"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return load_tokenizer(path)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("case", ["gqa", "window"])  # the class of the model matters to it
@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece_prefix", "byte_level"])
def test_auto_tokenizer_gives_our_ids_and_template(kind, case, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer(kind, tmp_path)
    model = dataclasses.replace(random_model(case), tokenizer=tokenizer, chat_template=TEMPLATE)
    hf.write_hf(model, str(tmp_path / "out"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS + random_texts(10):
        ids = tokenizer.encode_with_specials(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [tokenizer.bos_id] * tokenizer.add_bos + ids
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    messages = [{"role": "user", "content": "hi"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False)
    assert rendered == "<user>hi \u2603"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "sentencepiece_prefix", "byte_level"])
def test_tokenizer_and_template_come_back(kind, tmp_path):
    tokenizer = make_tokenizer(kind, tmp_path)
    model = dataclasses.replace(random_model(), tokenizer=tokenizer, chat_template=TEMPLATE)
    hf.write_hf(model, str(tmp_path / "out"))
    foreign = hf.open_hf(str(tmp_path / "out"))
    assert foreign.chat_template == TEMPLATE
    assert foreign.tokenizer().fingerprint == tokenizer.fingerprint
    if kind != "bytes":  # what transformers reads, which may be converted
        back = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
        for name in ("vocab_size", "bos_id", "eos_id", "add_bos", "prefix_space", "pieces"):
            assert getattr(back, name) == getattr(tokenizer, name), name
        unknown = {"<unk>": 0} if kind.startswith("sentencepiece") else {}
        assert back.specials() == tokenizer.specials() | unknown
        for text in ["", " ", *TEXTS, *random_texts(100)]:
            ids = tokenizer.encode_with_specials(text)
            assert back.encode(text) == tokenizer.encode(text), text
            assert back.encode_with_specials(text) == ids, text


def test_templates_of_older_folders(tmp_path):
    hf.write_hf(random_model(), str(tmp_path))
    assert hf.open_hf(str(tmp_path)).chat_template is None
    assert hf.open_hf(str(tmp_path)).tokenizer is None
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"chat_template": "one"}))
    assert hf.open_hf(str(tmp_path)).chat_template == "one"
    named = [{"name": "rag", "template": "two"}, {"name": "default", "template": "three"}]
    beside.write_text(json.dumps({"chat_template": named}))
    assert hf.open_hf(str(tmp_path)).chat_template == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert hf.open_hf(str(tmp_path)).chat_template == "four"


# ---- bad folders --------------------------------------------------------------------------------


def test_only_folders_of_the_format_are_taken_for_it(tmp_path):
    hf.write_hf(random_model(), str(tmp_path / "hf"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model": {"d_model": 4}}')
    assert hf.is_hf(str(tmp_path / "hf"))
    assert not any(hf.is_hf(str(tmp_path / name)) for name in ("run", "absent", "run/config.json"))


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("truncated", "model.safetensors is no whole safetensors file"),
        ("garbage", "model.safetensors is no whole safetensors file"),
        ("no_weights", "has a config.json and no weights"),
        ("not_json", "config.json is not JSON"),
        ("a_list", "config.json holds a list"),
        ("no_key", "does not say for hidden_size"),
        ("o_bias", "o_proj.bias"),
        ("missing", "missing: model.norm.weight"),
        ("left_over", "left over: extra.weight"),
        ("shape", r"model.norm.weight \(expected \[32\], got \[4\]\)"),
        ("missing_shard", "names 2 files of which 1 are missing, b.safetensors first"),
        ("index", 'index.json has no "weight_map"'),
        ("../weights", "names '../weights': expected the plain name of a file"),
        ("/dev/zero", "names '/dev/zero': expected"),
        ("..", "names '..': expected"),
        (["a"], r"names \['a'\]: expected"),
    ],
)
def test_a_damaged_folder_gets_one_sentence(damage, sentence, tmp_path):
    hf.write_hf(random_model("bias_window_tied"), str(tmp_path))
    _damage(tmp_path, damage)
    assert hf.is_hf(str(tmp_path))
    with pytest.raises(ValueError, match=sentence) as error:
        read_back(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def _damage(folder, kind) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    content, index = weights.read_bytes(), folder / "model.safetensors.index.json"
    match kind:
        case "truncated":
            weights.write_bytes(content[:-5])
        case "garbage":
            weights.write_bytes(bytes(range(256)) * 4)
        case "no_weights":
            weights.unlink()
        case "not_json":
            config.write_text(config.read_text()[:-20])
        case "a_list":
            config.write_text("[]")
        case "no_key":
            said = json.loads(config.read_text())
            del said["hidden_size"]
            config.write_text(json.dumps(said))
        case "missing_shard":
            weights.rename(folder / "a.safetensors")
            names = {"x": "a.safetensors", "y": "b.safetensors"}
            index.write_text(json.dumps({"weight_map": names}))
        case "index":
            weights.unlink()
            index.write_text("{}")
        case "../weights" | "/dev/zero" | ".." | ["a"]:
            weights.rename(folder / "a.safetensors")
            index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": kind}}))
        case _:
            tensors = load_file(weights)
            if kind == "missing":
                del tensors["model.norm.weight"]
            else:
                o_bias, norm = "model.layers.0.self_attn.o_proj.bias", "model.norm.weight"
                name = {"o_bias": o_bias, "shape": norm, "left_over": "extra.weight"}[kind]
                tensors[name] = np.zeros(4, np.float32)
            save_file(tensors, weights)
