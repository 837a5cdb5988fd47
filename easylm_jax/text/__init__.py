"""Strings to segments of token ids with loss weights: no model, no data files."""
