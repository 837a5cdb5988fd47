"""Stanford Alpaca: LLaMA on 52,002 instructions that text-davinci-003 wrote and answered.

Source:    Taori et al. 2023, tatsu-lab/stanford_alpaca (README and train.py); no paper. The way of
           making the data is Self-Instruct's (Wang et al. 2022, arXiv:2212.10560)
Purpose:   LLaMA `7b` or `13b`, all parameters
Hardware:  theirs 4 A100-80G; 16 bytes per parameter over fsdp x tensor (108 GB for 7b). With less
           memory for activations raise micro_batches: the result is the same
Data:      alpaca_data.json of that repository, CC BY-NC 4.0, as published (reader "alpaca"). To
           clean it first: `python -m easylm_jax.prepare --config=configs/data/koala.py:FOLDER`
           with the file in FOLDER/alpaca/, then data.chat.reader=messages
Result:    theirs, 7b: in blind pairs on 252 user-oriented instructions, 90 wins against 89 of
           text-davinci-003, by the five authors

    python -m easylm_jax.train --config=configs/alpaca.py:7b --workdir=runs/alpaca \\
        --config.init_from=PATH/llama_7b --config.data.files="('PATH/alpaca_data.json',)"

NEFTune (Jain et al. 2023, arXiv:2310.05914) is --config.model.neftune_alpha=5 here.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig

# Learning rate and epochs.
SCHEDULE = {"7b": (2e-5, "3 epochs"), "13b": (1e-5, "5 epochs")}


def get_config(size: str = "7b"):
    if size not in SCHEDULE:
        raise ValueError(f"{size!r} is not one of {', '.join(SCHEDULE)}")
    lr, duration = SCHEDULE[size]
    config = as_config_dict(
        TrainConfig(
            model=preset(f"llama_{size}", dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/alpaca_data.json",),
                # Every token weighs the same; theirs did within each micro-batch of 4 rows.
                on_bad_line="skip",  # the published file holds empty answers
                chat=ChatConfig(template="alpaca", reader="alpaca", too_long="trim"),
                packing="padded",
            ),
            duration=duration,
            batch_size=128,
            seq_len=512,
            # Where the command says nothing, Transformers' defaults of then: b2, eps, clipping.
            optim=OptimConfig(
                lr=lr, warmup="3%", final_lr_ratio=0.0, weight_decay=0.0, b2=0.999, clip_norm=1.0
            ),
            checkpoint=CheckpointConfig(every="1 epoch"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
