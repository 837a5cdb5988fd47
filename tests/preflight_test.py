"""What a run refuses before it begins. (What it refuses of models is in loading_test.py.)"""

import json

import pytest

from easylm_jax.preflight import check_same_run


def test_a_run_of_a_version_before_is_sent_on_with_its_parameters(tmp_path):
    old = {"optim": {"lr": 1.0, "mu_dtype": "float32"}, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    new = {"optim": {"lr": 1.0, "state_dtype": "float32"}, "seed": 0}
    with pytest.raises(ValueError, match="run of easylm_jax 0.4.0, .* set init_from=.*checkpoints"):
        check_same_run(new, str(tmp_path))
    check_same_run(old, str(tmp_path))
    with pytest.raises(ValueError, match="other settings .seed: 0 -> 1.; restore them"):
        check_same_run(old | {"seed": 1}, str(tmp_path))
