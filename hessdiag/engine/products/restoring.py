"""What a step of several passes must put back: weights, BatchNorm statistics, random states."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import parametrize

from hessdiag.engine.products.devices import offered
from hessdiag.engine.products.ranks import Pieces


class Weights:
    """The weights where a step began: moved from, and put back bit for bit from a copy, whatever happens.

    A context manager. Leaving it, normally or through an exception or KeyboardInterrupt, copies the weights back.
    Costs one copy of the weights in memory.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = tuple(params)
        self._origin = tuple(param.detach().clone() for param in self.params)

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def restore(self) -> None:
        """θ = θ₀, bit for bit."""
        with torch.no_grad():
            for param, origin in zip(self.params, self._origin, strict=True):
                param.copy_(origin)
        forget_copies()

    @contextmanager
    def moved(self, moves: Pieces, scale: float = 1.0) -> Iterator[None]:
        """θ = θ₀ + scale · moves inside, θ₀ afterwards; None means that this parameter stays.

        A graph built at θ₀ may be used again afterwards: the bits are the same, so the versions are put back too.
        """
        with torch.autograd._unsafe_preserve_version_counter(self.params):  # type: ignore[attr-defined]
            try:
                with torch.no_grad():
                    for param, origin, move in zip(self.params, self._origin, moves, strict=True):
                        if move is not None:
                            param.copy_(origin).add_(move, alpha=scale)
                forget_copies()
                yield
            finally:
                self.restore()


def forget_copies() -> None:
    """Drop what torch made of the weights before they moved.

    Entered around the step, both keep it from pass to pass: autocast its half-precision copies,
    parametrize.cached() the parametrized tensors.
    """
    torch.clear_autocast_cache()
    parametrize._cache.clear()


class Statistics:
    """Running means, variances and counters of the BatchNorm and InstanceNorm layers that a pass calls.

    Inside `held` every such layer works on copies, the same at each entry, so that its own buffers keep their bits
    whichever ``momentum`` (None too) and ``track_running_stats`` it has, while the outputs are the usual ones.
    `commit` writes what the passes made of them.

    Args:
        model: whose layers are meant. None: those that are called, found by a global forward hook, which makes
            ``torch.compile`` compile anew at every pass.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._layers = None if model is None else [m for m in model.modules() if isinstance(m, _NormBase)]
        self._held: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor | None]]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Forward passes inside change copies only."""
        seen = {id(module) for module, _, _ in self._held}
        for module, _, copies in self._held:
            module._buffers.update(copies)

        def swap(module: nn.Module, _: object) -> None:
            if isinstance(module, _NormBase) and id(module) not in seen:
                seen.add(id(module))
                copies = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
                self._held.append((module, dict(module._buffers), copies))
                module._buffers.update(copies)

        handle = register_module_forward_pre_hook(swap) if self._layers is None else None
        try:
            for layer in self._layers or ():
                swap(layer, None)
            yield
        finally:
            if handle is not None:
                handle.remove()
            for module, own, _ in self._held:
                module._buffers.update(own)

    def commit(self) -> None:
        """The layers' own buffers take the values that the copies ended with."""
        for _, own, copies in self._held:
            for name, buffer in own.items():
                copy = copies[name]
                if buffer is not None and copy is not None:
                    buffer.copy_(copy)


class Randomness:
    """The random state a step began with, so that dropout masks agree between its passes."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._cpu = torch.get_rng_state()
        self._devices = drawing(param.device for param in params)
        self._states = [offered(device, "get_rng_state")(device) for device in self._devices]

    def replay(self) -> None:
        """Torch's generators, on the CPU and the parameters' devices, as they were at the start."""
        torch.set_rng_state(self._cpu)
        for device, state in zip(self._devices, self._states, strict=True):
            offered(device, "set_rng_state")(state, device)


def drawing(devices: Iterable[torch.device]) -> list[torch.device]:
    """Those that have a random stream of their own, each once."""
    return [device for device in dict.fromkeys(devices) if offered(device, "get_rng_state") is not None]


@contextmanager
def random_states(*devices: torch.device) -> Iterator[None]:
    """The random states of torch on the CPU and on these devices, of numpy and of Python, put back afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for device in drawing(devices):
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
