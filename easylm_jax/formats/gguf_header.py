"""The header of a GGUF file: its metadata, and where each tensor lies.

The container only; `gguf.py` knows what the keys and tensors mean. We read the header ourselves
because the `gguf` package keeps four NumPy arrays per string: Llama 3's vocabulary takes it 11 s
and 600 MB, and damage shows as an IndexError. Types and block sizes are the package's.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

_SCALARS = "BbHhIif?"  # struct's letters for the value types 0 to 7; 10 to 12 follow below
_FORMATS = dict(enumerate(_SCALARS)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """`shape` as NumPy has it, rows first; `offset` in bytes from the start of the file."""

    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of the tensor as bytes."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return (*self.shape[:-1], self.shape[-1] // block * size)


@dataclasses.dataclass(frozen=True)
class Header:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data: np.ndarray  # the whole file, mapped

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor, still on disk."""
        tensor = self.tensors[name]
        end = tensor.offset + math.prod(tensor.raw_shape)
        return self.data[tensor.offset : end].reshape(tensor.raw_shape)


class _Cursor:
    """Reads values one after the other; IndexError past the end of the file."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = memoryview(data), 0

    def bytes(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise IndexError
        self.at += size
        return self.data[self.at - size : self.at]

    def scalars(self, letter: str, count: int) -> tuple:
        return struct.unpack(f"<{count}{letter}", self.bytes(count * struct.calcsize(f"<{letter}")))

    def one(self, letter: str) -> Any:
        return self.scalars(letter, 1)[0]

    def string(self) -> str:
        return str(self.bytes(self.one("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item, count = self.one("I"), self.one("Q")
            if item in _FORMATS:
                return list(self.scalars(_FORMATS[item], count))
            return [self.value(item) for _ in range(count)]
        return self.one(_FORMATS[kind])


def is_gguf(path: str) -> bool:
    """Whether `path` is a file that begins as GGUF files do."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def read_header(path: str) -> Header:
    """Everything but the tensors' contents. ValueError for a file that is not a whole GGUF."""
    if not is_gguf(path):
        raise ValueError(f"{path} is not a GGUF file: those begin with the four bytes GGUF")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(data)
    try:
        version = cursor.scalars("I", 2)[1]
        if version not in (2, 3):
            raise ValueError(
                f"{path} is GGUF of version {version} or of the other byte order; versions 2 and 3 "
                "are read, little-endian: convert it again with llama.cpp"
            )
        num_tensors, num_keys = cursor.scalars("Q", 2)
        metadata = {cursor.string(): cursor.value(cursor.one("I")) for _ in range(num_keys)}
        tensors = [_tensor_info(cursor, path) for _ in range(num_tensors)]
    except (IndexError, OverflowError, MemoryError):
        raise ValueError(f"{path} ends inside its header: copy or download it again") from None
    except (KeyError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} has a damaged header near byte {cursor.at} ({error}): copy or download it "
            "again"
        ) from None
    align = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(align) is not int or align < 1:
        raise ValueError(f"{path} aligns its tensors to {align!r} bytes: copy or download it again")
    start = -(-cursor.at // align) * align
    placed = {k: dataclasses.replace(t, offset=start + t.offset) for k, t in tensors}
    ends = [t.offset + math.prod(t.raw_shape) for t in placed.values()]
    if max(ends, default=0) > len(data):
        raise ValueError(
            f"{path} is cut short: its tensors need {max(ends)} bytes and it has {len(data)}; copy "
            "or download it again"
        )
    return Header(metadata, placed, data)


def _tensor_info(cursor: _Cursor, path: str) -> tuple[str, TensorInfo]:
    name = cursor.string()
    shape = cursor.scalars("Q", cursor.one("I"))[::-1]
    kind, offset = cursor.one("I"), cursor.one("Q")
    try:
        tensor = TensorInfo(gguf.GGMLQuantizationType(kind), shape, offset)
    except ValueError:
        raise ValueError(
            f"tensor {name} of {path} has type number {kind}, which the installed gguf package "
            f"does not know: requantise the file, to Q8_0 say"
        ) from None
    if not shape or shape[-1] % gguf.GGML_QUANT_SIZES[tensor.type][0]:
        raise ValueError(
            f"tensor {name} of {path} has the shape {list(shape)}, which {tensor.type.name} cannot "
            "have: copy or download it again"
        )
    return name, tensor
