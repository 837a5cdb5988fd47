"""The metric log survives kills and odd numbers; the speed figures equal published ones."""

import json
import math

import jax
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from easylm_jax import metrics
from easylm_jax.bench_train import causal_flops
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.presets import preset
from easylm_jax.monitor import make_throughput

LLAMA_7B = dict(
    num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_model=4096, d_ff=11008,
    vocab_size=32000, seq_len=2048,
)  # fmt: skip
LLAMA_65B = dict(
    num_layers=80, num_heads=64, num_kv_heads=64, head_dim=128, d_model=8192, d_ff=22016,
    vocab_size=32000, seq_len=2048,
)  # fmt: skip


def write_run(workdir, steps, rng, **kwargs):
    log = metrics.MetricLog(workdir, **kwargs)
    for step in steps:
        log.write(step, {"train/loss": rng.normal()})
        log.write_text(step, [{"prompt": f"p{step}", "text": "\u2028 <b>\n{}"}])
    log.close()


def steps_of(rows):
    return [row["step"] for row in rows]


@pytest.fixture(params=["disk", "object store"])
def workdir(request, tmp_path, monkeypatch):
    if request.param == "object store":  # the same code path as gs://, on a disk
        monkeypatch.setattr(metrics, "_is_object_store", lambda path: "events_" not in str(path))
    return tmp_path / "run"


def test_what_is_written_is_read(workdir):
    values = {f"train/{i}": float(v) for i, v in enumerate(np.random.default_rng(0).normal(size=5))}
    log = metrics.MetricLog(workdir)
    log.write(3, values)
    log.write(4, {"train/loss": np.float32(0.5)})
    log.write_text(4, [{"prompt": "a \U0001f600", "text": "\u2028</script>\n\ud83d"}])
    log.close()
    first, second = metrics.read_metrics(workdir)
    assert {k: v for k, v in first.items() if k not in ("step", "time")} == values
    assert first["step"] == 3 and second["step"] == 4 and second["train/loss"] == 0.5
    assert first["time"] <= second["time"]
    (sample,) = metrics.read_samples(workdir)
    assert sample == {"step": 4, "prompt": "a \U0001f600", "text": "\u2028</script>\n\ud83d"}


def test_resuming_leaves_no_duplicates(workdir):
    rng = np.random.default_rng(1)
    write_run(workdir, range(0, 7), rng)
    write_run(workdir, range(5, 9), rng, resume_step=4)  # the checkpoint of step 4 was restored
    assert steps_of(metrics.read_metrics(workdir)) == list(range(9))
    assert steps_of(metrics.read_samples(workdir)) == list(range(9))
    write_run(workdir, [9], rng)  # evaluation of a finished run only adds
    assert steps_of(metrics.read_metrics(workdir)) == list(range(10))
    write_run(workdir, [0], rng, resume_step=-1)  # no checkpoint: from scratch
    assert steps_of(metrics.read_metrics(workdir)) == [0]


def test_killed_while_writing_a_line(workdir):
    rng = np.random.default_rng(2)
    write_run(workdir, range(3), rng)
    path = workdir / "metrics.jsonl"
    for size in rng.integers(1, len(path.read_bytes().splitlines()[-1]), size=5):
        whole = path.read_bytes()
        path.write_bytes(whole + whole.splitlines()[-1][:size])
        assert steps_of(metrics.read_metrics(workdir)) == [0, 1, 2]
        write_run(workdir, [], rng)
        assert path.read_bytes() == whole
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: expected one JSON object"):
        metrics.read_metrics(workdir)


def test_disk_has_each_line_at_once_and_object_store_after_flush(workdir, request):
    log = metrics.MetricLog(workdir)
    log.write(1, {"train/loss": 1.0})
    at_once = len(metrics.read_metrics(workdir))
    assert at_once == (1 if request.node.name.endswith("[disk]") else 0)
    log.flush()
    assert len(metrics.read_metrics(workdir)) == 1
    log.close()


