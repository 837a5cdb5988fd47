"""Documents on disk to packed, resumable batches. May import `text`, and nothing else of layer 1."""
