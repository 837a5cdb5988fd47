"""Documents on disk to packed, resumable batches. Of layer 1 it imports only `text`."""
