"""Where a loss has kinks, or jumps in its second derivative: differences of gradients do not converge there."""

from __future__ import annotations

from typing import Any

from hessdiag.engine.products.functional import Functional

KINKED = (
    *("ReluBackward", "LeakyReluBackward", "PreluKernel", "RreluWithNoise", "ThresholdBackward", "AbsBackward"),
    *("HardtanhBackward", "HardsigmoidBackward", "HardswishBackward", "ClampBackward", "ClampM"),
    *("EluBackward", "CeluBackward", "SoftshrinkBackward", "HardshrinkBackward", "SmoothL1Loss", "HuberLoss"),
    *("MultiMarginLoss", "MultilabelMarginLoss", "MaxPool", "AdaptiveMaxPool", "FractionalMaxPool"),
    *("MaximumBackward", "MinimumBackward", "FmaxBackward", "FminBackward", "MaxBackward", "MinBackward"),
    *("AmaxBackward", "AminBackward", "AminmaxBackward", "CummaxBackward", "CumminBackward", "TopkBackward"),
    *("SortBackward", "KthvalueBackward", "MedianBackward", "NanmedianBackward", "ModeBackward"),
    *("RoundBackward", "FloorBackward", "CeilBackward", "TruncBackward", "SignBackward", "SgnBackward"),
)


def kinks(function: Functional, batch: Any) -> tuple[str, ...]:
    """Names of the autograd nodes of one loss that are known for kinks."""
    return tuple(name for name in function.operations(batch) if name.startswith(KINKED))
