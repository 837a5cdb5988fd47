"""Case: the part of a training run that decides what a step needs. What the planner plans.

`plan.py` makes one of a TrainConfig; the searcher makes others by `dataclasses.replace`.
"""

import dataclasses
from collections.abc import Mapping

from easylm_jax import mesh
from easylm_jax.models.llama import LlamaConfig
from easylm_jax.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step."""

    model: LlamaConfig
    optim: OptimConfig
    batch_size: int  # rows per step, over all chips
    seq_len: int  # tokens per row
    micro_batches: int
    mesh: str  # as in mesh.py; may still hold a -1

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def check_divides(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError unless rows, tokens and heads split over a mesh of `sizes`."""
        rows = self.batch_size // self.micro_batches
        heads = self.model.num_kv_heads
        mesh.check_divides(sizes, rows=rows, seq_len=self.seq_len, num_kv_heads=heads)
