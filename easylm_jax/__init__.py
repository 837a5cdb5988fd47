"""easylm_jax: pretrain, fine-tune and study LLaMA-style language models in JAX.

import easylm_jax as el
lm = el.load("PATH")
lm.generate(["Once upon a time"], max_new_tokens=64)
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load`, imported when asked for (PEP 562): to import a part of the package stays cheap."""
    if name == "load":
        from easylm_jax.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
