"""Intervals of scores and gaps, and rank correlation over runs; numpy and scipy only."""
