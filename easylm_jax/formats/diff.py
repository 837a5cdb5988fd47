"""Weight diffs: a fine-tuned model published as its difference from a base (Koala was so).

Both operands are any `Foreign`, of the same or of different formats, and so is the result; tensors
are read, brought to our layout and combined one at a time, when they are asked for.

EasyLM subtracts and adds in the type that its files have, by default bfloat16 for the result. Here
it is float32, and a diff in bfloat16 gives just what EasyLM recovers from it. That is not always
the target again: a float32 sum of the float32 difference misses about 3 in 10 million weights of a
bfloat16 model moved by 5 % of their spread, and 2 % of a float32 one, each by an ulp or so of the
base. An `exact` diff holds the differences of the bit patterns instead and gives every bit back; it
must be stored in float32 and means nothing to other programs. A record beside the diff says which
it is and holds a checksum of what it gives. Called by the converter.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from easylm_jax.formats.foreign import Foreign, check_tensors, foreign_shapes
from easylm_jax.formats.names import HF, Entry, to_ours

# Our own names and layout, a tensor for each layer.
OURS = tuple(
    Entry(
        e.ours.replace("layers/", "layers/{layer}/") if "{layer}" in e.foreign else e.ours, e.ours
    )
    for e in HF
)


def in_our_layout(foreign: Foreign) -> Foreign:
    """The same model with our names and matrices, tensors in float32."""
    check_tensors(foreign)
    foreign_entries = {entry.ours: entry for entry in foreign.table}
    places = {}
    for ours in OURS:
        for layer in range(foreign.config.num_layers if "{layer}" in ours.foreign else 1):
            if ours.ours in foreign_entries:
                entry = foreign_entries[ours.ours]
                places[ours.foreign.format(layer=layer)] = entry, entry.foreign.format(layer=layer)

    def read(name: str) -> np.ndarray:
        entry, foreign_name = places[name]
        x = to_ours(entry, foreign.read(foreign_name), foreign.config)
        return np.ascontiguousarray(x, np.float32)

    shapes = foreign_shapes(OURS, foreign.config)
    return dataclasses.replace(foreign, table=OURS, shapes=shapes, read=read, ignored=())


def subtract(target: Foreign, base: Foreign, *, exact: bool = False) -> Foreign:
    """The diff that `add` turns into `target` again. Raises ValueError if the sizes differ."""
    a, b = _alike(target, base)

    def read(name: str) -> np.ndarray:
        x, y = a.read(name), b.read(name)
        if exact:
            return (x.view(np.uint32) - y.view(np.uint32)).view(np.float32)
        return x - y

    return dataclasses.replace(a, path=f"{target.path} - {base.path}", read=read)


def add(base: Foreign, delta: Foreign, *, exact: bool | None = None) -> Foreign:
    """The model that `delta` was made of; `exact` by default as the record beside it says."""
    d, b = _alike(delta, base)
    if exact is None:
        exact = (_read_record(delta.path) or {"exact": False})["exact"]

    def read(name: str) -> np.ndarray:
        x, y = b.read(name), d.read(name)
        if exact:
            return (x.view(np.uint32) + y.view(np.uint32)).view(np.float32)
        return x + y

    return dataclasses.replace(
        d,
        path=f"{base.path} + {delta.path}",
        read=read,
        tokenizer=delta.tokenizer or base.tokenizer,
        chat_template=delta.chat_template or base.chat_template,
        stop_ids=delta.stop_ids or base.stop_ids,
    )


def _alike(other: Foreign, base: Foreign) -> tuple[Foreign, Foreign]:
    """Both in our layout, if every tensor of one has its size in the other."""
    ours, ours_base = in_our_layout(other), in_our_layout(base)
    got, expected = ours.shapes, ours_base.shapes
    for name in [*expected, *got]:
        if got.get(name) != expected.get(name):
            raise ValueError(
                f"{other.path} does not fit the base {base.path}: tensor {name}, expected "
                f"{_size(expected.get(name))}, got {_size(got.get(name))}; give the base that it "
                "was trained from"
            )
    heads = [(c.num_heads, c.num_kv_heads) for c in (base.config, other.config)]
    if heads[0] != heads[1]:
        raise ValueError(
            f"{other.path} does not fit the base {base.path}: expected {heads[0]} query and "
            f"key/value heads, got {heads[1]}; give the base that it was trained from"
        )
    return ours, ours_base


def _size(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def checksum(foreign: Foreign) -> str:
    """SHA-256 of names, shapes and float32 values in our layout: the same in every format."""
    ours = in_our_layout(foreign)
    digest = hashlib.sha256()
    for name, shape in ours.shapes.items():
        digest.update(f"{name} {list(shape)}\n".encode())
        digest.update(ours.read(name).astype("<f4", copy=False).data)
    return digest.hexdigest()


def save_record(path: str, result: Foreign, *, target_sha256: str, exact: bool = False) -> str:
    """Write beside the diff at `path` what it gives; returns the checksum of `result`.

    `result` is `add(base, delta)` of the diff as it was read back, so that its stored type counts.
    """
    found = checksum(result)
    if exact and found != target_sha256:
        raise ValueError(
            f"the exact diff {path} does not give its target back: store it in float32, in a "
            "format and type that keep every bit"
        )
    record = {"exact": exact, "result_sha256": found, "target_sha256": target_sha256}
    _record_of(path).write_text(json.dumps(record, indent=2) + "\n")
    return found


def check_result(result: Foreign, path: str) -> str:
    """The checksum of `result`; ValueError unless it is the one recorded beside the diff `path`."""
    found, record = checksum(result), _read_record(path)
    if record and record["result_sha256"] != found:
        raise ValueError(
            f"{result.path} has the checksum {found}, expected {record['result_sha256']} as "
            f"{_record_of(path)} says: the base is another one, or a file is damaged"
        )
    return found


def _record_of(path: str) -> Path:
    place = Path(path.rpartition("::")[2])
    return place / "weight_diff.json" if place.is_dir() else Path(f"{place}.weight_diff.json")


def _read_record(path: str) -> dict | None:
    record = _record_of(path)
    return json.loads(record.read_text()) if record.is_file() else None
