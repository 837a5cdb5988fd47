"""A path to a model, whatever wrote it: our own checkpoints or any format of `formats/`.

What a path holds is found out from its content. `load` makes a `LanguageModel` of it, `convert.py`
another format, `train.py` the parameters a run starts from and a tokenizer. What it is not: a
reader of any format. (The file is not called `load.py`, since importing that would hide the
function `easylm_jax.load` behind the module of the same name.)

A native model is a folder as `train.py` and `convert.py` write it:

    config.json                     {"model": the fields of LlamaConfig, "stop_ids": [...], ...}
    tokenizer/                      the tokenizer's files; chat_template.jinja if there is one;
                                    template.json, the template that a run trained with
    checkpoints/00001200/           parameters under "params/" (`checkpoint.py`); the newest counts

Named by that folder, by its `checkpoints`, or by one step inside.
"""

import dataclasses
import functools
import json
import math
import os
import typing
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from easylm_jax.array_types import Params
from easylm_jax.config import from_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.formats.foreign import Foreign, abstract_params, import_params
from easylm_jax.language_model import LanguageModel
from easylm_jax.mesh import BATCH_AXES, check_divides, make_mesh
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.decoding import unstack_layers
from easylm_jax.models.llama import PARAM_RULES, FloatName, LlamaConfig
from easylm_jax.models.lora import LoraConfig, init_adapters, merge
from easylm_jax.models.presets import preset
from easylm_jax.models.quantized import quantize_base
from easylm_jax.preflight import check_same_model, check_vocabulary
from easylm_jax.sharding import tree_shardings
from easylm_jax.text.jinja_template import CHAT_TEMPLATE, JinjaTemplate, read_chat_template
from easylm_jax.text.template import (
    ChatTemplate,
    Template,
    find_template,
    template_to_json,
    with_markers,
)
from easylm_jax.text.tokenizer import Tokenizer, load_tokenizer
from easylm_jax.tree import map_named, named_leaves
from easylm_jax.workdir import read_config

TEMPLATE = "template.json"
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
    end an answer. `template` is the one that a native model was fine-tuned with.
    """

    path: str
    config: LlamaConfig
    read: Callable[[Params], Params]
    tokenizer: Callable[[], Tokenizer] | None
    chat_template: str | None
    template: ChatTemplate | None = None
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
    # The kernel it was trained with need not be one of this machine.
    attention = AttentionConfig(sliding_window=opened.config.attention.sliding_window)
    config = dataclasses.replace(
        opened.config, dtype=dtype, param_dtype=dtype, remat="none", attention=attention
    )
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh or "1,-1,1,1")
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    whole = dict(rows=ways, seq_len=mesh.shape["sequence"], num_kv_heads=config.num_kv_heads)
    check_divides(mesh.shape, **whole)
    text = opened.tokenizer() if opened.tokenizer else None
    if text:
        check_vocabulary(text, config.vocab_size)
    # For decoding every layer has arrays of its own; foreign files are read so in the first place.
    params = opened.read(
        target_params(dataclasses.replace(config, scan_layers=opened.is_stacked), mesh)
    )
    return LanguageModel(
        config=dataclasses.replace(config, scan_layers=False),
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
    return _placed(shapes, tree_shardings(shapes, mesh, PARAM_RULES))


def _placed(shapes: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def _find_template(
    opened: Opened, name: str | None, tokenizer: Tokenizer | None
) -> ChatTemplate | None:
    """The template of that name, else the one it was fine-tuned with, else its tokenizer's."""
    if name:
        return find_template(name)
    if opened.template:
        return opened.template
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
    read = functools.partial(_restore, checkpoints)
    if saved.get("lora"):
        lora = from_config_dict(LoraConfig, saved["lora"], f"{folder}/config.json: lora")
        read = functools.partial(_restore_merged, checkpoints, saved["init_from"], config, lora)
    return Opened(
        path=path,
        config=config,
        read=read,
        tokenizer=functools.partial(load_tokenizer, str(tokenizer)) if tokenizer.exists() else None,
        chat_template=read_chat_template(str(tokenizer)),
        template=find_template(str(tokenizer / TEMPLATE))
        if (tokenizer / TEMPLATE).exists()
        else None,
        is_stacked=config.scan_layers,
        stop_ids=tuple(saved.get("stop_ids", ())),
    )


def _restore(checkpoints: str, target: Params) -> Params:
    from easylm_jax.checkpoint import restore_params

    return restore_params(checkpoints, target)


def _restore_merged(
    checkpoints: str, base: str, config: LlamaConfig, lora: LoraConfig, target: Params
) -> Params:
    """The parameters of `base` with the adapters of a run merged into them, leaf by leaf.

    The base is read in the run's own type, which decides what it is rounded to when quantised.
    """
    trained_beside = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, config.param_dtype, sharding=x.sharding), target
    )
    try:
        read = _reader(base, trained_beside, config)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{checkpoints} holds adapters of the model {base}, which cannot be read ({error}): "
            'put it there, or change "init_from" in the config.json beside the checkpoints'
        ) from None
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), target)
    shapes = jax.eval_shape(functools.partial(init_adapters, plain, lora), jax.random.key(0))
    where = jax.tree.leaves(target)[0].sharding
    if isinstance(where, NamedSharding):
        shardings = tree_shardings(shapes, where.mesh, PARAM_RULES)
    else:  # one device, as `convert.py` asks for
        shardings = jax.tree.map(lambda _: where, shapes)
    adapters = _restore(checkpoints, _placed(shapes, shardings))
    dtype, merged = jax.tree.leaves(target)[0].dtype, {}
    for part in _parts(trained_beside):
        places = jax.tree.map(lambda x: x.sharding, part)
        new = jax.device_put(merge(read(part), adapters, lora, dtype), places)
        merged |= named_leaves(jax.block_until_ready(new))  # so that this part of the base is freed
    return unflatten_dict(merged, sep="/")


