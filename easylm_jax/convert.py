"""One model format to another: `python -m easylm_jax.convert --from=PATH --to=PATH`

The input's format is found out from its content. The output's is `--format`; without it, GGUF if
the name ends in .gguf, else native: a folder that `load` and `--config.init_from` accept (EasyLM's
for a weight diff).

The parameters pass through host memory once, tensor by tensor: at the peak there are the parameters
and one foreign tensor, and as much as the parameters again while Orbax reads or writes a native
folder. SmolLM2-135M, 538 MB in float32, largest tensor 113 MB, beside 211 MB of program: 0.88 GB
from hf to meta, 1.4 to 1.5 GB with native on either side. Parameters keep the type that the file
has, bfloat16 stays bfloat16 bit for bit; `--dtype` changes it. A file that mixes half precision and
float32 (GGUF's norms) becomes float32.

Everything is written in a folder `PATH.partial` beside the target and renamed when it is whole. A
failure removes that folder; killed by -9, it stays, and the next conversion to PATH clears it, and
puts back what an --overwrite had moved aside in it.

Weight diffs: `--diff=make --base=B --from=F --to=D` writes F - B, `--diff=apply --base=B --from=D
--to=F` gives F back and compares the checksum of the sum in float32, before any `--dtype`, with the
one noted beside D. `--diff=make_exact`
gives every bit back, and only this program can apply it (`formats/diff.py`).
"""

import contextlib
import dataclasses
import fcntl
import os
import resource
import shutil
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from absl import flags
from jax.sharding import SingleDeviceSharding
from safetensors import SafetensorError
from tqdm import tqdm

from easylm_jax import workdir
from easylm_jax.array_types import Params
from easylm_jax.checkpoint import Checkpointer
from easylm_jax.config import run_main
from easylm_jax.formats.diff import add, check_result, checksum, save_record, subtract
from easylm_jax.formats.easylm import write_easylm
from easylm_jax.formats.foreign import Foreign, Model, abstract_params, foreign_shapes
from easylm_jax.formats.gguf import write_gguf
from easylm_jax.formats.hf import write_hf
from easylm_jax.formats.meta import write_meta
from easylm_jax.loading import (
    file_dtype,
    find_checkpoints,
    of_foreign,
    open_foreign,
    open_model,
    save_tokenizer,
    with_tokenizer,
)
from easylm_jax.models.llama import FloatName, LlamaConfig
from easylm_jax.preflight import check_vocabulary
from easylm_jax.tree import named_leaves, num_elements

FORMATS = ("native", "hf", "gguf", "meta", "easylm")
DIFF_FORMATS = ("easylm", "hf", "meta")  # folders, which have room for the checksum
REPLACED = "replaced"  # in PATH.partial: what was at PATH, until its successor is there
FLOATS = typing.get_args(FloatName)
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "q8_0": 8.5, "q4_0": 4.5}  # per parameter
GGUF_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion did, for people. `program_bytes`: the process before it began."""

    parameters: int
    parameter_bytes: int
    largest_tensor_bytes: int
    bytes_written: int
    seconds: float
    peak_memory_bytes: int
    program_bytes: int

    def __str__(self) -> str:
        speed = self.bytes_written / self.seconds / 1e6
        return (
            f"converted {self.parameters:,} parameters: {self.bytes_written / 1e6:,.1f} MB written "
            f"in {self.seconds:.1f} s ({speed:,.0f} MB/s)\n"
            f"peak host memory {self.peak_memory_bytes / 1e6:,.0f} MB, of which the program "
            f"{self.program_bytes / 1e6:,.0f} MB and the parameters "
            f"{self.parameter_bytes / 1e6:,.0f} MB; the largest tensor has "
            f"{self.largest_tensor_bytes / 1e6:,.0f} MB"
        )


def convert(
    source: str,
    target: str,
    *,
    to_format: str | None = None,
    dtype: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    base: str | None = None,
    diff: Literal["make", "make_exact", "apply"] | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the model at `source` to `target`; see the top of this file.

    `dtype` is one of `BITS`; those that are no parameter type are for GGUF alone. `model` names the
    preset of an EasyLM stream, `tokenizer` anything that `find_tokenizer` takes.
    """
    start, program_bytes = time.monotonic(), psutil.Process().memory_info().rss
    is_made = diff in ("make", "make_exact")
    to_format = to_format or _format_of(target, is_diff=is_made)
    _check_arguments(target, to_format, dtype, overwrite=overwrite, is_diff=is_made)
    record = None
    if find_checkpoints(source):
        if diff:
            raise ValueError(f"{source} is a native model: convert it to hf first for --diff")
        opened = open_model(source)
        kept = opened.config.param_dtype
    else:
        foreign = open_foreign(source, model=model)
        if diff:
            foreign, record = _diff(diff, foreign, base, model=model)
        kept = file_dtype(foreign)
        opened = of_foreign(_watched(foreign, widest=None if dtype in FLOATS else kept))
    opened = with_tokenizer(opened, tokenizer)
    param_dtype = dtype if dtype in FLOATS else kept
    config = dataclasses.replace(opened.config, param_dtype=param_dtype)
    text = opened.tokenizer() if opened.tokenizer else None
    if text:
        check_vocabulary(text, config.vocab_size)
    abstract = _on_host(config)
    num_params = num_elements(abstract)
    with whole_or_absent(Path(target), overwrite=overwrite) as path:
        _check_space(target, path, num_params * BITS[dtype or param_dtype] / 8)
        params = opened.read(abstract)
        result = Model(config, params, text, opened.chat_template, opened.stop_ids, opened.template)
        try:
            _write(result, str(path), to_format, dtype=dtype or param_dtype)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{target} could not be written: {error}") from error
        if record:
            record(str(path))
        bytes_written = _size(path)
    return Converted(
        parameters=num_params,
        parameter_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        largest_tensor_bytes=_largest_tensor(params, config),
        bytes_written=bytes_written,
        seconds=time.monotonic() - start,
        peak_memory_bytes=_peak_memory(),
        program_bytes=program_bytes,
    )


