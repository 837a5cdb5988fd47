"""Koala: LLaMA fine-tuned on dialogues, in part on answers marked by how good they are.

Source:    Geng et al. 2023, "Koala: A Dialogue Model for Academic Research" (BAIR blog), with
           young-geng/EasyLM, its issue 32 (the author's command) and
           young-geng/koala_data_pipeline. Conditioning: Liu et al. 2023, arXiv:2302.02676
Purpose:   one of three mixes, with a size after a colon (`conditional`, `conditional:7b`; 13b is
           the blog's):
           distill      ChatGPT's answers alone, ShareGPT and HC3: Koala-Distill
           all          everything, of what was compared the better answers, no markers
           conditional  everything, good and bad answers, each under its marker: as far as the
                        sources say, Koala-All
Hardware:  theirs 8 A100, about 6 hours; 16 bytes per parameter over fsdp x tensor (208 GB for 13b)
Data:      configs/data/koala.py says what to bring and cleans it. Leave PandaLM out for Koala's set
Result:    theirs, by about 100 raters: as good as Alpaca on Alpaca's test set, better on Koala's
           own; Koala-Distill slightly better than Koala-All

    python -m easylm_jax.prepare --config=configs/data/koala.py:FOLDER --out=runs/koala_data
    python -m easylm_jax.train --config=configs/koala_sft.py:conditional --workdir=runs/koala \\
        --config.init_from=PATH/llama_13b

Differs from Koala: only the answer that was judged has the marker. Koala marked the shared turns
before it too, so that the same text was trained under both markers; that is
--config.data.chat.mark_shared_turns=True. Rows do not see their neighbours; EasyLM's did. BOS
begins a conversation; at Koala's commit it most likely did not.
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig

# Data sets of configs/data/koala.py, and which of the judged answers are used.
MIXES = {
    "distill": (("sharegpt", "hc3_chatgpt"), dict(judged=("good",), conditional=False)),
    "all": (("*",), dict(judged=("good",), conditional=False)),
    "conditional": (("*",), dict(judged=("good", "bad"), conditional=True)),
}


def get_config(mix: str = "conditional"):
    mix, _, size = mix.partition(":")
    if mix not in MIXES:
        raise ValueError(f"{mix!r} is not one of {', '.join(MIXES)}")
    datasets, judged = MIXES[mix]
    config = as_config_dict(
        TrainConfig(
            model=preset(
                f"llama_{size or '13b'}",
                dtype="bfloat16",
                remat="linear_outputs_and_attention",
                # As in the author's command: resid_pdrop, embd_pdrop, attn_pdrop, fcm_max_ratio.
                residual_dropout=(0.05, 0.05),
                embedding_dropout=0.05,
                attention=AttentionConfig(dropout=0.05),
                fcm_max_ratio=0.1,
            ),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=tuple(f"runs/koala_data/{name}/train.jsonl" for name in datasets),
                heldout_files=tuple(
                    f"runs/koala_data/{name}/validation.jsonl" for name in datasets
                ),
                chat=ChatConfig(
                    template="koala",
                    # EasyLM's loss was the mean of each row's mean. Rows there held several
                    # examples, so this is close to it and not the same.
                    weighting="example",
                    too_long="trim",  # not reported; our choice: EasyLM cut at the ends of rows
                    **judged,
                ),
                packing="best_fit",
            ),
            duration="2 epochs",  # the command says 20,000 steps
            # Not reported; our choice: EasyLM's default of then, at which 20,000 steps in 6 hours
            # on 8 A100 are possible.
            batch_size=8,
            seq_len=2048,  # not reported; our choice: that with which it was served
            optim=OptimConfig(
                lr=2e-5,  # not reported; our choice: Alpaca's and Vicuna's
                schedule="cosine",  # this and what follows are not reported; EasyLM's defaults ...
                final_lr_ratio=0.1,
                b2=0.95,
                clip_norm=1.0,
                state_dtype="bfloat16",  # there the first moment alone
                warmup="3%",  # ... but for these two, which are our choice
                weight_decay=0.0,
            ),
            checkpoint=CheckpointConfig(every="1 epoch"),
            eval=EvalConfig(every="10%", max_batches=64, pairs=0 if mix == "distill" else 256),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
