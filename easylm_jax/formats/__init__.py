"""Foreign checkpoints in and out: Hugging Face, Meta, GGUF, EasyLM, llama2.c."""