def _format_of(target: str, *, is_diff: bool) -> str:
    if is_diff:
        return "easylm"
    return "gguf" if target.endswith(".gguf") else "native"


def _check_arguments(
    target: str, to_format: str, dtype: str | None, *, overwrite: bool, is_diff: bool
) -> None:
    if "://" in target:
        raise ValueError(f"--to={target} is not a local path: convert to one and copy it there")
    formats = DIFF_FORMATS if is_diff else FORMATS
    if to_format not in formats:
        raise ValueError(f"--format={to_format} is not one of {', '.join(formats)}")
    allowed = BITS if to_format == "gguf" else FLOATS
    if dtype and dtype not in allowed:
        raise ValueError(f"--dtype={dtype} is not one of {', '.join(allowed)} ({to_format} output)")
    _check_absent(Path(target), overwrite=overwrite)


def _check_absent(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise ValueError(f"{target} is there already: pass another --to, or --overwrite")


def _diff(
    kind: str, foreign: Foreign, base: str | None, *, model: str | None
) -> tuple[Foreign, Callable[[str], None] | None]:
    """The diff or the sum, and for a diff what is to be done with the folder it was written to."""
    if not base:
        raise ValueError(f"--diff={kind} needs --base=PATH, the model that the diff is against")
    opened, exact = open_foreign(base, model=model), kind == "make_exact"
    if kind == "apply":
        result = add(opened, foreign)
        print(
            f"checksum of the sum, float32 before any --dtype: {check_result(result, foreign.path)}"
        )
        return result, None

    def record(folder: str) -> None:
        result = add(opened, open_foreign(folder), exact=exact)
        found = save_record(folder, result, target_sha256=checksum(foreign), exact=exact)
        print(f"checksum of what the diff gives, float32 before any --dtype: {found}")

    return subtract(foreign, opened, exact=exact), record


def _watched(foreign: Foreign, *, widest: str | None) -> Foreign:
    """The same, with a bar on a terminal; an error where narrowing to `widest` would lose bits."""
    total = len(foreign_shapes(foreign.table, foreign.config))
    bar = tqdm(total=total, desc="read", unit=" tensors", disable=None)

    def read(name: str) -> np.ndarray:
        x = foreign.read(name)
        if widest and jnp.promote_types(x.dtype, widest) != widest:
            raise ValueError(
                f"{foreign.path} mixes types: {name} is {x.dtype}, the first layer {widest}; say "
                "which to convert to by --dtype"
            )
        bar.update()
        if bar.n >= total:
            bar.close()
        return x

    return dataclasses.replace(foreign, read=read)


def _on_host(config: LlamaConfig) -> Params:
    sharding = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_params(config),
    )


