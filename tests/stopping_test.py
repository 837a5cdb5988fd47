"""Early stopping: counts measurements without a gain, and knows after a restart what it knew."""

import json

import pytest

from easylm_jax.stopping import EarlyStop, EarlyStopConfig


def follow(stop: EarlyStop, values: list[float], *, start: int = 0) -> list[bool]:
    return [stop.push(10 * (start + n), {"x": value}) for n, value in enumerate(values)]


@pytest.mark.parametrize(
    "higher_is_better, values, best",
    [
        (False, [3.0, 2.0, 2.0, 1.0, 1.5, 1.0], [True, True, False, True, False, False]),
        (True, [0.1, 0.3, 0.2, 0.4, 0.4, 0.0], [True, True, False, True, False, False]),
    ],
)
def test_it_ends_when_patience_measurements_in_a_row_were_no_better(higher_is_better, values, best):
    stop = EarlyStop(EarlyStopConfig("x", patience=2, higher_is_better=higher_is_better))
    for n, (value, is_best) in enumerate(zip(values, best, strict=True)):
        assert not stop.reason
        assert stop.push(10 * n, {"x": value, "other": -value}) == is_best
        assert stop.best_step == 10 * max(i for i in range(n + 1) if best[i])
    assert f"x was best at step 30 ({values[3]:.4f})" in stop.reason
    assert "not improved in 2 measurements" in stop.reason


@pytest.mark.parametrize("cut", range(5))
def test_it_goes_on_where_its_state_was_taken(cut):
    values = [3.0, 4.0, 2.0, 2.5, 2.6]
    whole, before, after = (EarlyStop(EarlyStopConfig("x", patience=2)) for _ in range(3))
    expected = follow(whole, values)
    got = follow(before, values[:cut])
    after.restore(json.loads(json.dumps(before.state())))
    assert got + follow(after, values[cut:], start=cut) == expected
    assert (after.state(), after.reason) == (whole.state(), whole.reason)


def test_one_that_ended_its_run_ends_it_at_once_when_resumed():
    stop, resumed = (EarlyStop(EarlyStopConfig("x", patience=2)) for _ in range(2))
    follow(stop, [1.0, 2.0, 2.0])
    resumed.restore(stop.state())
    assert stop.reason and resumed.reason == stop.reason


def test_without_a_metric_it_never_ends_and_one_that_is_not_measured_is_told():
    stop = EarlyStop(EarlyStopConfig(patience=1))
    assert not any(follow(stop, [1.0, 2.0, 3.0])) and not stop.reason
    with pytest.raises(ValueError, match="'heldout/los', which this run does not .* heldout/loss"):
        EarlyStop(EarlyStopConfig("heldout/los")).push(0, {"heldout/loss": 1.0})
    with pytest.raises(ValueError, match="measures nothing: set data.heldout_files"):
        EarlyStop(EarlyStopConfig("heldout/loss")).push(0, {})
    with pytest.raises(ValueError, match="early_stop.patience is 0; it must be 1 or more"):
        EarlyStopConfig("x", patience=0)
