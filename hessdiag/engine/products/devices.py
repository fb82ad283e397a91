"""Devices and precisions by name."""

from __future__ import annotations

import torch

from hessdiag.errors import UsageError


def device_of(name: str | torch.device | None) -> torch.device | None:
    """The device, tried.

    Raises:
        UsageError: there is none of this name.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        msg = f"`device={str(name)!r}` is not available; available devices: {have}"
        raise UsageError(msg) from error
    return device