def test_not_finite_values_are_valid_json(workdir):
    log = metrics.MetricLog(workdir)
    log.write(1, {"a": math.nan, "b": -math.inf, "c": 2.0})
    log.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((workdir / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row["a"] is None and row["b"] is None and row["nonfinite"] == ["a", "b"]
    (row,) = metrics.read_metrics(workdir)
    assert math.isnan(row["a"]) and math.isnan(row["b"]) and row["c"] == 2.0
    assert "nonfinite" not in row


def test_tensorboard_events_hold_the_scalars(workdir):
    values = np.random.default_rng(3).normal(size=4).astype(np.float32)
    log = metrics.MetricLog(workdir, resume_step=9)
    for step, value in enumerate(values, start=10):
        log.write(step, {"train/loss": value})
    log.close()
    (file,) = (workdir / "tensorboard").iterdir()
    events = list(read_events(file.read_bytes()))
    assert [e.step for e in events if e.HasField("session_log")] == [10]  # hides what came after
    found = {e.step: v.simple_value for e in events for v in e.summary.value}
    assert found == dict(enumerate(values, start=10))


def read_events(data):
    """TFRecord framing: 8 bytes of length, 4 of checksum, the record, 4 of checksum."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_disabled_log_writes_nothing(tmp_path):
    write_run(tmp_path / "run", range(3), np.random.default_rng(4), enabled=False)
    assert not (tmp_path / "run").exists()
    assert metrics.read_metrics(tmp_path / "run") == []


def test_llama_65b_as_published():
    """LLaMA paper: 380 tokens/s on an A100-80GB at T = 2048."""
    flops = metrics.flops_per_token(**LLAMA_65B)
    peak = metrics.peak_flops("NVIDIA A100-SXM4-80GB")
    mfu = {name: round(100 * 380 * value / peak, 1) for name, value in flops.items()}
    assert mfu == {"six_n": 47.5, "causal": 48.5, "full": 49.5}


def test_six_n_counts_the_parameters():
    """LLaMA-7B has 6,738,415,616 parameters (its Hugging Face index file), norms and table in."""
    norms = (2 * 32 + 1) * 4096
    weights = 6_738_415_616 - norms - 32000 * 4096
    assert metrics.flops_per_token(**LLAMA_7B)["six_n"] == 6 * weights
    # Mistral 7B differs in these dimensions alone and has 7,241,732,096 parameters.
    mistral = LLAMA_7B | dict(num_kv_heads=8, d_ff=14336)
    assert metrics.flops_per_token(**mistral)["six_n"] == 6 * (7_241_732_096 - norms - 32000 * 4096)


@pytest.mark.parametrize("window", [1, 7, 64, 100, None])
def test_a_window_counts_the_pairs_inside_it(window):
    """Counted one by one: a query sees the keys before it, the diagonal counts half."""
    T = LLAMA_7B["seq_len"] // 32
    back = np.arange(T)[:, None] - np.arange(T)[None]
    seen = (back > 0) & (back < (window or T))
    pairs = seen.sum() + (T + (back == (window or T)).sum()) / 2
    flops = metrics.flops_per_token(**LLAMA_7B | dict(seq_len=T), window=window)
    expected = 12 * 32 * 32 * 128 * pairs / T
    assert flops["causal"] - flops["six_n"] == pytest.approx(expected)
    assert flops["full"] == metrics.flops_per_token(**LLAMA_7B | dict(seq_len=T))["full"]


def test_training_and_bench_count_the_window_of_their_model():
    """Mistral 7B at 32k tokens with a window of 4,096."""
    model = preset("mistral_7b", attention=AttentionConfig(sliding_window=4096))
    assert causal_flops(model, 32_768) == pytest.approx(48.7e9, rel=1e-3)
    meter = make_throughput(model, 1, 32_768, peak=1e12)
    meter.add(1.0, 0.0)
    per_second = 32_768 / jax.device_count() * 48.7e9
    assert meter.summary()["perf/mfu"] == pytest.approx(per_second / 1e12, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362), ("NVIDIA GB200", 2500), ("TPU v4", 275), ("TPU v5 lite", 197),
        ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918), ("cpu", None),
    ],
)  # fmt: skip
def test_peak_of_a_device_kind(kind, tflops):
    found = metrics.peak_flops(kind)
    assert found == (None if tflops is None else tflops * 1e12)
    assert metrics.peak_flops(kind, 1e12) == 1e12


def test_throughput_is_tokens_over_time():
    rng = np.random.default_rng(5)
    step_s, wait_s = rng.uniform(1, 2, size=6), rng.uniform(0, 1, size=6)
    flops = metrics.flops_per_token(**LLAMA_65B)["causal"]
    meter = metrics.Throughput(
        tokens_per_step=1000, num_devices=4, causal_flops_per_token=flops, peak=312e12
    )
    for pair in zip(step_s, wait_s, strict=True):
        meter.add(*pair)
    got = meter.summary()
    per_device = 6000 / step_s.sum() / 4
    want = {
        "perf/step_s": step_s.mean(),
        "perf/tokens_per_s": 4 * per_device,
        "perf/tokens_per_s_per_device": per_device,
        "perf/data_wait_share": wait_s.sum() / step_s.sum(),
        "perf/mfu": 0.485 * per_device / 380,  # scaled from the published figure
    }
    assert got == {name: pytest.approx(value, rel=1e-3) for name, value in want.items()}
    assert meter.summary() == {}
    meter.add(2.0, 0.0)
    assert meter.summary()["perf/tokens_per_s"] == 500


def test_memory_is_plausible():
    import resource

    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.5 * peak_gb < metrics.memory_stats()["perf/memory_gb"] <= peak_gb * 1.05
