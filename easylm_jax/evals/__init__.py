"""Evaluators: what a model is worth, measured on the mesh it is trained on."""
