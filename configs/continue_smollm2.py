"""Continued pretraining of SmolLM2-135M-Instruct on Python enhancement proposals, from its GGUF.

Purpose:   start from a model that others trained, and see what a minute of other text does to it
Hardware:  two CPU cores, 5 GB of memory, minutes
Data:      runs/smollm2_data, made from the shipped text with the model's own tokenizer
Result:    experiments/smollm2/README.md

    python -m easylm_jax.prepare --config=configs/data/quickstart.py --out=runs/smollm2_data \\
        --config.tokenizer=PATH/SmolLM2-135M-Instruct.Q4_1.gguf
    python -m easylm_jax.train --workdir=runs/smollm2_peps \\
        --config=configs/continue_smollm2.py:PATH/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config(model: str = "PATH"):
    """`model`: the GGUF file, or the same model in any other format."""
    return as_config_dict(
        TrainConfig(
            model=preset("smollm2_135m"),
            tokenizer=model,
            init_from=model,
            data=DataConfig(root="runs/smollm2_data", weights={"peps": 1.0}),
            duration="60 steps",
            batch_size=4,
            seq_len=256,
            optim=OptimConfig(lr=1e-4, warmup="5 steps"),
            checkpoint=CheckpointConfig(every="60 steps"),
            eval=EvalConfig(
                every="30 steps",
                max_batches=8,
                prompts=("This PEP proposes", "The main idea is", "Once upon a time"),
                sample_tokens=40,
            ),
            log_every=5,
        )
    )
