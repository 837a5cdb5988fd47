"""The commands that README and docs tell people to type exist and take what they are given."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
