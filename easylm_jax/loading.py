"""A path to a model, whatever wrote it: our own checkpoints or any format of `formats/`.

What a path holds is found out from its content. `load` makes a `LanguageModel` of it, `convert.py`
another format, `train.py` the parameters a run starts from and a tokenizer. What it is not: a
reader of any format. (The file is not called `load.py`, since importing that would hide the
function `easylm_jax.load` behind the module of the same name.)

A native model is a folder as `train.py` and `convert.py` write it:

    config.json                     {"model": the fields of LlamaConfig, "stop_ids": [...], ...}
    tokenizer/                      the tokenizer's files; chat_template.jinja if there is one
    checkpoints/00001200/           parameters under "params/" (`checkpoint.py`); the newest counts

Named by that folder, by its `checkpoints`, or by one step inside.
"""

import dataclasses
import functools
import math
import os
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from easylm_jax.array_types import Params
from easylm_jax.config import from_config_dict
from easylm_jax.formats.foreign import Foreign, abstract_params, import_params
from easylm_jax.language_model import LanguageModel
from easylm_jax.mesh import BATCH_AXES, check_divides, make_mesh
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import PARAM_RULES, FloatName, LlamaConfig
from easylm_jax.models.presets import preset
from easylm_jax.preflight import check_same_model, check_vocabulary
from easylm_jax.sharding import tree_shardings
from easylm_jax.text.jinja_template import CHAT_TEMPLATE, JinjaTemplate, read_chat_template
from easylm_jax.text.template import ChatTemplate, find_template
from easylm_jax.text.tokenizer import Tokenizer, load_tokenizer
from easylm_jax.workdir import read_config

COMMIT = "commit.json"  # as in checkpoint.py, which brings 40 MB of Orbax that few models need
SOUGHT_IN_FOLDER = (
    "checkpoints/ (a run of ours), config.json with weights (Hugging Face) or params.json with "
    "consolidated.*.pth (Meta)"
)
SOUGHT_IN_FILE = "GGUF, an EasyLM stream or msgpack, or a llama2.c .bin"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model on disk in any format, nothing big read yet.

    `read(target)` gives the parameters in the layout and types of `target`. `tokenizer` and
    `chat_template` (Jinja source) are those that came with the model, as are the `stop_ids` that
    end an answer. `template` is the name that a native configuration gives.
    """

    path: str
    config: LlamaConfig
    read: Callable[[Params], Params]
    tokenizer: Callable[[], Tokenizer] | None
    chat_template: str | None
    template: str | None = None
    is_stacked: bool = False  # `target` must have its layers stacked
    stop_ids: tuple[int, ...] = ()


def load(
    path: str,
    *,
    dtype: str = "float32",
    mesh: Mesh | str | None = None,
    template: str | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
) -> LanguageModel:
    """The model at `path`, ready to generate, score and chat.

    `dtype`, of parameters and arithmetic, is float32, bfloat16 or float16. `mesh`: a Mesh or a
    string of `parse_mesh`; by default the parameters are split over all devices. `template`: how
    messages become a prompt; by default as the model says itself. `tokenizer`, anything that
    `find_tokenizer` takes, and `model`, a name of `models/presets.py`, are for what lacks them.
    """
    if dtype not in typing.get_args(FloatName):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(typing.get_args(FloatName))}")
    opened = with_tokenizer(open_model(path, model=model), tokenizer)
    config = dataclasses.replace(opened.config, dtype=dtype, param_dtype=dtype, remat="none")
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "1,-1,1,1")
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    check_divides(mesh, rows=ways, seq_len=mesh.shape["sequence"], num_kv_heads=config.num_kv_heads)
    text = opened.tokenizer() if opened.tokenizer else None
    if text:
        check_vocabulary(text, config.vocab_size)
    # For decoding every layer has arrays of its own; foreign files are read so in the first place.
    params = opened.read(
        target_params(dataclasses.replace(config, scan_layers=opened.is_stacked), mesh)
    )
    return LanguageModel(
        config=config,
        params=unstack_layers(params) if opened.is_stacked else params,
        tokenizer=text,
        template=_find_template(opened, template, text),
        mesh=mesh,
        stop_ids=opened.stop_ids,
    )


def open_model(path: str, *, model: str | None = None) -> Opened:
    """What is at `path`, native or foreign."""
    if checkpoints := find_checkpoints(path):
        return open_native(path, checkpoints)
    return of_foreign(open_foreign(path, model=model))


def with_tokenizer(opened: Opened, spec: str | None) -> Opened:
    """The same model with the tokenizer that `spec` names, and the template beside it if needed."""
    if spec is None:
        return opened
    return dataclasses.replace(
        opened,
        tokenizer=functools.partial(find_tokenizer, spec),
        chat_template=opened.chat_template or find_chat_template(spec),
    )


def of_foreign(foreign: Foreign) -> Opened:
    """The same model, seen from outside of its format."""
    return Opened(
        path=foreign.path,
        config=foreign.config,
        read=functools.partial(import_params, foreign),
        tokenizer=foreign.tokenizer,
        chat_template=foreign.chat_template,
        stop_ids=foreign.stop_ids,
    )


def target_params(config: LlamaConfig, mesh: Mesh) -> Params:
    """Shapes, types and shardings that the parameters shall have."""
    shapes = abstract_params(config)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh, PARAM_RULES),
    )


def _find_template(
    opened: Opened, name: str | None, tokenizer: Tokenizer | None
) -> ChatTemplate | None:
    """The template of that name, else the one its configuration names, else the model's own."""
    if name := name or opened.template:
        return find_template(name)
    if opened.chat_template and tokenizer:
        return JinjaTemplate(opened.chat_template, tokenizer)
    return None


