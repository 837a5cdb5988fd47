"""LIMA: LLaMA fine-tuned on 1,000 careful examples, for many epochs, with dropout.

Source:    Zhou et al. 2023, arXiv:2305.11206, section 3; no code was published
Purpose:   LLaMA `7b`, `13b`, `33b` or `65b` (the paper's), all parameters
Hardware:  16 bytes per parameter over fsdp x tensor (1,044 GB for 65b, 108 GB for 7b)
Data:      train.jsonl of GAIR/lima, CC BY-NC-SA, as published (reader "lima"). Its 1,030 lines
           are the 1,000 examples and 30 dialogues that section 6 of the paper adds
Result:    paper, 65b: equal or better than GPT-4's answers in 43% of 300 prompts, than Bard's in
           58%; 50% of the answers excellent, 38% pass, 12% fail

    python -m easylm_jax.train --config=configs/lima.py:65b --workdir=runs/lima \\
        --config.init_from=PATH/llama_65b --config.data.files="('PATH/lima/train.jsonl',)"

The paper chose a checkpoint between epochs 5 and 10 by reading answers to 50 prompts, because
perplexity got worse as answers got better: all epochs are kept, and nothing stops the run early.
Its end-of-turn token was added to the vocabulary; the template uses one that is there.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig


def get_config(size: str = "65b"):
    is_largest = size == "65b"
    config = as_config_dict(
        TrainConfig(
            model=preset(
                f"llama_{size}",
                dtype="bfloat16",
                remat="linear_outputs_and_attention",
                residual_dropout=(0.0, 0.3 if is_largest else 0.2),  # bottom, top layer
            ),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/lima/train.jsonl",),
                # The weighting is not reported; our choice: every token the same.
                on_bad_line="skip",  # and count: files of this size hold a few
                chat=ChatConfig(template="lima", reader="lima", too_long="trim"),
                packing="padded",  # not reported; our choice: batches are said in examples
            ),
            duration="15 epochs",
            batch_size=32 if is_largest else 64,
            seq_len=2048,
            optim=OptimConfig(
                lr=1e-5,
                schedule="linear",
                final_lr_ratio=0.1,
                warmup="0 steps",
                weight_decay=0.1,
                b2=0.95,
                clip_norm=1.0,  # not reported; our choice: LLaMA's
            ),
            checkpoint=CheckpointConfig(every="1 epoch", keep_last=15),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
