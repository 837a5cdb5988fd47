"""GGUF files: blocks decoded by hand, models there and back, and llama.cpp's opinion of ours."""

import os
import resource
import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from easylm_jax.formats.foreign import Model, abstract_params, import_params
from easylm_jax.formats.gguf import is_gguf, open_gguf, write_gguf
from easylm_jax.formats.gguf_header import read_header
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import Llama, LlamaConfig, RopeScaling, output_logits
from easylm_jax.text.tokenizer import ByteTokenizer
from tests.tiny import tiny_config

SCALING = RopeScaling(8.0, 1.0, 4.0, 256)
VARIANTS = {
    "gqa": {},
    "tied": dict(tie_embeddings=True),
    "scaled": dict(rope_scaling=SCALING, rope_theta=500_000.0, max_seq_len=2048),
    "wide_heads": dict(head_dim=32),
    "bias": dict(qkv_bias=True),  # written as qwen2
    "bias_scaled": dict(qkv_bias=True, rope_scaling=SCALING, rope_theta=500_000.0),  # as llama
}


def random_model(**changes) -> Model:
    """Every parameter random, norms and biases too; 272 ids, of which the tokenizer has 259."""
    shape = dict(vocab_size=272, d_model=64, head_dim=16, d_ff=96, num_layers=2)
    config = tiny_config(**shape | changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: jnp.asarray(0.2 * rng.normal(size=a.shape) + (a.ndim == 1), jnp.float32),
        abstract_params(config),
    )
    return Model(config, params, ByteTokenizer(), "{{ messages }}")


def load(path: str):
    foreign = open_gguf(path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here),
        abstract_params(foreign.config),
    )
    return foreign, import_params(foreign, target)


def logits(config: LlamaConfig, params, ids: list[int]) -> np.ndarray:
    tokens = jnp.asarray(ids)[None]
    positions = jnp.arange(len(ids))[None]
    hidden, _ = Llama(config).apply({"params": params}, tokens, jnp.ones_like(tokens), positions)
    return np.asarray(output_logits(params, hidden))[0]


# ---- there and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_f32_comes_back_bit_for_bit(variant, tmp_path):
    model = random_model(**VARIANTS[variant])
    write_gguf(model, str(tmp_path / "m.gguf"))
    foreign, params = load(str(tmp_path / "m.gguf"))
    for name in ("vocab_size", "head_dim", "rope_theta", "rope_scaling", "norm_eps", "qkv_bias"):
        assert getattr(foreign.config, name) == getattr(model.config, name), name
    assert foreign.chat_template == "{{ messages }}"
    jax.tree.map(np.testing.assert_array_equal, params, model.params)


@pytest.mark.parametrize("dtype, name", [("f16", "float16"), ("bf16", "bfloat16")])
def test_sixteen_bits_are_the_rounded_numbers(dtype, name, tmp_path):
    model = random_model()
    write_gguf(model, str(tmp_path / "m.gguf"), dtype=dtype)
    _, params = load(str(tmp_path / "m.gguf"))
    for path in (("lm_head", "kernel"), ("embed", "embedding")):
        (got, exact) = (tree[path[0]][path[1]] for tree in (params, model.params))
        np.testing.assert_array_equal(got, exact.astype(name).astype("float32"))
    np.testing.assert_array_equal(
        params["final_norm"]["scale"], model.params["final_norm"]["scale"]
    )


def test_types_are_llama_cpps(tmp_path):
    """Norms F32, rows that are no multiple of 32 F16, the head of a Q4_0 file Q8_0."""
    model = random_model(d_ff=40)
    expected = {"q4_0": Type.Q4_0, "q8_0": Type.Q8_0, "bf16": Type.BF16}
    for dtype, matrices in expected.items():
        path = str(tmp_path / f"{dtype}.gguf")
        write_gguf(model, path, dtype=dtype)
        types = {name: tensor.type for name, tensor in read_header(path).tensors.items()}
        assert types["blk.0.attn_norm.weight"] == Type.F32
        assert types["blk.1.attn_q.weight"] == types["token_embd.weight"] == matrices
        assert types["blk.0.ffn_down.weight"] == (matrices if dtype == "bf16" else Type.F16)
        assert types["output.weight"] == (Type.Q8_0 if dtype == "q4_0" else matrices)


