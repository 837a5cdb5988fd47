"""The published models: their parameter counts, and that each can be trained at full size."""

import functools
import math

import jax
import pytest

from easylm_jax.mesh import make_mesh
from easylm_jax.models.llama import PARAM_RULES, LlamaConfig, init_params, num_params
from easylm_jax.models.presets import PRESETS, preset
from easylm_jax.optim import OptimConfig, make_optimizer
from easylm_jax.train_state import abstract_state, init_state
from easylm_jax.tree import named_leaves

# As the published checkpoints hold them, tied embeddings counted once.
PUBLISHED = {
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_33b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "open_llama_3b": 3_426_473_600,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "mistral_7b": 7_241_732_096,
    "qwen2_0.5b": 494_032_768,
}
OURS = {"debug", "tiny", "small", "1b"}


def count(cfg: LlamaConfig) -> int:
    """The number of parameters by arithmetic on the shape alone."""
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    attention = cfg.d_model * (2 * q + 2 * kv) + cfg.qkv_bias * (q + 2 * kv)
    layer = attention + 3 * cfg.d_model * cfg.d_ff + 2 * cfg.d_model
    tables = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    return tables + cfg.num_layers * layer + cfg.d_model


def test_every_preset_is_published_or_ours():
    assert set(PRESETS) == set(PUBLISHED) | OURS


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters(name):
    cfg = preset(name)
    assert num_params(cfg) == count(cfg) == PUBLISHED.get(name, count(cfg))


@pytest.mark.parametrize("name", PRESETS)
def test_training_state_at_full_size_splits_over_eight_devices(name):
    """Shapes, rules and divisibility of parameters and both Adam moments; no memory is used."""
    cfg, optimizer = preset(name), make_optimizer(OptimConfig(), lambda step: 0.0 * step)
    make_state = functools.partial(init_state, functools.partial(init_params, cfg), optimizer, 0)
    state = abstract_state(make_state, make_mesh("1,8,1,1"), PARAM_RULES)
    held = [jax.tree.leaves(tree) for tree in (state.params, state.opt_state)]
    sizes = [sum(leaf.size for leaf in leaves) for leaves in held]
    assert sizes[0] == count(cfg) and sizes[1] - 2 * sizes[0] in (1, 2)  # moments, step counts
    for name, leaf in named_leaves(state.params).items():
        ways = 1 if name.endswith(("scale", "bias")) else 8
        assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * ways == leaf.size, name


def test_fields_can_be_replaced_and_a_wrong_name_gets_the_near_ones():
    assert preset("llama_7b", num_layers=3).num_layers == 3
    assert preset("llama_7b").num_layers == 32
    with pytest.raises(ValueError, match="unknown model 'lama_7b'; near it: .*llama_7b"):
        preset("lama_7b")
