"""The commands that README and docs tell people to type exist and take what they are given."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from easylm_jax.evals.jobs import plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
JOINED = re.sub(r" *\\\n *", " ", TEXT)
FOUND = re.findall(r"python -m (easylm_jax\.\w+[^\n`]*)", JOINED)
PYTHON = sorted({command.split("  #")[0].strip() for command in FOUND})
CONFIGURED = [c for c in PYTHON if "--config=" in c]


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make (\w+)`", TEXT)) | set(re.findall(r"^ {4}make (\w+)", TEXT, re.M))
    assert named and named <= targets


@pytest.mark.parametrize("command", PYTHON)
def test_every_module_that_is_named_exists(command):
    assert importlib.util.find_spec(command.split()[0])


@pytest.mark.parametrize("command", CONFIGURED)
def test_every_setting_that_is_shown_is_taken(command):
    """Parses the flags as the entry point would, and builds its config."""
    module, *args = shlex.split(command)
    name = module.split(".")[1]
    where, name = {
        "prepare": (module, "PrepareConfig"),
        "train": (module, "TrainConfig"),
        "plan": (module, "TrainConfig"),
        "inspect_data": ("easylm_jax.train", "TrainConfig"),
    }[name]
    script = f"""
import sys
sys.argv = ["x"] + {args!r}
from absl import flags
from ml_collections import config_flags
from easylm_jax.config import from_config_dict
from {where} import {name}
from easylm_jax.prepare_chat import ChatPrepareConfig
config_flags.DEFINE_config_file("config")
flags.DEFINE_string("workdir", None, "")
flags.DEFINE_string("out", None, "")
flags.DEFINE_string("html", None, "")
flags.FLAGS(sys.argv, known_only="plan" in {module!r})
config = flags.FLAGS.config
print(from_config_dict(ChatPrepareConfig if "datasets" in config else {name}, config))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_file_that_is_linked_exists():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("command", [c for c in PYTHON if c not in CONFIGURED])
def test_every_flag_that_is_shown_is_defined(command):
    module, *args = command.split()
    if module == "easylm_jax.lm_eval_adapter":
        pytest.skip("its flags are those of lm-eval")
    source = Path(importlib.util.find_spec(module).origin).read_text()
    if module == "easylm_jax.bench":
        source += "".join(file.read_text() for file in (ROOT / "easylm_jax").glob("bench_*.py"))
    defined = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source))
    defined |= set(re.findall(r"\"--(\w+)\"", source))  # argparse
    shown = {arg[2:].split("=")[0].split(".")[0] for arg in args if arg.startswith("--")}
    assert shown <= defined | {"config"}
    if module == "easylm_jax.evaluate":
        tasks = [arg.split("=")[1] for arg in args if arg.startswith("--tasks=")]
        assert not tasks or plan(tasks[0].split(","))
