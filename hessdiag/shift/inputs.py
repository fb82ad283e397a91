"""Inputs and scores as arrays, refused where they do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.hashing import sha256
from hessdiag.shift.results import Array, Levels


def rows(values: Any, name: str) -> Array:
    """Inputs as (examples, features), float64.

    Raises:
        UsageError: they are not numbers, not finite, or there are none.
    """
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.dtype.kind not in "biuf" or array.ndim < 2 or not array.size:
        msg = f"{name} is {array.dtype} {array.shape}: numbers of shape (examples, features...) are needed"
        raise UsageError(msg)
    flat: Array = array.reshape(len(array), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        msg = f"{name} holds NaN or infinity: clean the data"
        raise UsageError(msg)
    return flat


def per_example(scores: Any, inputs: Any) -> Array:
    """Scores as (examples,), float64, one for each of ``inputs``.

    Raises:
        UsageError: they are not.
    """
    array = scores.detach().cpu().double().numpy() if isinstance(scores, Tensor) else np.asarray(scores)
    if array.dtype.kind not in "biuf" or array.shape != (len(inputs),):
        msg = f"scores are {array.dtype} {array.shape}: one number for each of {len(inputs)} examples is needed"
        raise UsageError(msg)
    return np.asarray(array, np.float64)


def digest(inputs: Any) -> str:
    """sha256 of shape and content."""
    array = rows(inputs, "inputs")
    return str(sha256(repr(array.shape).encode(), array.tobytes()).hexdigest())


def make_levels(
    shifts: Array,
    weights: Array,
    scores: Array,
    name: str,
    groups: Any = None,
    strata: NDArray[np.int64] | None = None,
) -> Levels:
    """Levels, with each example its own group and all in one stratum unless told otherwise.

    Raises:
        UsageError: groups that are not one per example.
    """
    size = weights.shape[1]
    if groups is None:
        members = np.arange(size)
    else:
        given = np.asarray(groups)
        if given.shape != (size,):
            msg = f"groups have shape {given.shape}: one for each of {size} examples is needed"
            raise UsageError(msg)
        members = np.unique(given, return_inverse=True)[1].astype(np.int64)
    layers = np.zeros(members.max() + 1, np.int64) if strata is None else strata
    return Levels(shifts=shifts, weights=weights, scores=scores, groups=members, strata=layers, digest=name)
