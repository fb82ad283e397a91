"""Devices and precisions by name; what PyTorch says of an accelerator, whichever it is."""

from __future__ import annotations

from typing import Any

import torch

from hessdiag.errors import UsageError

HOST = ("cpu", "meta")  # nothing to wait for, no random stream beside the CPU's


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
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        have = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        msg = f"`device={str(name)!r}` is not available; available devices: {have}"
        raise UsageError(msg) from error
    return device


def is_accelerator(device: torch.device) -> bool:
    """Whether a device is another than the CPU: work is queued there, and it has random streams of its own."""
    return device.type not in HOST


def offered(device: torch.device, name: str) -> Any:
    """``torch.cuda.NAME``, ``torch.xpu.NAME`` and so on; None where this kind of device offers no such thing."""
    return getattr(torch.get_device_module(device), name, None) if is_accelerator(device) else None


def started() -> torch.device | None:
    """The accelerator that this program uses; None without one. Nothing is started by asking."""
    found = torch.accelerator.current_accelerator(check_available=True)
    initialized = None if found is None else offered(found, "is_initialized")
    return found if initialized is None or initialized() else None


def wait(device: torch.device | None = None) -> None:
    """Until a device, or the accelerator that is in use, has done what it was given."""
    device = device or started()
    if device is not None and is_accelerator(device):
        torch.accelerator.synchronize(device)


def empty_cache(device: torch.device) -> None:
    """Give memory that PyTorch keeps for later back to the device."""
    emptied = offered(device, "empty_cache")
    if emptied is not None:
        emptied()


def name_of(device: torch.device) -> str | None:
    """What an accelerator's maker calls it; None for the CPU, and where PyTorch does not say."""
    said = offered(device, "get_device_name")
    return None if said is None else str(said(device))
