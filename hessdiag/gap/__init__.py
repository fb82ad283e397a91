"""Measures that are said to go with generalization, each with its formula, source, invariances and cost.

A measure is a small function of a `checkpoint.Checkpoint`, registered under a name in `registry`; others join
by entry points. None of them is a guarantee, and a smaller value is not by itself better.
"""
