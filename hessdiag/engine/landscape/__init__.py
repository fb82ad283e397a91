"""Losses and gradients around the checkpoint, for measures that move the weights."""
