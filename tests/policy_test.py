"""The house rules that a machine can check: who imports whom, and what no file may import."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "easylm_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Layer 0, then units of layer 1 that never import one another, then layer 2, then the entry points.
LAYER_0 = {"array_types", "batch", "chips", "dots", "mesh", "processes", "sharding", "tree"}
LAYER_1 = {"models", "text", "data", "formats", "objectives", "metrics", "progress"}
LAYER_1 |= {"optim", "optim_state"}
LAYER_2 = {"train_state", "step", "checkpoint", "sampler", "scoring", "language_model", "evals"}
LAYER_2 |= {"planner"}
ALLOWED_BESIDE = {  # data and formats make use of tokenizers; formats speak of our model
    ("data", "text"),
    ("formats", "models"),
    ("formats", "text"),
    ("optim", "optim_state"),
}
# The call graph inside layer 2 is a chain: evals may use the sampler, the step the state.
INSIDE_LAYER_2 = {
    ("step", "train_state"),
    ("planner", "step"),
    ("planner", "train_state"),
    ("scoring", "sampler"),
    ("language_model", "sampler"),
    ("language_model", "scoring"),
    ("evals", "language_model"),
    ("evals", "scoring"),
    ("evals", "sampler"),
}
NEVER = {"tensorflow", "torch", "transformers"}
ENTRY_ONLY = {"ml_collections", "absl"}


def unit_of(path: Path) -> str:
    """`models/llama.py` belongs to the unit `models`, `step.py` to `step`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layer_of(unit: str) -> int:
    for layer, units in enumerate((LAYER_0, LAYER_1, LAYER_2)):
        if unit in units:
            return layer
    return 3


def imported_names(source: str) -> set[str]:
    """Every dotted module name that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def complaints(unit: str, source: str) -> list[str]:
    """Which rules a file of `unit` breaks."""
    found = []
    for name in imported_names(source):
        top, *rest = name.split(".")
        if top in NEVER:
            found.append(f"imports {top}")
        if top in ENTRY_ONLY and layer_of(unit) < 3:
            found.append(f"imports {top} below the entry points")
        if top != "easylm_jax" or not rest or rest[0] == unit:
            continue
        other, mine, theirs = rest[0], layer_of(unit), layer_of(rest[0])
        pair = (unit, other)
        beside = (mine == theirs == 1 and pair not in ALLOWED_BESIDE) or (
            mine == theirs == 2 and pair not in INSIDE_LAYER_2
        )
        if theirs > mine or beside:
            found.append(f"layer {mine} unit {unit} imports layer {theirs} unit {other}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    assert complaints(unit_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "unit, source",
    [
        ("models", "from easylm_jax.optim import OptimConfig"),
        ("models", "import easylm_jax.step"),
        ("mesh", "from easylm_jax import models"),
        ("step", "from easylm_jax.train import train"),
        ("step", "from easylm_jax.checkpoint import Checkpointer"),
        ("data", "def f():\n    import torch"),
        ("optim", "from ml_collections import ConfigDict"),
    ],
)
def test_the_rules_bite(unit, source):
    assert complaints(unit, source)


def test_nothing_imports_experiments_or_tests():
    for path in FILES:
        names = {name.split(".")[0] for name in imported_names(path.read_text())}
        assert not names & {"experiments", "tests", "configs"}, path


def test_there_is_no_attic():
    assert not [p for p in ROOT.rglob("utils.py") if ".venv" not in p.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_setting_hides_behind_a_default():
    pattern = re.compile(r"\b(config|cfg)\.get\(")
    for path in [*FILES, *(ROOT / "configs").rglob("*.py")]:
        assert not pattern.search(path.read_text()), path
