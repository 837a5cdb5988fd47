"""Baize v1: LLaMA with low-rank adapters over an 8-bit base, on ChatGPT's talks with itself.

Source:    Xu et al. 2023, arXiv:2304.01196; project-baize/baize-chatbot (finetune.py)
Purpose:   LLaMA `7b`, `13b` or `33b` (their "30B"), adapters alone
Hardware:  the base takes 7.4, 14.1 or 35.0 GB, adapters with gradients and moments 0.3, 0.5 or
           1.0, and activations come on top. A foreign file is quantised layer by layer, with at
           most the codes of one kernel of all layers (1.4 to 7.2 GB) beside; a base in our own
           format is first read whole, 2 bytes per parameter
Data:      quora_chat_data.json, stackoverflow_chat_data.json and alpaca_chat_data.json of that
           repository, as published (reader "baize"); medical_chat_data.json is for its healthcare
           model. Written by ChatGPT; see the repository for the licence
Result:    not reported for v1 alone. v1.5 (new data, loss on answers), GPT-4 as judge: 87% (7b) and
           89% (13b) of ChatGPT's score, where LLaMA-13B has 68% and Vicuna-13B 92%

    python -m easylm_jax.train --config=configs/baize_lora.py:7b --workdir=runs/baize \\
        --config.init_from=PATH/llama_7b --config.data.files="('PATH/*_chat_data.json',)"

Loss on answers alone, as in v1.5 and v2, is --config.data.chat.loss_on=answers; v2 has rows of
1,024. The code held 2,000 examples out and kept the adapters of the best evaluation; the paper
does not say so.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.lora import LoraConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig

LEARNING_RATE = {"7b": 2e-4, "13b": 1e-4, "33b": 5e-5}


def get_config(size: str = "7b"):
    if size not in LEARNING_RATE:
        raise ValueError(f"{size!r} is not one of {', '.join(LEARNING_RATE)}")
    config = as_config_dict(
        TrainConfig(
            # float16, as LLaMA was published, loses nothing before it is quantised.
            model=preset(f"llama_{size}", dtype="bfloat16", param_dtype="float16"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/*_chat_data.json",),
                on_bad_line="skip",  # and count: files of this size hold a few
                chat=ChatConfig(template="baize", reader="baize", loss_on="all", too_long="trim"),
                packing="padded",
            ),
            duration="1 epoch",  # in the code; the paper does not report it
            batch_size=64,
            seq_len=512,
            # All linear layers, as the paper says; the code leaves `o` out.
            lora=LoraConfig(rank=8, alpha=16.0, dropout=0.05, base="int8"),
            optim=OptimConfig(
                lr=LEARNING_RATE[size],
                warmup="100 steps",
                # Where the code says nothing, Transformers' defaults of then.
                schedule="linear",
                final_lr_ratio=0.0,
                weight_decay=0.0,
                b2=0.999,
                clip_norm=1.0,
            ),
            checkpoint=CheckpointConfig(every="200 steps"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
