"""Dataclass to ConfigDict and back, what the errors name, and that all of configs/ builds."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Literal

import pytest
from ml_collections import ConfigDict

from easylm_jax.config import as_config_dict, from_config_dict
from easylm_jax.models.presets import PRESETS
from easylm_jax.optim import parse_duration
from easylm_jax.prepare import PrepareConfig
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

ARGUMENTS = {"llama_pretrain": ["7b", "13b", "33b", "65b", *sorted(PRESETS)]}
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
    name, *args = case.split(":")
    path = CONFIGS / name
    module = load(path)
    schema = PrepareConfig if path.parent.name == "data" else TrainConfig
    config = module.get_config(*args)
    section = from_config_dict(schema, config)
    assert as_config_dict(section).to_dict() == config.to_dict()
    command = f"python -m easylm_jax.{'prepare' if schema is PrepareConfig else 'train'}"
    for word in (command, "Purpose:", "Hardware:", str(path.relative_to(CONFIGS.parent))):
        assert word in module.__doc__
    if schema is TrainConfig:
        tokens = section.batch_size * section.seq_len
        steps = parse_duration(section.duration, tokens_per_step=tokens)
        warmup = parse_duration(section.optim.warmup, tokens_per_step=tokens, total_steps=steps)
        assert 0 < warmup < steps
        assert section.seq_len <= section.model.max_seq_len
        assert section.batch_size % section.micro_batches == 0


def test_llama_pretrain_is_table_2_of_the_paper():
    get_config = load(CONFIGS / "llama_pretrain.py").get_config
    for size, lr, duration in (("7b", 3e-4, "1T"), ("13b", 3e-4, "1T"), ("65b", 1.5e-4, "1.4T")):
        config = get_config(size)
        assert (config.optim.lr, config.duration) == (lr, f"{duration} tokens")
        assert config.batch_size * config.seq_len == 4 * 2**20
    with pytest.raises(ValueError, match="unknown model 'llama_8b'"):
        get_config("8b")
