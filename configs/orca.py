"""Orca: LLaMA that learns from explanations: ChatGPT's five million, then GPT-4's one million.

Source:    Mukherjee et al. 2023, arXiv:2306.02707; no code, data or weights were published
Purpose:   LLaMA 13b, all parameters, in two stages: `chatgpt`, then `gpt4` from what it gave
Hardware:  theirs 20 A100, 160 hours and 40 hours; 16 bytes per parameter over fsdp x tensor
           (208 GB for 13b), and memory of the host for all examples of a stage
Data:      the paper's were never released. OpenOrca is a reproduction by others from the same FLAN
           collection, in Parquet with the system messages (reader "orca"):
           3_5M-GPT3_5-Augmented.parquet and 1M-GPT4-Augmented.parquet; see its card for the licence
Result:    paper, zero-shot: BIG-bench hard 49.7 (ChatGPT 48.9, Vicuna 23.3), AGIEval 41.7 (ChatGPT
           47.2; with the second stage alone 37.2)

    python -m easylm_jax.train --config=configs/orca.py:chatgpt --workdir=runs/orca_chatgpt \\
        --config.init_from=PATH/llama_13b \\
        --config.data.files="('PATH/3_5M-GPT3_5-Augmented.parquet',)"
    python -m easylm_jax.train --config=configs/orca.py:gpt4 --workdir=runs/orca_gpt4 \\
        --config.data.files="('PATH/1M-GPT4-Augmented.parquet',)"

The strings around the roles are not reported; those of the template are our own.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig

# File of OpenOrca, and what the stage begins with.
STAGES = {
    "chatgpt": ("3_5M-GPT3_5-Augmented.parquet", "PATH"),
    "gpt4": ("1M-GPT4-Augmented.parquet", "runs/orca_chatgpt"),
}


def get_config(stage: str = "chatgpt"):
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is not one of {', '.join(STAGES)}")
    file, init_from = STAGES[stage]
    config = as_config_dict(
        TrainConfig(
            model=preset("llama_13b", dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from=init_from,
            tokenizer=init_from,
            data=DataConfig(
                files=(f"PATH/{file}",),
                # What weighs alike and what becomes of longer ones are not reported; our choice.
                on_bad_line="skip",  # and count: files of this size hold a few
                chat=ChatConfig(template="orca", reader="orca", weighting="token", too_long="drop"),
                packing="best_fit",  # 2.7 examples in a row, they report
            ),
            duration="4 epochs",
            batch_size=128,  # not reported; our choice
            seq_len=2048,
            # Not reported; our choice: Vicuna's learning rate, warm-up and decay, LLaMA's rest.
            optim=OptimConfig(
                lr=2e-5,
                schedule="cosine",
                final_lr_ratio=0.0,
                warmup="3%",
                weight_decay=0.0,
                b2=0.95,
                clip_norm=1.0,
            ),
            checkpoint=CheckpointConfig(every="1000 steps"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
