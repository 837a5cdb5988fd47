"""Guanaco: QLoRA, low-rank adapters over a base of 4-bit NormalFloats, on the best of OASST1.

Source:    Dettmers et al. 2023, arXiv:2305.14314, section 5 and appendix B; artidoro/qlora
           (scripts/finetune_guanaco_7b.sh and its like)
Purpose:   LLaMA `7b`, `13b`, `33b` or `65b`, adapters alone
Hardware:  theirs one GPU, of 24 GB for 33b and of 48 GB for 65b (24 hours). Here the base takes
           4.2, 7.8, 18.9 or 37.5 GB, adapters in float32 with gradients and moments 2.6, 4.0, 7.8
           or 12.8, and activations come on top: 33b needs more than 24 GB and 65b more than 48.
           A foreign file is quantised layer by layer, with at most the codes of one kernel of all
           layers (0.7 to 7.2 GB) beside; a base in our own format is first read whole, 2 bytes
           per parameter
Data:      2023-04-12_oasst_ready.trees.jsonl.gz of OpenAssistant/oasst1, Apache-2.0, unpacked.
           The reader "oasst_best" takes the reply ranked first at each level; the authors' file,
           openassistant-guanaco, has 9,846 conversations
Result:    paper, GPT-4 as judge on Vicuna's 80 questions: 65b 99.3% of ChatGPT's score

    python -m easylm_jax.train --config=configs/guanaco_qlora.py:7b --workdir=runs/guanaco \\
        --config.init_from=PATH/llama_7b \\
        --config.data.files="('PATH/2023-04-12_oasst_ready.trees.jsonl',)"

Optimiser states are not paged here: adapters have few. Examples are not grouped by length.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.lora import LoraConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, TrainConfig

# Learning rate and dropout of the adapters (appendix B).
SMALL, LARGE = (2e-4, 0.1), (1e-4, 0.05)
SIZES = {"7b": SMALL, "13b": SMALL, "33b": LARGE, "65b": LARGE}


def get_config(size: str = "7b"):
    if size not in SIZES:
        raise ValueError(f"{size!r} is not one of {', '.join(SIZES)}")
    lr, dropout = SIZES[size]
    config = as_config_dict(
        TrainConfig(
            # The scripts, too, quantise what they have read in bfloat16 (--bf16).
            model=preset(
                f"llama_{size}",
                dtype="bfloat16",
                param_dtype="bfloat16",
                remat="linear_outputs_and_attention",
            ),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=("PATH/2023-04-12_oasst_ready.trees.jsonl",),
                on_bad_line="skip",  # and count: files of this size hold a few
                chat=ChatConfig(
                    template="guanaco", reader="oasst_best", loss_on="all", too_long="trim"
                ),
                packing="padded",
            ),
            duration="1875 steps",
            batch_size=16,
            seq_len=512,
            lora=LoraConfig(rank=64, alpha=16.0, dropout=dropout, base="nf4"),
            optim=OptimConfig(
                lr=lr,
                schedule="constant",
                warmup="0 steps",  # of 3% in the scripts, which "constant" ignores in Transformers
                weight_decay=0.0,
                b2=0.999,
                clip_norm=0.3,
            ),
            checkpoint=CheckpointConfig(every="500 steps"),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
