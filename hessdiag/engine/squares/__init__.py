"""Squares of per-example gradients, and the exact trace of G made of them."""
