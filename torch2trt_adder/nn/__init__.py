"""Adder layers as modules: layers, what replaces others by them, training, checkpoints."""
