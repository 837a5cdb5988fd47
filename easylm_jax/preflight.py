"""What must agree before a run may start or go on: one sentence each where it does not.

Called by `train.py` and `loading.py`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from easylm_jax.models.llama import LlamaConfig
from easylm_jax.text.template import ChatTemplate
from easylm_jax.text.tokenizer import Tokenizer
from easylm_jax.workdir import Difference, compare_config, read_config, without

# What may change when a run is resumed, since it does not change what a step computes. Another
# duration changes the rest of the schedule; that is what "go on for longer" means. Data and
# tokenizer may have moved: that they are the same is checked by content.
FREE_TO_CHANGE = (
    *("data.root", "tokenizer"),
    *("eval", "checkpoint", "mesh", "distributed", "log_every", "peak_flops", "profile"),
    *("duration", "guard", "early_stop", "micro_batches", "model.remat", "model.layer_unroll"),
    *("model.attention.implementation", "model.attention.across_sequence"),
    *("model.attention.block_q", "model.attention.block_k"),
)

# Settings that are no more, and the last version that had them.
GONE = {"optim.mu_dtype": "0.4.0"}

# The fields of LlamaConfig that say what function the parameters compute; the others say how.
MODEL_FIELDS = (
    *("vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"),
    *("norm_eps", "rope_theta", "rope_scaling", "tie_embeddings", "qkv_bias"),
    "attention.sliding_window",
)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Every id of the tokenizer has a row in the embedding."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has "
            f"{vocab_size}; set model.vocab_size to at least {tokenizer.vocab_size} or use the "
            "model's own tokenizer"
        )


def check_same_tokenizer(saved: str, tokenizer: Tokenizer, workdir: str) -> None:
    """The checkpoint was trained with this tokenizer; `saved` is the fingerprint in it."""
    if saved != tokenizer.fingerprint:
        raise ValueError(
            f"the checkpoint in {workdir} was trained with another tokenizer (fingerprint "
            f"{saved[:12]}, got {tokenizer.fingerprint[:12]}); use {workdir}/tokenizer"
        )


def check_same_template(
    trained: Sequence[str] | None, template: ChatTemplate | None, path: str
) -> None:
    """What was trained to answer in one template, (name, hash), is not asked in another."""
    if trained and template and trained[1] != template.hash:
        raise ValueError(
            f"{path} was trained with the template {trained[0]!r} (hash {trained[1]}), this run "
            f"asks for {template.name!r} (hash {template.hash}); set data.chat.template to the "
            "tokenizer/template.json of that run, or start from a model without one"
        )


def check_same_run(config: Mapping[str, Any], workdir: str) -> None:
    """A resumed run computes what the run before would have."""
    old = read_config(workdir)
    if old is None:
        return
    if fixed := without(compare_config(old, config), FREE_TO_CHANGE):
        if gone := [last for d in fixed for key, last in GONE.items() if d.key == key]:
            raise ValueError(
                f"{workdir} holds a run of easylm_jax {gone[0]}, which this version cannot go on "
                f"with; take another --workdir and set init_from={workdir}/checkpoints to start "
                "from its parameters"
            )
        raise ValueError(
            f"{workdir} holds a run with other settings ({'; '.join(map(str, fixed[:5]))}"
            f"{' ...' if len(fixed) > 5 else ''}); restore them, or take another --workdir and "
            f"set init_from={workdir}/checkpoints to start from its parameters"
        )


def check_same_model(found: LlamaConfig, expected: LlamaConfig, path: str) -> None:
    """The model at `path` is the one that the configuration describes."""
    differences = compare_config(dataclasses.asdict(expected), dataclasses.asdict(found))
    about_others = without(differences, MODEL_FIELDS)
    wrong = [d for d in differences if d not in about_others and not _is_rounded(d)]
    if wrong:
        listed = "; ".join(f"model.{d.key} (expected {d.old!r}, got {d.new!r})" for d in wrong)
        raise ValueError(
            f"{path} is not the model that this configuration describes: {listed}; set these to "
            "what the file has, or convert it to native first if the run is to change them"
        )


def _is_rounded(d: Difference) -> bool:
    """Some formats keep norm_eps and rope_theta in single precision."""
    both_floats = isinstance(d.old, float) and isinstance(d.new, float)
    return both_floats and math.isclose(d.old, d.new, rel_tol=1e-6)
