"""GPT4All: LLaMA with low-rank adapters, trained on 437,605 answers of GPT-3.5-turbo.

Source:    Anand et al. 2023, technical report of March 2023 (history: arXiv:2311.04931);
           nomic-ai/gpt4all (train.py, data.py and configs/train/finetune_lora.yaml of then)
Purpose:   LLaMA `7b`, adapters alone
Hardware:  theirs 8 A100, about 8 hours, $100; here 2 bytes per parameter (14 GB), activations
Data:      nomic-ai/gpt4all_prompt_generations, Parquet or JSONL, as published (reader "gpt4all")
Result:    theirs: lower perplexity than Alpaca-LoRA's on Self-Instruct's 252 instructions

    python -m easylm_jax.train --config=configs/gpt4all.py --workdir=runs/gpt4all \\
        --config.init_from=PATH/llama_7b --config.data.files="('PATH/*.parquet',)"

Theirs cut long prompts to half a row; here the end is cut, and what has no answer left is counted
and left out. An answer that was cut has no EOS in either.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.lora import LoraConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig


def get_config(size: str = "7b"):
    config = as_config_dict(
        TrainConfig(
            model=preset(f"llama_{size}", dtype="bfloat16", param_dtype="bfloat16"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/*.parquet",),
                on_bad_line="skip",  # and count: files of this size hold a few
                chat=ChatConfig(template="gpt4all", reader="gpt4all", too_long="trim"),
                packing="padded",
            ),
            duration="4 epochs",
            batch_size=32,
            seq_len=1024,
            # In the code, not in the report. The targets are PEFT's default for LLaMA.
            lora=LoraConfig(rank=8, alpha=32.0, dropout=0.1, targets=("q", "v")),
            optim=OptimConfig(
                lr=5e-5,
                schedule="cosine",
                final_lr_ratio=0.0,  # not reported (min_lr of the config); our choice
                warmup="100 steps",
                weight_decay=0.0,
                b2=0.999,
                clip_norm=1.0,  # not reported; our choice
            ),
            checkpoint=CheckpointConfig(every="1 epoch"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