def test_quantised_values_are_within_half_a_step(tmp_path):
    model = random_model()
    path = str(tmp_path / "m.gguf")
    write_gguf(model, path, dtype="q8_0")
    got = np.asarray(open_gguf(path).read("blk.1.ffn_up.weight"))
    exact = np.asarray(model.params["layers"]["mlp"]["up"]["kernel"][1]).T
    step = np.abs(exact.reshape(96, 2, 32)).max(-1, keepdims=True) / 127
    error = np.abs((got - exact).reshape(96, 2, 32)) / step
    assert 0.4 < error.max() < 0.5 + 127 * 2**-11  # the step itself is rounded to float16


# ---- blocks, decoded by hand ------------------------------------------------------------------


def half(block: bytes) -> float:
    return float(np.frombuffer(block, np.float16)[0])


def decode_q4(block: bytes, *, minimum: bool) -> list[float]:
    d, m = half(block[:2]), half(block[2:4]) if minimum else None
    nibbles = block[4:] if minimum else block[2:]
    codes = [b & 15 for b in nibbles] + [b >> 4 for b in nibbles]
    return [d * q + m if minimum else d * (q - 8) for q in codes]


def decode_q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * q for q in np.frombuffer(block[2:], np.int8).tolist()]


def scale_and_min(packed: bytes, j: int) -> tuple[int, int]:
    """The j-th of eight pairs of 6-bit numbers in 12 bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    scale = packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4
    return scale, packed[j + 4] >> 4 | (packed[j] >> 6) << 4


def decode_q45_k(block: bytes, *, bits: int) -> list[float]:
    d, dmin, packed = half(block[:2]), half(block[2:4]), block[4:16]
    high, low = (block[16:48], block[48:]) if bits == 5 else (bytes(32), block[16:])
    out = []
    for j in range(8):
        scale, least = scale_and_min(packed, j)
        for i in range(32):
            code = low[32 * (j // 2) + i] >> 4 * (j % 2) & 15 | (high[i] >> j & 1) << 4
            out.append(d * scale * code - dmin * least)
    return out


def decode_q6_k(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8)
    out = []
    for n in range(256):
        part, row, i = n // 128, n % 128 // 32, n % 32
        nibble = low[64 * part + 32 * (row % 2) + i] >> 4 * (row // 2) & 15
        code = nibble | (high[32 * part + i] >> 2 * row & 3) << 4
        out.append(half(block[208:]) * int(scales[n // 16]) * (code - 32))
    return out


DECODERS = {  # type -> decoder, and where its float16 numbers lie
    Type.Q8_0: (decode_q8_0, (0,)),
    Type.Q4_0: (lambda b: decode_q4(b, minimum=False), (0,)),
    Type.Q4_1: (lambda b: decode_q4(b, minimum=True), (0, 2)),
    Type.Q4_K: (lambda b: decode_q45_k(b, bits=4), (0, 2)),
    Type.Q5_K: (lambda b: decode_q45_k(b, bits=5), (0, 2)),
    Type.Q6_K: (decode_q6_k, (208,)),
}
KEYS = {
    "block_count": 1,
    "context_length": 64,
    "embedding_length": 256,
    "feed_forward_length": 8,
    "attention.head_count": 2,
}


def write_raw(path, tensors: dict[str, tuple], architecture="llama", **extra) -> str:
    """A file of just these tensors: name -> (bytes, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in KEYS.items():
        if key not in extra.get("without", ()):
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in extra.get("floats", {}).items():
        writer.add_float32(key, value)
    for key, value in extra.get("arrays", {}).items():
        writer.add_array(key, value)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_blocks_mean_what_the_format_says(kind, tmp_path):
    decode, halves = DECODERS[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (7 * 512 // block, size), np.uint8)
    for at in halves:
        scales = rng.normal(size=len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    raw = blocks.reshape(7, -1)
    path = write_raw(tmp_path / "m.gguf", {"token_embd.weight": (raw, kind)})
    got = open_gguf(path).read("token_embd.weight")
    expected = np.array([decode(b.tobytes()) for b in blocks]).reshape(7, 512)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


# ---- llama.cpp --------------------------------------------------------------------------------


def llama_cpp_logits(path: str, ids: list[int]) -> np.ndarray:
    """In float32 throughout: its key-value cache would be float16."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        path, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_our_logits(variant, tmp_path):
    model = random_model(**VARIANTS[variant])
    path = str(tmp_path / "m.gguf")
    write_gguf(model, path)
    ids = np.random.default_rng(0).integers(3, 259, 40).tolist()
    got = llama_cpp_logits(path, ids)
    expected = logits(model.config, model.params, ids)
    # Rounding: the largest difference seen is 1e-5 of the largest logit.
    np.testing.assert_allclose(got, expected, atol=5e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_our_blocks_are_those_of_llama_cpp(dtype, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    for name in ("f32", dtype):
        write_gguf(random_model(), str(tmp_path / f"{name}.gguf"), dtype=name)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = {"q8_0": 7, "q4_0": 2}[dtype], 1
    source, target = (str(tmp_path / f"{name}.gguf").encode() for name in ("f32", "theirs"))
    assert llama_cpp.llama_model_quantize(source, target, options) == 0
    ours, theirs = (read_header(str(tmp_path / f"{name}.gguf")) for name in (dtype, "theirs"))
    for name, tensor in theirs.tensors.items():
        assert ours.tensors[name].type == tensor.type, name
        np.testing.assert_array_equal(ours.raw(name), theirs.raw(name))


SMOLLM2 = os.environ.get("EASYLM_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists(SMOLLM2), reason="EASYLM_SMOLLM2 names no file")
def test_smollm2_in_llama_cpp_is_smollm2_here(tmp_path):
    foreign, params = load(SMOLLM2)
    path = str(tmp_path / "m.gguf")
    write_gguf(Model(foreign.config, params, foreign.tokenizer(), foreign.chat_template), path)
    again, same = load(path)
    assert again.config == foreign.config and again.chat_template == foreign.chat_template
    assert again.tokenizer().files() == foreign.tokenizer().files()
    jax.tree.map(np.testing.assert_array_equal, same, params)
    ids = foreign.tokenizer().encode("The quick brown fox, aged 42, jumps over 1024 lazy dogs.")
    got, expected = llama_cpp_logits(path, ids), logits(foreign.config, params, ids)
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=0)  # of 30


# ---- what is refused --------------------------------------------------------------------------

EMBEDDING = {"token_embd.weight": (np.zeros((8, 256), np.float32), Type.F32)}
FACTORS = np.linspace(1, 8, 64, dtype=np.float32)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(architecture="mamba"), "architecture 'mamba'; only llama and qwen2"),
        (dict(without=["block_count"]), "no metadata key llama.block_count"),
        (dict(arrays={"tokenizer.ggml.tokens": ["a"] * 7}), "7 pieces and .* 8 rows"),
        (dict(floats={"llama.rope.scale_linear": 4.0}), "rotary positions that are not ours"),
        (dict(arrays={"llama.attention.head_count_kv": [1, 2]}), "differ in their number of heads"),
        (dict(floats={"llama.attention.key_length": 8.0}), "says 8.0 for llama.attention.key_len"),
    ],
)
def test_other_models_are_refused(arguments, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        open_gguf(write_raw(tmp_path / "m.gguf", EMBEDDING, **arguments))


def test_unknown_rope_factors_are_refused(tmp_path):
    tensors = EMBEDDING | {"rope_freqs.weight": (FACTORS, Type.F32)}
    with pytest.raises(ValueError, match="not those of Llama 3's scaling"):
        open_gguf(write_raw(tmp_path / "m.gguf", tensors))


@pytest.mark.parametrize(
    "scaling", [RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192)]
)
def test_the_scalings_of_llama_3_are_recognised(scaling, tmp_path):
    """The factors as llama.cpp's converter computes them."""
    inverse = 500_000.0 ** -(np.arange(0, 128, 2) / 128)
    wavelengths = 2 * np.pi / inverse
    smooth = (8192 / wavelengths - 1) / 3
    between = 1 / ((1 - smooth) / scaling.factor + smooth)
    factors = np.where(wavelengths > 8192, scaling.factor, between)
    factors = np.where(wavelengths < 2048, 1, factors).astype(np.float32)
    tensors = EMBEDDING | {"rope_freqs.weight": (factors, Type.F32)}
    path = write_raw(tmp_path / "m.gguf", tensors, floats={"llama.rope.freq_base": 500_000.0})
    assert open_gguf(path).config.rope_scaling == scaling


def test_an_unknown_type_is_named(tmp_path):
    path = tmp_path / "m.gguf"
    write_raw(path, EMBEDDING)
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + 17 + 4 + 16  # name, number of dims, dims
    path.write_bytes(content[:at] + (77).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(ValueError, match="token_embd.weight of .* type number 77"):
        open_gguf(str(path))


def gguf_bytes(metadata: bytes = b"", *, shape=(4,), keys: int = 1) -> bytes:
    """One tensor "x" of F32 numbers behind raw metadata."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    tensor = struct.pack("<Q", 1) + b"x" + dims + struct.pack("<IQ", 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, keys) + metadata + tensor + bytes(256)


def one_key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content, says",
    [
        (gguf_bytes(keys=0, shape=()), r"tensor x of .* has the shape \[\]"),
        (gguf_bytes(one_key(b"general.alignment", 4, bytes(4))), "aligns its tensors to 0 bytes"),
        (gguf_bytes(one_key(b"general.alignment", 8, bytes(8))), "aligns its tensors to '' bytes"),
        (
            gguf_bytes(one_key(b"deep", 9, struct.pack("<IQ", 9, 1) * 9000)),
            "damaged header near byte",
        ),
    ],
)
def test_crafted_headers_get_a_sentence(content, says, tmp_path):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        open_gguf(str(tmp_path / "m.gguf"))


def test_every_cut_of_a_file_is_told(tmp_path):
    whole, part = tmp_path / "m.gguf", tmp_path / "part.gguf"
    write_gguf(random_model(num_layers=1), str(whole))
    content = whole.read_bytes()
    lengths = np.random.default_rng(0).integers(0, len(content), 60)
    for length in (*lengths.tolist(), *range(0, 4000, 97), len(content) - 1):
        part.write_bytes(content[:length])
        with pytest.raises(ValueError, match="part.gguf (is|ends|has)"):
            open_gguf(str(part))
    assert is_gguf(str(whole)) and not is_gguf(str(tmp_path))


def test_a_failed_export_leaves_what_was_there(tmp_path):
    model = random_model()
    model.params["lm_head"]["kernel"] = model.params["lm_head"]["kernel"].at[0, 0].set(1e9)
    path = tmp_path / "m.gguf"
    path.write_text("old")
    with pytest.raises(ValueError, match="output.weight has values beyond float16"):
        write_gguf(model, str(path), dtype="f16")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # as a full disk
    try:
        with pytest.raises(ValueError, match="cannot write .*m.gguf: .*; free room"):
            write_gguf(model, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_what_gguf_cannot_say_is_refused(tmp_path):
    window = random_model(attention=AttentionConfig(sliding_window=8))
    with pytest.raises(ValueError, match="no sliding window"):
        write_gguf(window, str(tmp_path / "m.gguf"))
    with pytest.raises(ValueError, match="give one of f32, f16"):
        write_gguf(random_model(), str(tmp_path / "m.gguf"), dtype="q4_k")
    small = random_model(vocab_size=200)
    with pytest.raises(ValueError, match="259 pieces and the model's embedding 200 rows"):
        write_gguf(small, str(tmp_path / "m.gguf"))
