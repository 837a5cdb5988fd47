"""Broad imitation of ChatGPT, with more and more data: does the model get better, or its style?

Source:    Gudibande et al. 2023, arXiv:2305.15717, "The False Promise of Imitating Proprietary
           LLMs", section 3 and appendix; trained with young-geng/EasyLM, no recipe published
Purpose:   LLaMA `7b` or `13b` on so many tokens, `7b:150M`; the paper has 0.3M to 150M
Hardware:  16 bytes per parameter over fsdp x tensor (108 GB for 7b)
Data:      ShareGPT-Mix was never released: 50,000 conversations of ShareGPT, 27,000 answers of
           ChatGPT in HC3, 10,000 turns of a bot on Discord. configs/data/koala.py prepares your own
           copies of the first two, from FOLDER/sharegpt/ and FOLDER/hc3/, without HC3's human
           answers. The order is shuffled and a run ends after its tokens: fewer tokens are a random
           part of the data, seen once as long as there is enough
Result:    paper: raters find about 70% of the answers as good as ChatGPT's or better, whatever the
           amount; benchmarks do not move or fall, such as Natural Questions 17 -> 10 (7b),
           20 -> 15 (13b); ChatGPT 31

    python -m easylm_jax.prepare --config=configs/data/koala.py:FOLDER --out=runs/imitation_data
    python -m easylm_jax.train --config=configs/false_promise.py:7b:150M \\
        --workdir=runs/imitation_7b_150M --config.init_from=PATH/llama_7b
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.finetuning import ChatConfig
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import preset
from easylm_jax.optim import OptimConfig, parse_duration
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig

BATCH_SIZE, SEQ_LEN = 32, 2048

SOURCES = ("sharegpt", "hc3_chatgpt")  # of configs/data/koala.py


def get_config(run: str = "7b:150M"):
    size, _, tokens = run.partition(":")
    duration = f"{tokens or '150M'} tokens"
    steps = parse_duration(duration, tokens_per_step=BATCH_SIZE * SEQ_LEN)
    config = as_config_dict(
        TrainConfig(
            model=preset(f"llama_{size}", dtype="bfloat16", remat="linear_outputs_and_attention"),
            init_from="PATH",
            tokenizer="PATH",
            data=DataConfig(
                files=tuple(f"runs/imitation_data/{name}/train.jsonl" for name in SOURCES),
                heldout_files=tuple(
                    f"runs/imitation_data/{name}/validation.jsonl" for name in SOURCES
                ),
                chat=ChatConfig(
                    template="koala",  # the markers of turns are not reported; the authors' own
                    weighting="example",  # close to EasyLM's mean of row means; see koala_sft.py
                    too_long="trim",
                ),
                packing="best_fit",
            ),
            duration=duration,
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            optim=OptimConfig(
                lr=2e-3,
                # Times the size of the weights. EasyLM's moments were Adafactor's, unfactored.
                scale_by_param=True,
                # A run of 65.5M tokens is over by then. What shorter ones did is not reported.
                warmup="1000 steps" if steps > 1000 else "10%",
                schedule="cosine",  # this and what follows are not reported; EasyLM's defaults ...
                final_lr_ratio=0.1,
                b2=0.95,
                clip_norm=1.0,
                weight_decay=0.0,  # ... but for this, our choice
            ),
            checkpoint=CheckpointConfig(every="500 steps"),
            eval=EvalConfig(every="10%", max_batches=16),
        )
    )
    config.tokenizer = config.get_oneway_ref("init_from")  # the model's own, unless one is named
    return config