# ---- what is written ----------------------------------------------------------------------------


def _write(model: Model, path: str, to_format: str, *, dtype: str) -> None:
    if to_format == "native":
        write_native(model, path)
    elif to_format == "hf":
        write_hf(model, path, dtype=dtype)
    elif to_format == "gguf":
        write_gguf(model, path, dtype=GGUF_NAMES.get(dtype, dtype))
    elif to_format == "meta":
        write_meta(model, path, dtype=dtype)
    else:
        write_easylm(model, path, dtype=dtype)


def write_native(model: Model, folder: str) -> None:
    """The layout that `loading.py` describes, as a run of no steps would leave it."""

    def save_text(to: str) -> None:
        if model.tokenizer:
            save_tokenizer(model.tokenizer, model.chat_template, to, model.template)

    config = {"model": dataclasses.asdict(model.config), "stop_ids": model.stop_ids}
    workdir.record_start(folder, config, argv=sys.orig_argv, save_tokenizer=save_text)
    checkpoints = Checkpointer(f"{folder}/checkpoints", keep_last=1)
    checkpoints.save(0, {"params": model.params}, {})
    checkpoints.close()


@contextlib.contextmanager
def whole_or_absent(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to; what is there when the block ends well becomes `target`, else nothing."""
    aside = target.with_name(f"{target.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(aside, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except BlockingIOError:
            raise ValueError(
                f"another process is converting to {target}: wait for it, or pass another --to"
            ) from None
        try:
            if _put_back(aside, target):
                print(f"putting back {target}, which a killed conversion was about to replace")
            for left in aside.iterdir():
                print(f"removing {left}, which a killed conversion left")
                _remove(left)
            _check_absent(target, overwrite=overwrite)
            yield aside / target.name
            _check_absent(target, overwrite=overwrite)  # it may have appeared meanwhile
            if target.exists():
                target.rename(aside / REPLACED)
            (aside / target.name).rename(target)
        finally:
            _put_back(aside, target)
            shutil.rmtree(aside)
    finally:
        os.close(descriptor)


def _put_back(aside: Path, target: Path) -> bool:
    """What was moved aside and has no successor is the target again; whether there was any."""
    if not (aside / REPLACED).exists() or target.exists():
        return False
    (aside / REPLACED).rename(target)
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_space(target: str, path: Path, needed: float) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(
            f"{target} needs about {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free on "
            "its disk: make room, or pass another --to or a smaller --dtype"
        )


# ---- what is told -------------------------------------------------------------------------------


def _size(path: Path) -> int:
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _largest_tensor(params: Params, config: LlamaConfig) -> int:
    """Of one layer, as foreign formats have them."""
    sizes = {name: leaf.nbytes for name, leaf in named_leaves(params).items()}
    return max(n // (config.num_layers if "layers/" in name else 1) for name, n in sizes.items())


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: list[str]) -> None:
    """The command line."""
    if len(argv) > 1:
        raise ValueError(f"arguments {argv[1:]} are not understood; write --from=PATH --to=PATH")
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = convert(
            flags.FLAGS["from"].value,
            flags.FLAGS.to,
            to_format=flags.FLAGS.format,
            dtype=flags.FLAGS.dtype,
            model=flags.FLAGS.model,
            tokenizer=flags.FLAGS.tokenizer,
            base=flags.FLAGS.base,
            diff=flags.FLAGS.diff,
            overwrite=flags.FLAGS.overwrite,
        )
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    print(done)


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "The model to read: a file or folder of any format.")
    flags.DEFINE_string("to", None, "The file or folder to write.")
    flags.DEFINE_enum("format", None, FORMATS, "Of the output.")
    flags.DEFINE_enum("dtype", None, list(BITS), "Of the output; by default that of the input.")
    flags.DEFINE_string("model", None, "Preset (models/presets.py) of an EasyLM stream.")
    flags.DEFINE_string("tokenizer", None, "For an input without one: a file, folder or model.")
    flags.DEFINE_string("base", None, "The model that a weight diff is against.")
    flags.DEFINE_enum("diff", None, ["make", "make_exact", "apply"], "Subtract or add --base.")
    flags.DEFINE_bool("overwrite", False, "Replace what --to names.")
    flags.mark_flags_as_required(["from", "to"])
    run_main(main)
