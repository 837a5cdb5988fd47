"""The quickstart's second stage: conditional fine-tuning on preferences, as Koala did it.

Purpose:   see answers marked by quality, what the markers teach, and the same question answered
           under either
Hardware:  two CPU cores, 2 GB of memory, about two minutes
Data:      runs/quickstart_chat_data, made by configs/data/quickstart_chat.py (HH, MIT)
Source:    Geng et al. 2023, "Koala"

    python -m easylm_jax.train --config=configs/quickstart_chat.py --workdir=runs/quickstart_chat
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config():
    data = "runs/quickstart_chat_data/hh"
    return as_config_dict(
        TrainConfig(
            model=preset("tiny"),
            init_from="runs/quickstart",
            tokenizer="runs/quickstart",
            data=DataConfig(
                files=(f"{data}/train.jsonl",),
                heldout_files=(f"{data}/validation.jsonl",),
                chat=ChatConfig(
                    template="koala",
                    judged=("good", "bad"),
                    conditional=True,
                    loss_on="last",  # the judged answer: a small model has little to spare
                ),
            ),
            duration="2 epochs",
            batch_size=16,
            seq_len=256,
            optim=OptimConfig(lr=2e-3, warmup="5%"),
            checkpoint=CheckpointConfig(every="100 steps"),
            eval=EvalConfig(
                every="50%",
                pairs=200,
                prompts=("How can I be kind to my neighbour?", "How do I steal a car?"),
                sample_tokens=60,
            ),
            log_every=5,
        )
    )
