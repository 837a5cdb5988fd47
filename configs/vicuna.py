"""Vicuna: LLaMA fine-tuned on conversations of users with ChatGPT.

Source:    Zheng et al. 2023, arXiv:2306.05685; lm-sys/FastChat (train.py, docs/training.md and
           docs/commands/data_cleaning.md); template of version 1.1
Purpose:   LLaMA `7b` or `13b`, all parameters
Hardware:  theirs 8 A100, about a day for 13b; 16 bytes per parameter over fsdp x tensor (108 GB
           for 7b)
Data:      about 70,000 conversations of ShareGPT, never released: bring your own copy, in
           FOLDER/sharegpt/, and let `prepare` clean it, split what is longer than 2,048 tokens
           between turns and hold 1% out. That is Koala's cleaning, much like theirs
Result:    theirs, 13b: more than 90% of ChatGPT's quality on 80 questions, judged by GPT-4

    python -m easylm_jax.prepare --config=configs/data/koala.py:FOLDER --out=runs/vicuna_data \\
        --config.tokenizer=PATH/llama_7b --config.max_tokens=2048
    python -m easylm_jax.train --config=configs/vicuna.py:7b --workdir=runs/vicuna \\
        --config.init_from=PATH/llama_7b
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig


def get_config(size: str = "7b"):
    config = as_config_dict(
        TrainConfig(
            model=preset(f"llama_{size}", dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("runs/vicuna_data/sharegpt/train.jsonl",),
                heldout_files=("runs/vicuna_data/sharegpt/validation.jsonl",),
                chat=ChatConfig(template="vicuna", too_long="trim"),
                packing="padded",
            ),
            duration="3 epochs",
            batch_size=128,
            seq_len=2048,
            # Where the command says nothing, Transformers' defaults of then: b2, eps, clipping.
            optim=OptimConfig(
                lr=2e-5,
                warmup="3%",  # 4% in some of their scripts
                final_lr_ratio=0.0,
                weight_decay=0.0,
                b2=0.999,
                clip_norm=1.0,
            ),
            checkpoint=CheckpointConfig(every="1 epoch"),
            eval=EvalConfig(every="10%", max_batches=16),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
