"""The gate: did the sharpness of a checkpoint change by more than is allowed?

Budgets of a configuration are held against intervals; a verdict is pass, fail or cannot tell, and what was not
measured has none. Everything here imports without torch, but `gate` and `subject`, which measure.
"""
