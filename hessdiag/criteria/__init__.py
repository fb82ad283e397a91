"""Losses of outputs and targets: the built-in names, torch's own losses, and the tensors that they compare."""

from hessdiag.criteria.calling import Called, how_called
from hessdiag.criteria.criterion import CRITERIA, Criterion
from hessdiag.criteria.layout import (
    IGNORE_INDEX,
    TARGET_KEYS,
    align_classes,
    is_index,
    kind_of,
    single,
    squared_error,
    target_of,
)
from hessdiag.criteria.recognize import by_torch, recognized

__all__ = [
    "CRITERIA",
    "IGNORE_INDEX",
    "TARGET_KEYS",
    "Called",
    "Criterion",
    "align_classes",
    "by_torch",
    "how_called",
    "is_index",
    "kind_of",
    "recognized",
    "single",
    "squared_error",
    "target_of",
]
