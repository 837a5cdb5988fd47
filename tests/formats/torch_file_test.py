"""Files made by torch itself: types, views, nesting, and what must be refused."""

import collections
import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from easylm_jax.formats.torch_file import open_torch_file

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x):
    """The raw bytes of a torch tensor or an array, element after element."""
    if isinstance(x, torch.Tensor):
        return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return np.ascontiguousarray(x).tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64"])
def test_types_and_values(tmp_path, dtype):
    x = (100 * random(5, 7)).to(getattr(torch, dtype))
    torch.save({"x": x, "scalar": x[2, 3]}, tmp_path / "a.pth")
    tensors = open_torch_file(str(tmp_path / "a.pth"))
    got = tensors["x"].read()
    assert tensors["x"].shape == got.shape == (5, 7)
    assert got.dtype == tensors["x"].dtype and got.dtype.name == dtype
    assert bits(got) == bits(x) and bits(tensors["scalar"].read()) == bits(x[2, 3])


def test_views_share_one_storage(tmp_path):
    base = random(6, 8)
    state = {
        "whole": base,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "expanded": base[:1].expand(4, 8),
        "empty": base[:0],
        "parameter": torch.nn.Parameter(base[2]),
        "tail": base.reshape(-1)[13:],
    }
    torch.save(state, tmp_path / "a.pth")
    tensors = open_torch_file(str(tmp_path / "a.pth"))
    assert list(tensors) == list(state)
    for name, x in state.items():
        got = tensors[name].read()
        assert got.shape == tuple(x.shape), name
        np.testing.assert_array_equal(got, x.detach().numpy(), err_msg=name)


@pytest.mark.parametrize("under", [None, "model", "state_dict"])
def test_state_dict_of_a_module_at_top_or_nested(tmp_path, under):
    state = torch.nn.Linear(3, 4).state_dict()  # carries `_metadata`
    content = {under: state, "step": 3} if under else state
    torch.save(content, tmp_path / "a.bin")
    tensors = open_torch_file(str(tmp_path / "a.bin"))
    assert set(tensors) == {"weight", "bias"}
    np.testing.assert_array_equal(tensors["weight"].read(), state["weight"].numpy())


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_code_is_refused_by_name_and_not_run(tmp_path):
    mark = tmp_path / "ran"
    torch.save({"x": random(2), "y": Malicious(mark)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"asks to run `posix\.system`, refused"):
        open_torch_file(str(tmp_path / "a.pth"))
    assert not mark.exists()


def edited(source, target, edit):
    """A copy of a torch file, `edit`ed as a dictionary of its members."""
    with zipfile.ZipFile(source) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    edit(members)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_byte_order_and_padding_of_another_writer(tmp_path):
    x = random(3, 5)
    torch.save({"x": x}, tmp_path / "a.pth")

    def to_big(members):
        members["a/byteorder"] = b"big"
        members["a/data/0"] = x.numpy().astype(">f4").tobytes()

    edited(tmp_path / "a.pth", tmp_path / "b.pth", to_big)
    np.testing.assert_array_equal(open_torch_file(str(tmp_path / "b.pth"))["x"].read(), x.numpy())


def test_damaged_files_get_a_sentence(tmp_path):
    good, path = tmp_path / "a.pth", tmp_path / "b.pth"
    torch.save({"x": random(20, 20)}, good)

    def refused(match):
        with pytest.raises(ValueError, match=match):
            open_torch_file(str(path))

    path.write_bytes(good.read_bytes()[:1000])
    refused("no torch.save file, or a part")
    torch.save({"x": random(2)}, path, _use_new_zipfile_serialization=False)
    refused("torch before 1.6")
    edited(good, path, lambda m: m.update({"a/data/0": m["a/data/0"][:-4]}))
    refused("tensor x of .* points outside")
    edited(good, path, lambda m: m.pop("a/data/0"))
    refused("tensor x of .* points outside")
    edited(good, path, lambda m: m.update({"a/data.pkl": m["a/data.pkl"][:40]}))
    refused("data.pkl in .* is damaged")
    edited(good, path, lambda m: m.update({"a/data.pkl": pickle.dumps([1, 2])}))
    refused("holds no tensors by name")


class Call(collections.namedtuple("Call", "storage offset shape strides")):
    """Pickled as torch pickles a tensor, with whatever arguments."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (*self, False, {})


class Stored(tuple):
    """What a pickle names by persistent id."""


def pickled(content) -> bytes:
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=2)
    pickler.persistent_id = lambda x: tuple(x) if isinstance(x, Stored) else None
    pickler.dump(content)
    return stream.getvalue()


STORED = Stored(("storage", "FloatStorage", "0", "cpu", 400))


@pytest.mark.parametrize(
    "tensor, says",
    [
        (Call(Stored(("storage", "FloatStorage")), 0, (2, 2), (2, 1)), "data.pkl in .* damaged"),
        (Call(Stored(("storage", "QStorage", "0", "cpu", 4)), 0, (2,), (1,)), "data.pkl in .* dam"),
        (Call(Stored(("storage", [], "0", "cpu", 4)), 0, (2,), (1,)), "data.pkl in .* damaged"),
        (Call("no storage", 0, (2, 2), (2, 1)), "data.pkl in .* damaged"),
        (Call(STORED, 0, (2, "2"), (2, 1)), "data.pkl in .* damaged"),
        (Call(STORED, 0.5, (2, 2), (2, 1)), "data.pkl in .* damaged"),
        (Call(STORED, 0, 4, (2, 1)), "data.pkl in .* damaged"),
        (Call(STORED, 0, (2, 2), (2,)), "tensor x of .* points outside"),
        (Call(STORED, 0, (1, 2), (2**70, 1)), "tensor x of .* points outside"),
    ],
)
def test_crafted_tensors_get_a_sentence(tensor, says, tmp_path):
    torch.save({"x": random(20, 20)}, tmp_path / "a.pth")

    def change(members):
        members["a/data.pkl"] = pickled({"x": tensor})

    edited(tmp_path / "a.pth", tmp_path / "b.pth", change)
    with pytest.raises(ValueError, match=says):
        open_torch_file(str(tmp_path / "b.pth"))["x"].read()
