"""easylm_jax: pretrain, fine-tune and study LLaMA-style language models in JAX."""