def frozen_base(path: str, config: LlamaConfig, lora: LoraConfig, mesh: Mesh) -> Params:
    """The parameters at `path` that adapters are trained beside, quantised if `lora` says so.

    Then a foreign model is read layer by layer, and beside what is finished no more is held than a
    layer, or the codes of one kernel of all layers. One of ours comes whole first.
    """
    if lora.base == "full":
        return params_for_training(path, target_params(config, mesh), config)
    is_ours = find_checkpoints(path) is not None
    one_layer = config if is_ours else dataclasses.replace(config, scan_layers=False)
    target = target_params(one_layer, mesh)
    read, quantized = _reader(path, target, config), {}
    for part in _parts(target):
        shapes = jax.eval_shape(functools.partial(quantize_base, how=lora.base), part)
        shardings = tree_shardings(shapes, mesh, PARAM_RULES)
        new = quantize_base(read(part), lora.base, shardings)
        quantized |= named_leaves(jax.block_until_ready(new))  # so that the part read is freed
    if config.scan_layers and not is_ours:
        quantized = _stack_layers(quantized, config.num_layers, mesh)
    return unflatten_dict(quantized, sep="/")


def _stack_layers(
    leaves: dict[str, jax.Array], num_layers: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """`leaves`, which it uses up, with those of all layers as one."""
    first = [name for name in leaves if name.startswith("layers_0/")]
    for name in first:
        rest = name.removeprefix("layers_0/")
        layers = [leaves.pop(f"layers_{i}/{rest}") for i in range(num_layers)]
        stacked = jax.eval_shape(jnp.stack, layers)
        place = tree_shardings({f"layers/{rest}": stacked}, mesh, PARAM_RULES)
        leaves[f"layers/{rest}"] = jax.jit(jnp.stack, out_shardings=place[f"layers/{rest}"])(layers)
        jax.block_until_ready(leaves[f"layers/{rest}"])
    return leaves


def _parts(target: Params) -> Iterator[Params]:
    """`target` in pieces: a layer each, or a parameter of all layers where they are stacked."""
    for key, tree in target.items():
        if key != "layers":
            yield {key: tree}
            continue
        for name, leaf in named_leaves({key: tree}).items():
            yield unflatten_dict({name: leaf}, sep="/")


def _reader(path: str, target: Params, config: LlamaConfig) -> Callable[[Params], Params]:
    """`read(part)`, to be called once for each of the `_parts` of `target`.

    A foreign model is read as it is asked for. One of ours is read here, and handed out.
    """
    if find_checkpoints(path):
        whole = named_leaves(params_for_training(path, target, config))
        return functools.partial(map_named, lambda name, _: whole.pop(name))
    foreign = _open(path, config=config)
    check_same_model(foreign.config, config, path)
    return functools.partial(import_params, foreign)


def params_for_training(path: str, abstract_params: Params, config: LlamaConfig) -> Params:
    """The parameters at `path`, in any format, for a run that trains a model of `config`.

    A foreign model must be the one that `config` describes. One of ours may have been trained with
    other settings, such as another rope_theta: only names and shapes must agree. Adapters that it
    trained are merged into its parameters.
    """
    if checkpoints := find_checkpoints(path):
        return open_native(path, checkpoints).read(abstract_params)
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


def save_tokenizer(
    tokenizer: Tokenizer,
    chat_template: str | None,
    folder: str,
    template: ChatTemplate | None = None,
) -> None:
    """The folder `tokenizer/` of a native model; `template` is what it was trained with, if any."""
    tokenizer.save(folder)
    if chat_template:
        (epath.Path(folder) / CHAT_TEMPLATE).write_text(chat_template)
    if isinstance(template, Template):
        text = json.dumps(template_to_json(template), indent=2, ensure_ascii=False)
        (epath.Path(folder) / TEMPLATE).write_text(text)


def training_template(
    chat: ChatConfig | None, spec: str, tokenizer: Tokenizer
) -> ChatTemplate | None:
    """The template of a run that trains on conversations, its markers as `chat` says.

    "tokenizer" is the Jinja template that lies with the tokenizer which `spec` names.
    """
    if chat is None:
        return None
    if chat.template == "tokenizer":
        if not (source := find_chat_template(spec)):
            raise ValueError(
                f"data.chat.template is 'tokenizer', but no chat template lies with {spec}: name "
                "one of text/template.py"
            )
        template: ChatTemplate = JinjaTemplate(source, tokenizer)
    else:
        template = find_template(chat.template)
    if not chat.markers:
        return template
    if not isinstance(template, Template):
        raise ValueError("data.chat.markers: a Jinja template has no place for markers")
    return with_markers(template, chat.markers)


def trained_template(path: str) -> tuple[str, str] | None:
    """Name and hash of the template that the native model at `path` was fine-tuned with, if any."""
    checkpoints = find_checkpoints(path)
    template = open_native(path, checkpoints).template if checkpoints else None
    return (template.name, template.hash) if template else None


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
