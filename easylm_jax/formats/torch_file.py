"""The tensors of a `torch.save` file, without torch and without running what the file contains.

Such a file is a zip: `data.pkl` pickles the structure, and `data/N` are the storages, raw and
uncompressed, into which the tensors point with offset and strides. A pickle may ask to call any
function; here it gets stand-ins for the few that a dictionary of tensors needs, and everything else
is refused by name. `write_torch_file` writes the same. Called by `meta.py`, and by `hf.py` for old
`.bin` shards.
"""

import collections
import dataclasses
import io
import math
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
NESTED_UNDER = ("model", "state_dict")  # where training programs put the weights
LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # opens files of torch < 1.6


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in the file. Strides are in elements, `offset` in bytes."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def read(self) -> np.ndarray:
        """A read-only view of the mapped file; the pages are read when they are used."""
        span = _span(self.shape, self.strides)
        if not span:
            return np.empty(self.shape, self.dtype.newbyteorder("="))
        num_bytes = span * self.dtype.itemsize
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (num_bytes,)).view(np.ndarray)
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        x = np.lib.stride_tricks.as_strided(
            raw.view(self.dtype), self.shape, strides, writeable=False
        )
        return x.astype(self.dtype.newbyteorder("="), copy=False)


class _Storage(NamedTuple):
    kind: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(ValueError):
    """The file asks to run something."""


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(n) is int for n in numbers):
        raise ValueError(f"a tensor of shape {shape!r} in {storage!r}")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _Unpickler(pickle.Unpickler):
    """Knows the names a dictionary of tensors needs. Functions are made anew for each file, since
    a pickle can set attributes of what it is given."""

    def __init__(self, content: bytes, path: str):
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return collections.OrderedDict
            case "torch._utils", "_rebuild_tensor_v2":
                return lambda *args: _rebuild(*args)
            case "torch._utils", "_rebuild_parameter":
                return lambda *args: args[0]
            case "torch", _ if name in STORAGES:
                return name
        raise _Refused(
            f"{self._path} asks to run `{module}.{name}`, refused: only files that hold nothing "
            "but tensors are read, so save the state dict alone"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(kind), str(key), _, _) if kind in STORAGES:
                return _Storage(kind, key)
        raise ValueError(f"a storage {pid!r}")


def open_torch_file(path: str) -> dict[str, LazyTensor]:
    """Name -> tensor of the state dict in `path`, at its top or under "model" or "state_dict".

    Raises ValueError for anything that is not a zip of tensors, or would run code.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _open_archive(archive, path)
    except zipfile.BadZipFile:
        with open(path, "rb") as file:
            legacy = file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC
        if legacy:
            message = "is in the format of torch before 1.6: load it and torch.save it again"
        else:
            message = "is no torch.save file, or a part of one: expected a zip, get it again"
        raise ValueError(f"{path} {message}") from None


def _open_archive(archive: zipfile.ZipFile, path: str) -> dict[str, LazyTensor]:
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in members:
        raise ValueError(f"{path} is a zip without data.pkl: expected a file of torch.save")
    order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
    content = _unpickle(archive.read(members["data.pkl"]), path)
    tensors = {
        name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, _Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name, at its top or under {' or '.join(NESTED_UNDER)}: "
            "expected a state dict"
        )
    starts = {}  # of each storage, in bytes from the start of the file
    opened = {}
    for name, tensor in tensors.items():
        info = members.get(f"data/{tensor.storage.key}")
        dtype = STORAGES[tensor.storage.kind].newbyteorder(">" if order == b"big" else "<")
        if info is None or not _fits(tensor, dtype.itemsize, info):
            raise ValueError(f"tensor {name} of {path} points outside the file: it is damaged")
        if info.filename not in starts:
            starts[info.filename] = _data_start(archive.fp, info)
        start = starts[info.filename] + tensor.offset * dtype.itemsize
        opened[name] = LazyTensor(path, dtype, tensor.shape, tensor.strides, start)
    return opened


def _unpickle(content: bytes, path: str) -> dict[str, Any]:
    try:
        found = _Unpickler(content, path).load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(f"data.pkl in {path} is damaged: {error}") from None
    for key in NESTED_UNDER:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return found if isinstance(found, dict) else {}


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of the storage lie from the tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def _fits(tensor: _Tensor, itemsize: int, info: zipfile.ZipInfo) -> bool:
    """Whether the tensor lies inside its storage: `as_strided` would read other memory."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or info.compress_type:
        return False
    if min(numbers) < 0 or max(numbers) >= 2**48:
        return False
    return (tensor.offset + _span(tensor.shape, tensor.strides)) * itemsize <= info.file_size


def _data_start(file: io.BufferedIOBase, info: zipfile.ZipInfo) -> int:
    """The local header before the data repeats the name and may pad, so it has to be read."""
    file.seek(info.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + name_length + extra_length


def write_torch_file(
    path: str,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    same: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A dictionary of tensors that `torch.load(path)` reads, written as the tensors come.

    `same`: further names for tensors, without a second copy of them. The pickle is put together
    from its instructions, since pickling needs torch's own classes.
    """
    top, pickled = Path(path).stem, {}
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, x) in enumerate(tensors):
            with archive.open(f"{top}/data/{i}", "w", force_zip64=True) as file:
                file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
            pickled[name] = _pickled_tensor(str(i), x)
        pickled |= {name: pickled[other] for name, other in same.items()}
        items = b"".join(_push(name) + tensor for name, tensor in pickled.items())
        archive.writestr(f"{top}/data.pkl", b"\x80\x02}(" + items + b"u.")
        archive.writestr(f"{top}/byteorder", sys.byteorder)
        archive.writestr(f"{top}/version", "3\n")


def _pickled_tensor(key: str, x: np.ndarray) -> bytes:
    """Instructions that call `_rebuild_tensor_v2(storage, offset, shape, strides, ...)`.

    `c` names a function, `(` to `t` make a tuple, `Q` has the storage looked up, `R` calls.
    """
    kind = next(kind for kind, dtype in STORAGES.items() if dtype == x.dtype)
    values = [_push(value) for value in (key, "cpu", x.size)]
    storage = b"(" + _push("storage") + f"ctorch\n{kind}\n".encode() + b"".join(values) + b"tQ"
    strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
    place = b"".join(_push(value) for value in (0, x.shape, strides, False))
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + hooks + b"tR"


def _push(value: Any) -> bytes:
    """Instructions that leave a plain value on the stack: a pickle without its ends."""
    return pickle.dumps(value, protocol=2)[2:-1]
