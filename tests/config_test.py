"""Dataclass to ConfigDict and back, what the errors name, and that all of configs/ builds."""

import dataclasses
import functools
import importlib.util
import re
from operator import getitem
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict

from easylm_jax.config import as_config_dict, from_config_dict
from easylm_jax.data.readers import find_reader
from easylm_jax.launch import Pod
from easylm_jax.models.presets import PRESETS
from easylm_jax.optim import make_schedule, parse_duration
from easylm_jax.prepare import PrepareConfig
from easylm_jax.prepare_chat import ChatPrepareConfig
from easylm_jax.text.template import find_template
from easylm_jax.train import TrainConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    ends: tuple[float, float] = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Outer:
    size: int
    inner: Inner = Inner()
    maybe: Inner | None = None
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


FULL = Outer(
    size=3,
    inner=Inner(0.25, (2.0, 3.0)),
    maybe=Inner(0.75),
    limit=7,
    kind="b",
    weights={"x": 1.0, "y": 0.5},
    files={"x": ("p", "q")},
)


@pytest.mark.parametrize("section", [Outer(size=1), FULL], ids=["defaults", "everything set"])
def test_there_and_back_is_the_same(section):
    config = as_config_dict(section)
    assert isinstance(config, ConfigDict) and config.is_locked
    assert from_config_dict(Outer, config) == section
    assert from_config_dict(Outer, config.to_dict()) == section


def test_leaves_can_be_overridden_also_those_that_were_none():
    config = as_config_dict(FULL)
    config.inner.rate, config.weights.y, config.limit = 0.125, 4.0, None
    got = from_config_dict(Outer, config)
    expected = dataclasses.replace(FULL, inner=Inner(0.125, (2.0, 3.0)), limit=None)
    assert got == dataclasses.replace(expected, weights={"x": 1.0, "y": 4.0})
    config = as_config_dict(Outer(size=1))
    config.limit = 5
    assert from_config_dict(Outer, config).limit == 5
    with pytest.raises((AttributeError, KeyError), match="lmit"):
        config.lmit = 5


