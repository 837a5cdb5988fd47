"""Meta's folders: shards put together and rotated right by numbers, configurations, torch.load."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from easylm_jax.formats.foreign import Model, check_tensors, import_params
from easylm_jax.formats.meta import is_meta, open_meta, write_meta
from easylm_jax.formats.torch_file import open_torch_file
from easylm_jax.models.llama import Llama, RopeScaling, output_logits
from easylm_jax.models.presets import PRESETS
from tests.reference import numpy_meta
from tests.tiny import assert_close, on_one_device, tiny_config, tiny_params

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

D, HEADS, V, LAYERS = 32, 4, 64, 2


def random_weights(*, kv_heads, width, seed=0):
    rng = np.random.default_rng(seed)
    kv = kv_heads * D // HEADS
    shapes = {"tok_embeddings": (V, D), "norm": (D,), "output": (V, D)}
    for i in range(LAYERS):
        attention = {"wq": (D, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, D)}
        mlp = {"w1": (width, D), "w2": (D, width), "w3": (width, D)}
        shapes |= {f"layers.{i}.attention.{n}": s for n, s in attention.items()}
        shapes |= {f"layers.{i}.feed_forward.{n}": s for n, s in mlp.items()}
        shapes |= {f"layers.{i}.{n}_norm": (D,) for n in ("attention", "ffn")}
    return {
        f"{name}.weight": (len(shape) == 1) + 0.3 * rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def save(folder, weights, params, *, shards=1, embedding_dim=1):
    """As Meta's ranks did: columns of outputs, rows of inputs, norms by everyone."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {"rope.freqs": torch.zeros(4)}
        for name, x in weights.items():
            kind = name.split(".")[-2:][0]
            if kind == "tok_embeddings":
                x = np.split(x, shards, axis=embedding_dim)[i]
            elif kind in ("wo", "w2"):
                x = np.split(x, shards, axis=1)[i]
            elif x.ndim == 2:
                x = np.split(x, shards, axis=0)[i]
            part[name] = torch.from_numpy(np.array(x))
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    return folder


LLAMA1 = {"dim": D, "n_layers": LAYERS, "n_heads": HEADS, "norm_eps": 1e-6, "vocab_size": -1}
LLAMA1 |= {"multiple_of": 16}  # 2/3 of 128 is 85: 96 wide
LLAMA3 = LLAMA1 | {"n_kv_heads": 2, "rope_theta": 5e5, "norm_eps": 1e-5, "vocab_size": V}
LLAMA3 |= {"ffn_dim_multiplier": 1.3, "multiple_of": 32}  # 110: 128 wide


@pytest.mark.parametrize(
    "params, shards, embedding_dim, width",
    [(LLAMA1, 1, 1, 96), (LLAMA1, 2, 1, 96), (LLAMA3, 2, 0, 128)],
    ids=["one file", "LLaMA 1, two files", "Llama 3, two files"],
)
def test_logits_are_those_of_the_published_formulas(tmp_path, params, shards, embedding_dim, width):
    weights = random_weights(kv_heads=params.get("n_kv_heads", HEADS), width=width)
    save(tmp_path, weights, params, shards=shards, embedding_dim=embedding_dim)
    assert is_meta(str(tmp_path))
    foreign = open_meta(str(tmp_path))
    ours = import_params(foreign, on_one_device(foreign.config))
    tokens = np.random.default_rng(1).integers(0, V, 12)
    ones, positions = jnp.ones((1, 12), jnp.int32), jnp.arange(12)[None]
    model = Llama(foreign.config)
    hidden, _ = model.apply({"params": ours}, jnp.asarray(tokens)[None], ones, positions)
    theta, eps = params.get("rope_theta", 1e4), params["norm_eps"]
    expected = numpy_meta.logits(weights, tokens, heads=HEADS, theta=theta, eps=eps)
    assert_close(output_logits(ours, hidden)[0], expected, rtol=1e-5)  # float32 against float64


