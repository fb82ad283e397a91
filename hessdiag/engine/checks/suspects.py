"""What in a model is known to spoil second derivatives, and the way out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.engine.checks.kinks import kinks
from hessdiag.engine.products.curvature import Curvature


def suspects(operator: Curvature) -> str:
    """What in the model is known for silently wrong second derivatives, and the way out."""
    found = []
    for name, module in operator.function.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found.append(f"{name} masks its gradient at padding_idx (set {name}.padding_idx = None)")
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            found.append(f"{name} scales its gradient by frequency (set {name}.scale_grad_by_freq = False)")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            found.append(f"{name} rewrites its rows in forward (set {name}.max_norm = None)")
        if "WeightNorm" in type(module).__name__:
            found.append(f"{name} uses weight_norm, wrong in torch 2.13 (write g * v / v.norm() instead)")
    piece = operator.function.place(operator.trial)
    for operation in operator.function.operations(piece):
        if operation.startswith("WeightNormInterface") and not any("weight_norm" in cause for cause in found):
            found.append("weight_norm is wrong in torch 2.13 (write g * v / v.norm() instead)")
        if operation.startswith("custom "):
            found.append(f"{operation} has no true second derivative (write its backward in torch operations)")
    if not found and (bent := kinks(operator.function, piece)):
        return (
            f"an operation's second derivative is wrong, or kinks ({bent[0]}) lie too close together for "
            "differences: take a checkpoint after some steps"
        )
    return "; ".join(dict.fromkeys(found)) or (
        "an operation's second derivative is wrong, or detach, no_grad, .data or a straight-through estimator "
        "hides a dependence on the weights, so that the gradient is not the loss's (a branch that stays fixed: "
        "read it from a frozen copy of the model)"
    )


def half_precision(operator: Curvature, dtype: torch.dtype) -> str:
    """Where the forward computes in half precision, and the way out."""
    name, autocast = _first_half(operator)
    where = f"{name or 'the model'} computes in {str(dtype).removeprefix('torch.')}"
    why = "whose products are off by percents"
    if autocast:
        return (
            f"{where} under torch.autocast, {why}: enter autocast in the training loop, not in forward, or "
            "`dtype='float64'`, which autocast leaves alone"
        )
    return f"{where} by a cast in the forward or the loss, {why}: cast to the weights' dtype, x.to(weight.dtype)"


def _first_half(operator: Curvature) -> tuple[str, bool]:
    """The first module that gives half precision, and whether autocast is on while the modules run."""
    names: list[str] = []
    autocast: list[bool] = []

    def look(name: str, output: Any) -> None:
        autocast.append(torch.is_autocast_enabled(operator.device.type))
        if isinstance(output, Tensor) and output.is_floating_point() and output.dtype.itemsize < 4:
            names.append(name)

    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
        for name, module in operator.function.modules()
    ]
    try:
        operator.function.operations(operator.function.place(operator.trial))
    finally:
        for handle in handles:
            handle.remove()
    return (names[0] if names else ""), any(autocast)