def test_lists_and_whole_numbers_become_what_the_field_states():
    got = from_config_dict(Outer, {"size": 1, "inner": {"rate": 2, "ends": [1.0, 2.0]}})
    assert got.inner == Inner(2.0, (1.0, 2.0)) and isinstance(got.inner.rate, float)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"size": 1, "limt": 2}, "config.limt is not a known setting; near it: limit"),
        ({"size": 1, "inner": {"rat": 2.0}}, "config.inner.rat is not a known .* near it: rate"),
        ({"inner": {}}, "config lacks size, needed to make a Outer"),
        ({"size": "many"}, "config.size = 'many' is not of type int"),
        ({"size": 1, "weights": {"x": "much"}}, "config.weights.x = 'much' is not of type float"),
        ({"size": 1, "kind": "c"}, "config.kind = 'c' is not one of 'a', 'b'"),
    ],
)
def test_errors_name_the_key_and_the_near_ones(config, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(Outer, config)


# ---- configs/ ----------------------------------------------------------------------------------

ARGUMENTS = {
    "llama_pretrain": ["7b", "13b", "33b", "65b", *sorted(PRESETS)],
    "alpaca": ["7b", "13b"],
    "vicuna": ["7b", "13b"],
    "koala_sft": [f"{mix}{s}" for mix in ("distill", "all", "conditional") for s in ("", ":7b")],
    "lima": ["7b", "13b", "33b", "65b"],
    "llama2_sft": ["7b", "13b", "70b"],
    "gpt4all": ["7b"],
    "llama_pod": ["7b_v5e_256", "65b_v5p_2048", "llama2_7b_64k_v5p_256"],
    "orca": ["chatgpt", "gpt4"],
    "baize_lora": ["7b", "13b", "33b"],
    "guanaco_qlora": ["7b", "13b", "33b", "65b"],
    "false_promise": ["7b:0.3M", "7b:65M", "7b:66M", "7b:150M", "13b"],
}
FILES = sorted(CONFIGS.rglob("*.py"))
CASES = [
    f"{path.relative_to(CONFIGS)}:{arg}" for path in FILES for arg in ARGUMENTS.get(path.stem, ())
]
CASES += [str(path.relative_to(CONFIGS)) for path in FILES]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", CASES)
def test_every_config_builds_and_becomes_its_dataclass(case):
    name, *args = case.split(":", 1)
    path = CONFIGS / name
    module = load(path)
    config = module.get_config(*args)
    schema, command = TrainConfig, "train"
    if path.parent.name == "data":
        schema, command = ChatPrepareConfig if "datasets" in config else PrepareConfig, "prepare"
    if path.parent.name == "launch":
        schema, command = Pod, "launch"
    section = from_config_dict(schema, config)
    assert as_config_dict(section).to_dict() == config.to_dict()
    command = f"python -m easylm_jax.{command}"
    for word in (command, "Purpose:", "Hardware:", str(path.relative_to(CONFIGS.parent))):
        assert word in module.__doc__
    if schema is TrainConfig:
        units = dict(tokens_per_step=section.batch_size * section.seq_len)
        steps = parse_duration(section.duration, **units, tokens_per_epoch=2**30)
        warmup = parse_duration(section.optim.warmup, **units, total_steps=steps)
        assert warmup < steps
        assert section.seq_len <= section.model.max_seq_len
        assert section.batch_size % section.micro_batches == 0


RECIPES = sorted(ARGUMENTS.keys() - {"llama_pretrain", "llama_pod"})


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from_and_its_commands_exist(name):
    module = load(CONFIGS / f"{name}.py")
    config, text = module.get_config(), module.__doc__
    for word in ("Source:", "Data:", "Result:", "--config.init_from=PATH/"):
        assert word in text
    assert re.search(r"arXiv:\d{4}\.\d{5}\b", text)
    assert set(re.findall(rf"configs/{name}\.py:(\S+)", text)) <= {*ARGUMENTS[name]}
    train_flags = re.sub(r"python -m easylm_jax.prepare(.*\\\n)*.*", "", text)
    for flag in re.findall(r"--config\.([\w.]+)=", train_flags):
        *sections, leaf = flag.split(".")
        assert leaf in functools.reduce(getitem, sections, config), flag
    assert "--config.data.files=" in text or all(f.startswith("runs/") for f in config.data.files)
    assert find_reader(config.data.chat.reader) and find_template(config.data.chat.template)


# From the papers' tables and the authors' commands: batch, tokens per row, peak rate, the last.
@pytest.mark.parametrize(
    "case, expected",
    [
        ("alpaca:13b", (128, 512, 1e-5, 0, "5 epochs")),
        ("vicuna:7b", (128, 2048, 2e-5, 0, "3 epochs")),
        ("lima:65b", (32, 2048, 1e-5, 1e-6, "15 epochs")),
        ("lima:7b", (64, 2048, 1e-5, 1e-6, "15 epochs")),
        ("gpt4all:7b", (32, 1024, 5e-5, 0, "4 epochs")),
        ("baize_lora:33b", (64, 512, 5e-5, 0, "1 epoch")),
        ("guanaco_qlora:13b", (16, 512, 2e-4, 2e-4, "1875 steps")),
        ("guanaco_qlora:65b", (16, 512, 1e-4, 1e-4, "1875 steps")),
    ],
)
def test_recipes_are_those_that_were_published(case, expected):
    name, argument = case.split(":")
    cfg = from_config_dict(TrainConfig, load(CONFIGS / f"{name}.py").get_config(argument))
    schedule = make_schedule(cfg.optim, total_steps=1000, tokens_per_step=1)
    got = (cfg.batch_size, cfg.seq_len, cfg.optim.lr, float(schedule(1000)), cfg.duration)
    assert got[:4] == pytest.approx(expected[:4], rel=1e-6, abs=1e-12) and got[4] == expected[4]


def test_imitation_warms_up_for_1000_steps_where_there_are_as_many():
    get_config = load(CONFIGS / "false_promise.py").get_config
    assert [get_config(f"7b:{n}").optim.warmup for n in ("65M", "66M")] == ["10%", "1000 steps"]


def test_a_recipe_takes_the_tokenizer_of_its_model_unless_one_is_named():
    config = load(CONFIGS / "alpaca.py").get_config()
    config.init_from = "model"
    assert from_config_dict(TrainConfig, config).tokenizer == "model"
    config.tokenizer = "other"
    section = from_config_dict(TrainConfig, config)
    assert (section.tokenizer, section.init_from) == ("other", "model")


@pytest.mark.parametrize("name", ["alpaca", "koala_sft", "orca", "baize_lora", "guanaco_qlora"])
def test_a_recipe_names_the_arguments_it_knows(name):
    with pytest.raises(ValueError, match=f"'8b' is not one of .*{ARGUMENTS[name][0]}"):
        load(CONFIGS / f"{name}.py").get_config("8b")


def test_llama_pretrain_is_table_2_of_the_paper():
    get_config = load(CONFIGS / "llama_pretrain.py").get_config
    for size, lr, duration in (("7b", 3e-4, "1T"), ("13b", 3e-4, "1T"), ("65b", 1.5e-4, "1.4T")):
        config = get_config(size)
        assert (config.optim.lr, config.duration) == (lr, f"{duration} tokens")
        assert config.batch_size * config.seq_len == 4 * 2**20
    with pytest.raises(ValueError, match="unknown model 'llama_8b'"):
        get_config("8b")
