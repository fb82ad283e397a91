"""Gradients of training steps, for regularizers."""
