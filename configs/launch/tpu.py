"""A Cloud TPU pod and the job it is for; copy this file and fill in what is in capitals.

Purpose:   LLaMA 7B from scratch, as configs/llama_pretrain.py says
Hardware:  v5p-128: 64 chips, 16 workers; spot and queued, so it may wait, and be taken away
Runtimes:  v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5litepod (v5e),
           tpu-ubuntu2204-base for v4 and older

    python -m easylm_jax.launch configs/launch/tpu.py create --dry_run
"""

from easylm_jax.config import as_config_dict
from easylm_jax.launch import Pod

WORKDIR = "gs://BUCKET/llama_7b"


def get_config():
    return as_config_dict(
        Pod(
            name="llama-7b",
            project="PROJECT",
            zone="us-east5-a",
            accelerator_type="v5p-128",
            runtime_version="v2-alpha-tpuv5",
            spot=True,
            queued=True,
            workdir=WORKDIR,
            command=(
                *("python", "-m", "easylm_jax.train", f"--workdir={WORKDIR}"),
                "--config=configs/llama_pretrain.py:7b",
                "--config.micro_batches=4",  # of 16,384 tokens a chip; all at once need 194 GiB
                "--config.data.root=gs://BUCKET/tokens",
                "--config.tokenizer=gs://BUCKET/tokens/tokenizer",
                "--config.distributed.initialize=True",  # the workers find one another
            ),
            environment={"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
    )
