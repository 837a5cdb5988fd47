"""LLaMA pretraining on pods: for each size a mesh and a remat policy that compile and fit.

Purpose:   the runs of configs/llama_pretrain.py with everything that the hardware decides filled in
Hardware:  the topology in PODS below; `make plans` compiles every one for it and keeps what the
           compiler says in experiments/pod_plans. Compiled, never run: speeds there are estimates
Data:      as in configs/llama_pretrain.py
Result:    as there; the step is the same but for the order of sums

    python -m easylm_jax.plan --config=configs/llama_pod.py:65b_v5p_2048 --topology=v5p:8x16x16
    python -m easylm_jax.train --config=configs/llama_pod.py:65b_v5p_2048 \\
        --workdir=gs://BUCKET/llama_65b --config.data.root=gs://BUCKET/tokens \\
        --config.tokenizer=gs://BUCKET/tokens/tokenizer
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

SPLASH = dict(implementation="splash", block_q=512, block_k=512)
RING = dict(implementation="blockwise", across_sequence="ring", block_q=512, block_k=512)
LINEAR = "linear_outputs_and_attention"
PROJECTIONS = "q:keep,k:keep,v:keep,attention_out:keep,attention_lse:keep"  # not gate and up


class Pod(NamedTuple):
    """What the hardware decides. Every batch is 4M tokens, as in the paper."""

    size: str  # of configs/llama_pretrain.py
    topology: str
    mesh: str  # replica,fsdp,sequence,tensor
    remat: str
    micro_batches: int
    seq_len: int = 2048
    attention: dict[str, str | int] = SPLASH


PODS = {
    "7b_v5e_256": Pod("7b", "v5e:16x16", "1,256,1,1", "linear_outputs", 4),
    "13b_v6e_256": Pod("13b", "v6e:16x16", "1,256,1,1", LINEAR, 4),
    "33b_v5p_512": Pod("33b", "v5p:8x8x8", "8,64,1,1", LINEAR, 2),
    "65b_v5p_2048": Pod("65b", "v5p:8x16x16", "8,256,1,1", LINEAR, 1),
    "65b_v4_2048": Pod("65b", "v4:8x16x16", "8,256,1,1", PROJECTIONS, 1),
    "llama2_70b_v5p_1024": Pod("llama2_70b", "v5p:8x8x16", "8,128,1,1", LINEAR, 1, 4096),
    "llama2_7b_64k_v5p_256": Pod("llama2_7b", "v5p:4x8x8", "1,32,8,1", LINEAR, 2, 65_536, RING),
}
# Rotary base for rows longer than the model was made for: Code Llama's (arXiv:2308.12950, 2.4),
# trained at 16k tokens and used up to 100k.
LONG_ROPE_THETA = 1e6


def get_config(name: str = "7b_v5e_256"):
    if name not in PODS:
        raise ValueError(f"configs/llama_pod.py has no {name!r}; there are {', '.join(PODS)}")
    pod = PODS[name]
    config = _pretrain(pod.size)
    with config.unlocked():
        config.model.remat = pod.remat
        config.model.attention.update(pod.attention)
        config.mesh, config.micro_batches = pod.mesh, pod.micro_batches
        config.seq_len, config.batch_size = pod.seq_len, 4 * 2**20 // pod.seq_len
        if pod.seq_len > config.model.max_seq_len:
            config.model.max_seq_len = pod.seq_len
            config.model.rope_theta = LONG_ROPE_THETA
    return config


def _pretrain(size: str):
    """The config of llama_pretrain.py, the file beside this one."""
    path = Path(__file__).with_name("llama_pretrain.py")
    spec = importlib.util.spec_from_file_location("llama_pretrain", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(size)
