"""The command `plan`: what it prints, what its JSON has, and one sentence for what is wrong."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from easylm_jax import plan
from easylm_jax.config import from_config_dict
from easylm_jax.mesh import parse_mesh
from easylm_jax.models.lora import LoraConfig
from easylm_jax.planner import memory
from easylm_jax.planner.topology import parse_topology
from easylm_jax.train import TrainConfig

ROOT = Path(__file__).parents[1]


def load(name, argument=None):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"configs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    return from_config_dict(TrainConfig, config), module


def show(capsys, case, topology, *, searches=False, as_one_line=False):
    options = dict(searches=searches, compiles=False, as_one_line=as_one_line)
    plan.show(case, parse_topology(topology), **options)
    return capsys.readouterr().out


def test_the_command_for_a_described_slice_prints_one_line_and_nothing_else():
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -e .[plan]")
    arguments = ["--config=configs/debug.py", "--config.batch_size=8", "--topology=v5e:2x2"]
    done = subprocess.run(
        [sys.executable, "-m", "easylm_jax.plan", *arguments, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    promised = "fits peak_bytes_per_chip hbm_bytes_per_chip parts flops_per_step collectives "
    promised += "est_step_s est_tokens_per_s_per_chip est_mfu compile_s"
    assert set(promised.split()) <= set(report)
    assert report["fits"] and report["hbm_bytes_per_chip"] == 15.75 * 2**30
    assert report["num_chips"] == 4 and 0 < report["est_mfu"] < 1
    sizes = report["compiled"]
    parts = sizes["arguments"] + sizes["temporaries"] + sizes["program_bytes"]
    assert report["peak_bytes_per_chip"] == parts + sizes["outputs"] - sizes["aliased"]
    assert sum(c["sent_bytes"] for c in report["collectives"]) > 0


def test_text_names_the_parts_and_says_what_is_estimated(capsys):
    case = plan.case_of(load("debug")[0])
    text = show(capsys, case, "a100:8")
    assert "a100:8: 8 chips, mesh replica 1 x fsdp 8 x sequence 1 x tensor 1" in text
    for part in ("parameters", "optimiser", "activations saved", "gradients", "temporaries"):
        assert f"\n{part} " in text
    assert "fits: " in text and "estimated, not measured" in text and "MFU" in text


def test_the_search_names_settings_that_can_be_pasted(capsys):
    case = plan.case_of(load("llama_pretrain", "7b")[0])
    text = show(capsys, case, "v5e:16x16", searches=True)
    pasted = dict(s.removeprefix("--config.").split("=", 1) for s in text.splitlines()[-1].split())
    model = dataclasses.replace(case.model, remat=pasted.pop("model.remat"))
    micro_batches = int(pasted.pop("micro_batches"))
    again = dataclasses.replace(case, model=model, micro_batches=micro_batches, **pasted)
    report = json.loads(show(capsys, again, "v5e:16x16", as_one_line=True))
    best = json.loads(show(capsys, case, "v5e:16x16", searches=True, as_one_line=True))
    assert report["fits"] and report["est_step_s"] == best["est_step_s"]
    steps = [candidate["est_step_s"] for candidate in best["candidates"]]
    assert steps == sorted(steps) and len(steps) == 3
    full = dataclasses.replace(again, model=dataclasses.replace(model, remat="full"))
    slower = json.loads(show(capsys, full, "v5e:16x16", as_one_line=True))
    assert slower["fits"] and slower["est_step_s"] > 1.1 * best["est_step_s"]


def test_what_does_not_fit_is_printed_and_told_what_would(capsys):
    case = plan.case_of(load("llama_pretrain", "65b")[0])
    case = dataclasses.replace(case, batch_size=128)
    with pytest.raises(
        ValueError, match=r"not fit into 15.75 GiB per chip of v5e:8x16.* the least is"
    ) as error:
        show(capsys, case, "v5e:8x16")
    assert "does not fit: " in capsys.readouterr().out and "\n" not in str(error.value)


def test_on_a_cpu_the_estimate_is_that_of_a_cpu():
    case = plan.case_of(load("debug")[0])
    made = plan.make_plan(case, parse_topology("cpu:8"), compiles=False)
    sizes = parse_mesh(case.mesh, 8)
    assert made.parts == memory.estimate(case, sizes, on_cpu=True) != memory.estimate(case, sizes)


def test_what_cannot_be_planned_gets_one_sentence(capsys):
    cfg, _ = load("debug")
    with pytest.raises(ValueError, match="not of adapters"):
        plan.case_of(dataclasses.replace(cfg, lora=LoraConfig(), init_from="x"))
    with pytest.raises(ValueError, match="nothing is known of that of cpu:8"):
        show(capsys, plan.case_of(cfg), "cpu:8", searches=True)
    with pytest.raises(ValueError, match="needs a multiple of 3 devices"):
        case = dataclasses.replace(plan.case_of(cfg), mesh="1,1,3,-1")
        show(capsys, case, "cpu:8")


# ---- configs/llama_pod.py ------------------------------------------------------------------------


_, PODS = load("llama_pod")


@pytest.mark.parametrize("name", PODS.PODS)
def test_a_pod_config_divides_its_topology_and_is_on_record_as_fitting(name):
    cfg, pods = load("llama_pod", name)
    topology = parse_topology(pods.PODS[name].topology)
    made = plan.make_plan(plan.case_of(cfg), topology, compiles=False)
    assert cfg.batch_size * cfg.seq_len == 4 * 2**20
    record = json.loads((ROOT / f"experiments/pod_plans/{name}.json").read_text())
    assert record["fits"] and record["peak_bytes_per_chip"] < record["hbm_bytes_per_chip"]
    settings = plan.as_json(made)
    for key in ("topology", "mesh", "remat", "attention", "batch_size", "micro_batches"):
        assert record[key] == settings[key], f"{key}: run `make plans`"


def test_a_pod_that_no_longer_fits_or_moved_is_reported():
    spec = importlib.util.spec_from_file_location("r", ROOT / "experiments/pod_plans/run.py")
    proofs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(proofs)
    sent = [dict(sent_bytes=600), dict(sent_bytes=400)]
    old = dict(fits=True, peak_bytes_per_chip=100, hbm_bytes_per_chip=150, collectives=sent)
    old |= dict(stack={"jax": "1"})
    assert proofs.complaints(old | dict(peak_bytes_per_chip=102), old) == []
    (more,) = proofs.complaints(old | dict(peak_bytes_per_chip=105), old)
    assert "peak_bytes_per_chip moved by +5.0%, from 100 to 105" in more
    (less,) = proofs.complaints(old | dict(collectives=sent[:1]), old)
    assert "bytes sent moved by -40.0%" in less
    assert proofs.complaints(old | dict(collectives=[], stack={"jax": "2"}), old) == []
    assert "does not fit" in proofs.complaints(old | dict(fits=False, stack={"jax": "2"}), old)[0]
