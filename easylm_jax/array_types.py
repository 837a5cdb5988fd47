"""The legend of dimension letters, and names for the few arrays that travel between files.

    B batch     T query length   S key length   D model width   N query heads   K key/value heads
    G = N / K   H head width     F feed-forward width           V vocabulary    L layers

The letters are used as name suffixes (`q_BTNH`), in einsum strings and in jaxtyping annotations.
They name logical dimensions, never the size of one shard. `axis` is a mesh axis, `dim` an array
dimension. A file that needs another letter says so at its top.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, Key

Params = dict[str, Any]  # nested dict of arrays, as `flax.linen.Module.init` returns under "params"
PRNGKey = Key[Array, ""]

Tokens = Int[Array, "B T"]
TokenFloats = Float[Array, "B T"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T V"]
Queries = Float[Array, "B T N H"]
Keys = Float[Array, "B S K H"]
Mask = Bool[Array, "B T S"]
Scalar = Float[Array, ""]
