"""Models that cannot be measured as they are, known by looking at them: each refusal has its way out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessdiag.errors import UsageError


def require_plain(model: nn.Module) -> None:
    """Refuse what has no parameters of its own to be swapped, or none that can be differentiated twice.

    Raises:
        UsageError: TorchScript, lazy, sharded, quantized or sparse parts; one line with the way out.
    """
    for name, module in model.named_modules():
        reason = _of_module(module)
        if reason:
            where = f"{name or type(module).__name__} of the model" if module is not model else "the model"
            msg = f"{where} {reason}"
            raise UsageError(msg)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        reason = _of_tensor(tensor)
        if reason:
            msg = f"{name} {reason}"
            raise UsageError(msg)


def _of_module(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, whose parameters cannot be swapped: give the nn.Module it came from"
    if kind.__name__ == "FullyShardedDataParallel":
        return "is sharded by FSDP: gather the full state dict, load it into the unwrapped model, and measure that"
    if ".quantized" in kind.__module__ and kind.__module__.startswith(("torch.ao.", "torch.nn.")):
        return f"is quantized ({kind.__name__}), without gradients: measure the floating-point model it came from"
    return ""


def _of_tensor(tensor: Tensor) -> str:
    if is_lazy(tensor):
        return (
            "is not initialized yet (a lazy module): call the model once on an example before you return it, "
            "or write the layer with its sizes"
        )
    if type(tensor.data).__name__ == "DTensor":
        return (
            "is sharded (DTensor): gather the full state dict, load it into the unwrapped model, and measure that"
        )
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}: second derivatives need it dense (tensor.to_dense())"
    return ""
