"""LLaMA pretraining as in the paper (Touvron et al. 2023, arXiv:2302.13971, table 2).

Purpose:   7b, 13b, 33b, 65b (or any name of models/presets.py) from scratch
Hardware:  TPU or GPU pods; set `mesh` so that the state fits (16 bytes per parameter over fsdp x
           tensor), for example `1,-1,1,1` on 256 chips for 7b
Data:      `python -m easylm_jax.prepare` with your own corpus; the weights below are the paper's
           and expect sources of these names
Result:    paper, figure 1: training loss about 1.75 (7b), 1.6 (33b), 1.5 (65b) at the end

    python -m easylm_jax.train --config=configs/llama_pretrain.py:7b \\
        --workdir=gs://BUCKET/llama_7b --config.data.root=gs://BUCKET/tokens \\
        --config.tokenizer=gs://BUCKET/tokens/tokenizer
"""

from easylm_jax.config import as_config_dict
from easylm_jax.data.source import DataConfig
from easylm_jax.models.presets import PRESETS, preset
from easylm_jax.optim import OptimConfig
from easylm_jax.train import CheckpointConfig, EvalConfig, TrainConfig

# Table 1 of the paper: share of the training tokens.
MIXTURE = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}
# Table 2: peak learning rate and training tokens.
LARGE, SMALL = (1.5e-4, "1.4T tokens"), (3e-4, "1T tokens")
SCHEDULE = {"33b": LARGE, "65b": LARGE}


def get_config(size: str = "7b"):
    name = size if size in PRESETS else f"llama_{size}"
    lr, duration = SCHEDULE.get(size, SMALL)
    model = preset(name, dtype="bfloat16", remat="linear_outputs_and_attention")
    seq_len = min(model.max_seq_len, 2048)
    return as_config_dict(
        TrainConfig(
            model=model,
            tokenizer="PATH/tokenizer",
            data=DataConfig(root="PATH", weights=MIXTURE),
            duration=duration,
            batch_size=4 * 2**20 // seq_len,  # 4M tokens
            seq_len=seq_len,
            optim=OptimConfig(lr=lr, warmup="2000 steps"),
            checkpoint=CheckpointConfig(every="1000 steps", keep_last=2, milestone_every=10_000),
            eval=EvalConfig(every="1000 steps", max_batches=16),
            mesh="1,-1,1,1",
        )
    )
