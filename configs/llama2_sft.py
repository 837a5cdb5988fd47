"""Llama 2-Chat's first stage: supervised fine-tuning on 27,540 annotated dialogues.

Source:    Touvron et al. 2023, arXiv:2307.09288, section 3.1; template of facebookresearch/llama
Purpose:   Llama 2 `7b`, `13b` or `70b`, all parameters
Hardware:  16 bytes per parameter over fsdp x tensor (108 GB for 7b, 1,104 GB for 70b)
Data:      the annotations were never released: bring conversations as JSONL of
           {"messages": [{"role", "content"}]}, or any layout of data/readers.py with
           data.chat.reader; a system message may come first
Result:    the paper judges the models after RLHF alone

    python -m easylm_jax.train --config=configs/llama2_sft.py:7b --workdir=runs/llama2_sft \\
        --config.init_from=PATH/llama2_7b --config.data.files="('PATH/train.jsonl',)" \\
        --config.data.heldout_files="('PATH/validation.jsonl',)"

The paper joins prompts and answers by a special token until a row is full; here they are packed
too, but do not see one another.
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
            model=preset(f"llama2_{size}", dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/train.jsonl",),
                heldout_files=("PATH/validation.jsonl",),
                # What weighs alike and what becomes of longer ones are not reported; our choice.
                chat=ChatConfig(template="llama2", weighting="token", too_long="drop"),
                packing="best_fit",
            ),
            duration="2 epochs",
            batch_size=64,
            seq_len=4096,
            optim=OptimConfig(
                lr=2e-5,
                schedule="cosine",
                final_lr_ratio=0.1,  # not reported; our choice: that of pretraining
                warmup="3%",  # not reported; our choice: that of the reward models
                weight_decay=0.1,
                b2=0.95,  # this and what follows are not reported here; those of pretraining
                eps=1e-5,
                clip_norm=1.0,
            ),
            checkpoint=CheckpointConfig(every="1 epoch"),
            eval=EvalConfig(every="10%", max_batches=16),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
