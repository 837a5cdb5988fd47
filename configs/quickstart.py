"""A small LLaMA on the text that ships with the repository: the main job, in minutes, on a laptop.

Purpose:   see pretraining, evaluation, sampling, checkpoints and the report work on real text
Hardware:  two CPU cores, 3 GB of memory
Data:      runs/quickstart_data, made by configs/data/quickstart.py (public-domain English)

    python -m easylm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config():
    return as_config_dict(
        TrainConfig(
            model=preset("tiny"),
            tokenizer="runs/quickstart_data/tokenizer",
            data=DataConfig(
                root="runs/quickstart_data",
                weights={"books": 0.6, "gov": 0.2, "peps": 0.2},
                max_epochs=4.0,
            ),
            duration="240 steps",
            batch_size=16,
            seq_len=256,
            optim=OptimConfig(lr=2e-3, warmup="5%"),
            checkpoint=CheckpointConfig(every="60 steps"),
            eval=EvalConfig(
                every="80 steps",
                max_batches=12,
                prompts=("It was a dark and", "The agency", "This PEP proposes"),
                sample_tokens=60,
            ),
            log_every=5,
        )
    )
