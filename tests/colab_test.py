"""The Colab notebook runs from top to bottom, shortened; what it shows is checked.

Its code cells are plain Python, without magics, so they run one after the other in one namespace.
That needs none of nbclient, ipykernel and the 40 packages they bring; what it leaves out is
Jupyter's own protocol.
"""

import ast
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "colab_quickstart.ipynb"
CONTENT = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
CODE = {c["id"]: "".join(c["source"]) for c in CONTENT["cells"] if c["cell_type"] == "code"}

# Runs the cells; what later cells and the tests look at is written to the file in argv[1].
DRIVER = """
import json, sys
import matplotlib
matplotlib.use("Agg")
cells, namespace = json.loads(sys.stdin.read()), {"__name__": "__main__"}
for name, source in cells.items():
    print(f"==== {name}", flush=True)
    exec(compile(source, name, "exec"), namespace)
keep = ("losses", "heldout", "bits", "scores", "STEPS", "PROMPTS")
result = {name: namespace[name] for name in keep}
result["before"], result["after"] = ([c.text for c in namespace[n]] for n in ("before", "after"))
axes = namespace["axes"]
result["curves"] = [line.get_xydata().tolist() for line in axes.get_lines()]
result["labels"] = [axes.get_xlabel(), axes.get_ylabel(), axes.get_title()]
json.dump(result, open(sys.argv[1], "w"))
"""


def test_it_is_a_clean_notebook_of_plain_python():
    assert CONTENT["nbformat"] == 4 and NOTEBOOK.stat().st_size < 20_000
    ids = [cell["id"] for cell in CONTENT["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in CONTENT["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    for source in CODE.values():
        ast.parse(source)
    for before, after in zip(CONTENT["cells"], CONTENT["cells"][1:], strict=False):
        kinds = (before["cell_type"], after["cell_type"])
        assert kinds != ("code", "code") or before["id"] == "data"  # each step is explained


def test_the_install_cell_asks_for_what_setup_offers():
    """In a process that cannot find the package, with commands that only tell what they were."""
    script = """
import importlib.util, json, subprocess, sys
calls = []
subprocess.run = lambda argv, **options: calls.append(argv)
importlib.util.find_spec = lambda name: None
exec(sys.stdin.read())
print(json.dumps(calls))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=CODE["install"], capture_output=True, text=True
    )
    clone, install = json.loads(done.stdout)
    assert clone[:2] == ["git", "clone"] and clone[-2].startswith("https://")
    folder, extras = install[-1].removesuffix("]").split("[")
    assert folder == f"./{clone[-1]}" and install[1:4] == ["-m", "pip", "install"]
    offered = (ROOT / "setup.py").read_text()
    for extra in ("cuda", "tpu", "report"):
        assert f'"{extra}":' in offered and extra in CODE["install"]
    assert extras.split(",")[0] == "report"


@pytest.mark.slow
def test_it_runs_and_shows_what_it_says(tmp_path):
    """From the second cell on, as in a session that was restarted after the install."""
    result = tmp_path / "result.json"
    environment = os.environ | {
        "COLAB_QUICKSTART_STEPS": "16",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(result)],
        input=json.dumps({name: CODE[name] for name in CODE if name != "install"}),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    got = json.loads(result.read_text())

    losses = [*got["losses"].values()]
    assert [*map(int, got["losses"])] == [*range(1, got["STEPS"] + 1)]
    assert statistics.mean(losses[-4:]) < statistics.mean(losses[:4]) - 0.2
    first, last = got["heldout"].values()
    assert last < first - 0.2 and 1.5 < got["bits"][1] < got["bits"][0] < 3.5
    curves = [[[int(step), loss] for step, loss in got[n].items()] for n in ("losses", "heldout")]
    assert got["curves"] == curves
    assert got["labels"][0] == "step" and f"{got['bits'][1]:.2f} bits per byte" in got["labels"][2]

    words = {word.strip(".,!?\"'").lower() for text in got["before"] for word in text.split()}
    assert len(words & {"the", "and", "was", "he", "she", "to", "a", "in", "it"}) >= 4
    assert got["before"] != got["after"] and all(len(t) > 60 for t in got["before"] + got["after"])
    (story, novel), (story_after, novel_after) = got["scores"]["before"], got["scores"]["after"]
    assert story > novel and novel_after > novel and story_after < story

    assert "fine-tuning" in done.stderr and f"{got['STEPS']}/{got['STEPS']}" in done.stderr
    assert done.stdout.count("held-out loss") == 2 and "Once upon a time" in done.stdout
    assert "model.safetensors" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"colab_quickstart", "result.json"}
