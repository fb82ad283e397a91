"""What an exception of torch means: memory ran out, or an operation has no second derivative."""

from __future__ import annotations

import torch

from hessdiag.errors import one_line

OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "std::bad_alloc",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "HIP error: out of memory",
    "MPS backend out of memory",
    "_STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN, cuSOLVER, cuSPARSE
    "DEVICE_ALLOCATION_FAILED",  # of cuDNN 9
    "ERROR_OUT_OF_DEVICE_MEMORY",  # of the driver of XPUs
    "ERROR_OUT_OF_RESOURCES",
)
"""What torch and the libraries below it say in a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the CPU or of an accelerator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


KEPT_GRAPH = (
    "the model or the loss keeps a tensor with its graph from one pass to the next (a cached weight, a hook's "
    "list): compute it anew in every forward"
)


def is_kept_graph(error: BaseException) -> bool:
    """Whether a pass met the graph of an earlier one."""
    return "a second time" in str(error)


def is_unsupported(error: BaseException) -> bool:
    """Whether autograd says that an operation has no second derivative."""
    text = str(error)
    signs = (
        "is not implemented",
        "does not support",
        "not implemented for",
        "marked with @once_differentiable",
        "setup_context",
        "double backward",
    )
    return isinstance(error, NotImplementedError) or any(sign in text for sign in signs)


def unsupported(error: BaseException) -> str:
    """One line naming the operation without a second derivative, and the way out."""
    return (
        f"an operation has no second derivative ({one_line(error, 160)}): replace it by one that has, or "
        "`method='finite_difference'`"
    )


def to_check(error: BaseException) -> str:
    """What to look at where the user's own code fails."""
    text = str(error)
    if isinstance(error, RuntimeError) and ("same dtype" in text or "BFloat16" in text or "Half" in text):
        return "the forward casts to a precision of its own, cast to that of the weights (x.to(weight.dtype))"
    return "check shapes and labels"