# ---- foreign formats ----------------------------------------------------------------------------


def _formats() -> dict[str, tuple[Callable[[str], bool], Callable[..., Foreign]]]:
    """Name -> (is it this?, open it). Imported when needed; the surest signs stand first."""
    from easylm_jax.formats import easylm, gguf, hf, llama2c, meta

    return {
        "hf": (hf.is_hf, hf.open_hf),
        "gguf": (gguf.is_gguf, gguf.open_gguf),
        "meta": (meta.is_meta, meta.open_meta),
        "easylm": (easylm.is_easylm, easylm.open_easylm),
        "llama2c": (llama2c.is_llama2c, llama2c.open_llama2c),
    }


def find_format(path: str) -> str | None:
    """The name of the foreign format that `path` has, by its content; None if it has none."""
    return next((name for name, (is_it, _) in _formats().items() if is_it(path)), None)


def open_foreign(path: str, *, model: str | None = None) -> Foreign:
    """The model at `path`, of any foreign format; `model` names the preset of an EasyLM stream.

    Raises:
      ValueError: there is nothing, or nothing known; the sentence says what was looked for.
    """
    return _open(path, config=preset(model) if model else None)


def _open(path: str, *, config: LlamaConfig | None) -> Foreign:
    """`config` is for EasyLM streams alone: the others say what model they hold."""
    found = find_format(path)
    if found is None:
        raise ValueError(f"{path} is not a checkpoint or model: {_what_is_wrong(path)}")
    _, open_it = _formats()[found]
    return open_it(path, config) if found == "easylm" else open_it(path)


def _what_is_wrong(path: str) -> str:
    file = epath.Path(path.rpartition("::")[2])
    if not file.exists():
        return "there is no such file or folder"
    if file.is_dir():
        return f"the folder holds none of {SOUGHT_IN_FOLDER}"
    return f"the file is none of {SOUGHT_IN_FILE}"


# ---- native -------------------------------------------------------------------------------------


def find_checkpoints(path: str) -> str | None:
    """What `restore_params` should be given for `path`; None if it names nothing native."""
    place = epath.Path(path if "://" in path else os.path.abspath(path))
    if (place / COMMIT).exists():
        return str(place)
    for folder in (place / "checkpoints", place):
        if any((step / COMMIT).exists() for step in folder.glob("[0-9]*") if folder.is_dir()):
            return str(folder)
    return None


def open_native(path: str, checkpoints: str) -> Opened:
    """The run or converted model that `checkpoints`, as `find_checkpoints` found it, is part of."""
    place = epath.Path(checkpoints)
    folder = (place.parent if (place / COMMIT).exists() else place).parent
    saved = read_config(str(folder)) or {}
    if "model" not in saved:
        raise ValueError(
            f"{path} has checkpoints, but {folder}/config.json does not say of what model: expected"
            ' it to hold {"model": {...}}, as every run writes it beside its checkpoints'
        )
    config = from_config_dict(LlamaConfig, saved["model"], f"{folder}/config.json: model")
    tokenizer = folder / "tokenizer"
    return Opened(
        path=path,
        config=config,
        read=functools.partial(_restore, checkpoints),
        tokenizer=functools.partial(load_tokenizer, str(tokenizer)) if tokenizer.exists() else None,
        chat_template=read_chat_template(str(tokenizer)),
        template=saved.get("template"),
        is_stacked=config.scan_layers,
        stop_ids=tuple(saved.get("stop_ids", ())),
    )


def _restore(checkpoints: str, target: Params) -> Params:
    from easylm_jax.checkpoint import restore_params

    return restore_params(checkpoints, target)


def params_for_training(path: str, abstract_params: Params, config: LlamaConfig) -> Params:
    """The parameters at `path`, in any format, for a run that trains a model of `config`.

    A foreign model must be the one that `config` describes. One of ours may have been trained with
    other settings, such as another rope_theta: only names and shapes must agree.
    """
    if checkpoints := find_checkpoints(path):
        return _restore(checkpoints, abstract_params)
    foreign = _open(path, config=config)
    check_same_model(foreign.config, config, path)
    return import_params(foreign, abstract_params)


# ---- tokenizers ---------------------------------------------------------------------------------


def find_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names: what `load_tokenizer` takes, or any model that has one."""
    opened = _model_with_tokenizer(spec)
    if opened is None:
        return load_tokenizer(spec)
    if opened.tokenizer is None:
        raise ValueError(f"the model {spec} came without a tokenizer: name one of its own")
    return opened.tokenizer()


def find_chat_template(spec: str) -> str | None:
    """The Jinja source that lies with the tokenizer which `spec` names, if any."""
    opened = _model_with_tokenizer(spec)
    return opened.chat_template if opened else read_chat_template(spec)


def save_tokenizer(tokenizer: Tokenizer, chat_template: str | None, folder: str) -> None:
    """The folder `tokenizer/` of a native model."""
    tokenizer.save(folder)
    if chat_template:
        (epath.Path(folder) / CHAT_TEMPLATE).write_text(chat_template)


def _model_with_tokenizer(spec: str) -> Opened | None:
    if spec == "bytes" or spec.endswith((".model", ".json")):
        return None
    if checkpoints := find_checkpoints(spec):
        return open_native(spec, checkpoints)
    return of_foreign(open_foreign(spec)) if find_format(spec) else None


def file_dtype(foreign: Foreign) -> FloatName:
    """The narrowest of our types that holds every parameter as the file has it.

    Read off the first layer; half precision with float32 norms, as GGUF has it, is float32.
    """
    names = {entry.foreign.format(layer=0) for entry in foreign.table} & foreign.shapes.keys()
    return str(jnp.result_type(*(foreign.read(name).dtype for name in names)))
