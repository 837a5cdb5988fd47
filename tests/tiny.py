"""A model small enough to compile in a second, with parameters at which every term matters.

Its parameters and packed batches come from the NumPy reference's generators. Tests of the model,
the objectives, the step and the meshes use it; it is not a test.
"""

import jax
import jax.numpy as jnp
import numpy as np

from easylm_jax.batch import Batch
from easylm_jax.formats.foreign import abstract_params
from easylm_jax.models.attention import AttentionConfig
from easylm_jax.models.llama import LlamaConfig
from tests.reference import numpy_llama

VOCAB = 64
DIMS = numpy_llama.Dims(num_heads=4, num_kv_heads=2, head_dim=8)
BLOCKS = AttentionConfig(block_q=8, block_k=8)
REFERENCE = AttentionConfig(implementation="reference")


def tiny_config(**changes) -> LlamaConfig:
    shape = dict(vocab_size=VOCAB, d_model=32, num_layers=2, d_ff=48, max_seq_len=64)
    heads = dict(num_heads=4, num_kv_heads=2, head_dim=8)
    return LlamaConfig(
        **shape | heads | dict(norm_eps=1e-5, attention=BLOCKS, remat="none") | changes
    )


def tiny_params(seed: int = 0):
    rng = np.random.default_rng(seed)
    params = numpy_llama.random_params(DIMS, rng, vocab=VOCAB, width=32, ffn=48)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)


def on_one_device(config: LlamaConfig):
    """What `import_params` shall make: the parameters of `config`, whole on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract_params(config)
    )


def tiny_batch(seed: int = 0, *, rows: int = 4, length: int = 24, **options) -> Batch:
    """Two or three documents a row and a padded tail; a third of the weights is 0."""
    rng = np.random.default_rng(seed)
    options |= {"vocab": VOCAB, "batch_size": rows, "length": length}
    return as_batch(numpy_llama.random_batch(rng, **options))


def as_batch(arrays: dict[str, np.ndarray]) -> Batch:
    """Names -> arrays of any integer and float type, as the batch of the package."""
    return Batch(
        **{
            k: jnp.asarray(v, jnp.float32 if k == "weights" else jnp.int32)
            for k, v in arrays.items()
        }
    )


def assert_close(got, expected, *, rtol: float) -> None:
    """Every leaf to within `rtol` of its largest entry."""

    def compare(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30)
        assert error <= rtol, f"{jax.tree_util.keystr(path)}: {error:.1e} of the largest entry"

    jax.tree_util.tree_map_with_path(compare, got, expected)
