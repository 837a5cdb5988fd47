"""The smallest run that exercises everything: seconds on a laptop, on text of your own.

Purpose:   trying a change of the code
Hardware:  any
Result:    bits per byte on its own text falls from 8 to below 4 in 60 steps

    python -m easylm_jax.train --config=configs/debug.py --workdir=runs/debug \\
        --config.data.files='("README.md",)'
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config():
    return as_config_dict(
        TrainConfig(
            model=preset("debug"),
            tokenizer="bytes",
            data=DataConfig(files=("README.md",), heldout_files=("README.md",)),
            duration="60 steps",
            batch_size=8,
            seq_len=128,
            optim=OptimConfig(lr=3e-3, warmup="5 steps"),
            checkpoint=CheckpointConfig(every="20 steps"),
            eval=EvalConfig(every="30 steps", prompts=("The ",), sample_tokens=32),
            log_every=5,
        )
    )
