"""What a training step will need, worked out before there is a machine: called by plan.py."""
