"""The benchmark's bookkeeping: what is run, what is counted, how a profile is divided."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from easylm_jax import bench, bench_train
from easylm_jax.bench_peak import forward_products
from easylm_jax.bench_profile import (
    ATTENTION,
    ELEMENTWISE,
    LOSS,
    OPTIMISER,
    OTHER,
    PRODUCTS,
    kinds_of_instructions,
    self_times,
)
from easylm_jax.bench_train import WORKS, Work
from easylm_jax.metrics import flops_per_token
from easylm_jax.models.llama import num_params
from easylm_jax.models.presets import preset

HLO = """
HloModule jit_train_step

%fused_a (p: bf16[8,8], q: bf16[8,8]) -> f32[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %q), metadata={op_name="jit(f)/jvp(Llama)/layers/mlp/up/dot"}
}

%fused_b (p.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} multiply(%p.1, %p.1), metadata={op_name="jit(f)/jvp(Llama)/layers/norm/mul"}
  %x.2 = f32[8]{0} multiply(%x.1, %p.1), metadata={op_name="jit(f)/jvp(Llama)/layers/norm/mul"}
  ROOT %x.3 = f32[8]{0} convert(%x.2), metadata={op_name="jit(f)/div"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %fusion.1 = f32[8,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_a
  %fusion.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_b
  %q.1 = f32[8]{0} custom-call(%a), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/transpose(jvp(Llama))/layers/attention/q/dot"}
  %s.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp(Llama)/layers/attention/while/body/dot"}
  %l.1 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp(loss)/while/body/dot"}
  %o.1 = f32[8]{0} add(%a, %b), metadata={op_name="jit(f)/add"}
  ROOT %copy.1 = f32[8]{0} copy(%a)
}
"""  # noqa: E501


def test_instructions_belong_to_the_part_of_the_model_that_jax_named():
    kinds = kinds_of_instructions(HLO)
    expected = {
        "fusion.1": PRODUCTS,
        "fusion.2": ELEMENTWISE,
        "q.1": PRODUCTS,
        "s.1": ATTENTION,
        "l.1": LOSS,
        "o.1": OPTIMISER,
        "copy.1": OTHER,
    }
    assert {name: kinds[name] for name in expected} == expected


def test_self_times_of_nested_events_add_up_to_the_outermost():
    rng = np.random.default_rng(0)
    expected: dict[str, int] = {}
    events = []

    def nest(start: int, end: int, depth: int) -> None:
        """Cuts [start, end] at random; all but the last two pieces are events of their own."""
        name = f"op{rng.integers(5)}"
        events.append((start, end - start, name))
        expected[name] = expected.get(name, 0) + end - start
        if depth:
            cuts = [start, *sorted(map(int, rng.integers(start, end, 5))), end]
            for a, b in list(zip(cuts, cuts[1:], strict=False))[:-2]:
                expected[name] -= b - a
                nest(a, b, depth - 1)

    nest(0, 10**9, 3)
    rng.shuffle(events)
    found = self_times(events)
    assert sum(found.values()) == 10**9
    assert dict(found) == expected


@pytest.mark.parametrize("name", ["small", "llama3_8b"])
def test_the_peak_is_that_of_every_product_of_the_forward_pass(name):
    config = preset(name)
    names = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "d_model", "d_ff", "vocab_size")
    flops = flops_per_token(**{n: getattr(config, n) for n in names}, seq_len=1)["six_n"]
    products = forward_products(config)
    assert sum(2 * a * b * times for (a, b), times in products.items()) == flops / 3


def test_a_profiled_run_says_where_its_time_goes(tmp_path):
    work = Work("debug", batch=8, seq_len=32, dtype="float32", layers=1)
    found = bench_train.run(
        work, mesh="1,-1,1,1", steps=1, attention="reference", profile=str(tmp_path)
    )
    assert found["breakdown"].keys() >= {PRODUCTS, ATTENTION, LOSS, OPTIMISER, ELEMENTWISE}
    assert sum(found["breakdown"].values()) == pytest.approx(1)
    assert found["breakdown"].get(OTHER, 0) < 0.3
    assert found["loss_first"] == pytest.approx(math.log(512), rel=0.05)
    assert found["layers"] == 1 and found["attention"] == "reference"
    assert found["params"] == num_params(preset("debug", num_layers=1))
    assert found["share_of_matmul_peak"] > 0  # no more: a tiny model's times are noise
    assert "mfu" not in found  # no data sheet of a CPU


def test_the_command_changes_what_it_is_told_to_and_nothing_else(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(bench_train, "run", lambda work, **rest: seen.update(rest, work=work) or {})
    command = "bench --work=7b --layers=2 --batch=1 --attention=blockwise --json"
    monkeypatch.setattr(sys, "argv", command.split())
    bench.main()
    assert seen.pop("work") == Work(
        "llama_7b", 1, 4096, "bfloat16", state_dtype="bfloat16", layers=2
    )
    assert seen == dict(mesh="1,-1,1,1", steps=5, attention="blockwise", profile=None)
    assert '"work": "7b"' in capsys.readouterr().out
    assert WORKS["7b"].batch == 3


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--batch=6", "error: 6 rows do not split into 4 micro-batches; change --batch"),
        ("--mesh=1,-1,1,1", "2 rows per micro-batch do not split over replica x fsdp = 8"),
        ("--mesh=3,1,1,1", "error: mesh '3,1,1,1' needs 3 devices, but there are 8"),
        ("--remat=foo", "error: unknown remat policy 'foo'"),
        ("--attention=foo", "error: unknown attention implementation 'foo'"),
        ("--mesh=8,1,1,1 --batch=32 --attention=splash", "'splash' runs on TPUs, but"),
        ("--state_dtype=int7", "--state_dtype: invalid choice: 'int7'"),
        *((f"--{n}=0", f"--{n}: expected 1 or more, got 0") for n in ("layers", "steps", "batch")),
        ("--micro_batches=-1", "--micro_batches: expected 1 or more, got -1"),
        ("--work=decode", "error: --work=decode needs --model=PATH"),
        ("--work=decode --model=/nonexistent", "error: /nonexistent is not a checkpoint or model"),
        ("--work=decode --model=/nonexistent --new=1", "--new: expected 2 or more, got 1"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(bench_train, "matmul_peak", lambda *_: 1.0)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    *_, last = capsys.readouterr().err.splitlines()  # after argparse's line of usage
    assert ended.value.code == 2 and sentence in last


@pytest.mark.torch
def test_the_peer_in_torch_does_the_same_work():
    pytest.importorskip("transformers")
    path = Path(__file__).parents[1] / "experiments" / "cpu_speed" / "torch_step.py"
    spec = importlib.util.spec_from_file_location("torch_step", path)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    work = Work("debug", batch=4, seq_len=32, dtype="float32", layers=1)
    found = peer.run(work, steps=1, compiled=False, attention="sdpa", checkpointing=False)
    assert found["params"] == num_params(preset("debug", num_layers=1))
    assert found["loss_first"] == pytest.approx(math.log(512), rel=0.05)
    assert found["loss_last"] < found["loss_first"]
    assert found["share_of_matmul_peak"] > 0  # no more: a tiny model's times are noise