@pytest.mark.parametrize(
    "params, preset",
    [
        ([4096, 32, 32, None, 256, None, 1e-6, None, False], "llama_7b"),
        ([6656, 60, 52, None, 256, None, 1e-6, None, False], "llama_33b"),
        ([8192, 80, 64, None, 256, None, 1e-5, None, False], "llama_65b"),
        ([4096, 32, 32, None, 256, None, 1e-5, None, False], "llama2_7b"),
        ([8192, 80, 64, 8, 4096, 1.3, 1e-5, None, False], "llama2_70b"),
        ([4096, 32, 32, 8, 1024, 1.3, 1e-5, 5e5, False], "llama3_8b"),
        ([8192, 80, 64, 8, 4096, 1.3, 1e-5, 5e5, False], "llama3_70b"),
        ([2048, 16, 32, 8, 256, 1.5, 1e-5, 5e5, True], "llama3.2_1b"),
        ([3072, 28, 24, 8, 256, 1.0, 1e-5, 5e5, True], "llama3.2_3b"),
    ],
)
def test_published_params_json_are_our_presets(params, preset):
    """The files that Meta released (and sku_list.py of its llama-models), as dictionaries."""
    from easylm_jax.formats import meta

    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier")
    keys += ("norm_eps", "rope_theta", "use_scaled_rope")
    given = {k: v for k, v in zip(keys, params, strict=True) if v is not None}
    expected = PRESETS[preset]
    shapes = {"tok_embeddings.weight": (expected.vocab_size, expected.d_model)}
    got = meta._read_config(given, shapes, tied=expected.tie_embeddings)
    assert got == expected
    scaled = got.rope_scaling and got.rope_scaling.factor
    assert scaled == (32.0 if params[-1] else None)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_folder_is_read_by_torch_and_back(tmp_path, dtype, changes):
    config, params = (
        tiny_config(norm_eps=1e-6, rope_theta=7e5, max_seq_len=8192, **changes),
        tiny_params(),
    )
    if config.tie_embeddings:
        del params["lm_head"]
    write_meta(Model(config, params), str(tmp_path), dtype=dtype)
    loaded = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    foreign = open_meta(str(tmp_path))
    assert set(loaded) == set(foreign.shapes)
    for name, tensor in loaded.items():
        assert str(tensor.dtype) == f"torch.{dtype}" and tuple(tensor.shape) == foreign.shapes[name]
        np.testing.assert_array_equal(tensor.float().numpy(), foreign.read(name).astype("float32"))
    if config.tie_embeddings:
        assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()
    assert dataclasses.replace(foreign.config, attention=config.attention, remat="none") == config
    got = import_params(foreign, on_one_device(config))
    expected = jax.tree.map(lambda x: x.astype(dtype).astype("float32"), params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_small_llama32_with_a_copied_head_is_tied(tmp_path):
    weights = random_weights(kv_heads=2, width=128)
    params = LLAMA3 | {"use_scaled_rope": True}
    assert not open_meta(str(save(tmp_path, weights, params))).config.tie_embeddings
    weights["output.weight"] = weights["tok_embeddings.weight"].copy()
    foreign = open_meta(str(save(tmp_path, weights, params)))
    assert foreign.config.tie_embeddings and foreign.config.rope_scaling.factor == 32
    check_tensors(foreign)


def test_what_does_not_fit_gets_a_sentence(tmp_path):
    weights = random_weights(kv_heads=4, width=96)
    folder = save(tmp_path / "m", weights, LLAMA1, shards=2)
    path = str(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match="holds 1 consolidated.* of a model cut into 2"):
        open_meta(path)
    save(folder, weights, LLAMA1 | {"multiple_of": 128})
    with pytest.raises(ValueError, match=r"w1\.weight \(expected \[128, 32\], got \[96, 32\]\)"):
        check_tensors(open_meta(path))
    (folder / "params.json").write_text('{"dim": 32}')
    with pytest.raises(ValueError, match="lacks multiple_of, n_heads, n_layers, norm_eps"):
        open_meta(path)
    config = tiny_config(rope_scaling=RopeScaling(factor=4.0))
    with pytest.raises(ValueError, match=r"cannot state RopeScaling\(factor=4"):
        write_meta(Model(config, tiny_params()), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_tensors_of_odd_names_and_shapes_are_told(tmp_path):
    weights = random_weights(kv_heads=4, width=96)
    weights |= {"foo": np.ones(3, np.float32), "norm.weight": np.float32([1])[0].reshape(())}
    path = str(save(tmp_path, weights, LLAMA1))
    with pytest.raises(ValueError, match=r"left over: foo; of another shape: norm\.weight"):
        check_tensors(open_meta(path))
    weights["layers.0.attention.wq.weight"] = np.ones((), np.float32)
    save(tmp_path, weights, LLAMA1)
    with pytest.raises(ValueError, match="lacks layers.0.attention.wq.weight"):
        open_meta(path)


def test_every_cut_file_keeps_its_own_tensors(tmp_path):
    """A file of another model among the shards is not put together silently."""
    weights = random_weights(kv_heads=4, width=96)
    save(tmp_path, weights, LLAMA1, shards=2)
    second = tmp_path / "consolidated.01.pth"
    names = list(open_torch_file(str(second)))
    part = torch.load(second, weights_only=True)
    del part[names[-1]]
    torch.save(part, second)
    with pytest.raises(ValueError, match="file 1 of .* other tensors than file 0"):
        open_meta(str(tmp_path))
