"""Strings to segments of token ids with loss weights. Knows no arrays of the model, no files of data."""
