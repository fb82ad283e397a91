"""Stacks of blocks, as in transformers: where they are, each as a function of θ, and the model around them.

The user's model is never changed, not even for a moment: the modules that lead to the blocks are copied shallowly,
and in the copy others stand where the blocks were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hessdiag.engine.products.functional import Functional, one_tensor
from hessdiag.engine.products.swapping import swapped
from hessdiag.errors import MeasurementError, ProblemError
from hessdiag.problem import Problem

Enter = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Block:
    """One block as a function of the parameters that count.

    Attributes:
        name: of the module.
        module: the user's own; its tensors are swapped during a call only.
        learned: the module's names of parameters that count, with their indices in θ.
        fixed: its other parameters and its buffers, by their names in it.
    """

    name: str
    module: nn.Module
    learned: Mapping[str, int]
    fixed: Mapping[str, Tensor]

    @property
    def indices(self) -> tuple[int, ...]:
        """The part of θ it takes."""
        return tuple(self.learned.values())

    def __call__(self, theta: Sequence[Tensor], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module returns on (x, *args), with ``theta`` in the order of `indices`."""
        learned = dict(zip(self.learned, theta, strict=True))
        # a copy: blocks may write into what they are given
        with swapped(self.module, {**self.fixed, **learned}):
            return self.module(x.clone(), *args, **kwargs)

    def stream(self, output: Any) -> Tensor:
        """What the next block gets: the output, or its first entry.

        Raises:
            MeasurementError: that is no tensor.
        """
        stream = output[0] if isinstance(output, list | tuple) and output else output
        if not isinstance(stream, Tensor):
            refuse(
                f"{self.name} returns {type(output).__name__}, neither a tensor nor a tuple that begins with one"
            )
        return stream


def find_blocks(function: Functional) -> tuple[Block, ...]:
    """The blocks that ``Problem(blocks=[...])`` names, or else the stack with most parameters.

    A stack is the children of a ``ModuleList`` or ``Sequential`` that follow one another and are alike: one class,
    the same parameters' shapes, two of them or more.

    Raises:
        ProblemError: a name is none of the model's.
        MeasurementError: there is no stack.
    """
    model, problem = function.problem.bare_model(), function.problem
    names = _largest_stack(model) if problem.blocks is None else tuple(problem.blocks)
    if not names:
        refuse("no two alike modules follow one another in a ModuleList or Sequential")
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            msg = f"blocks={list(names)}: there is no module {name!r}; allowed: names of model.named_modules()"
            raise ProblemError(msg)
    blocks = tuple(_block(function, name, known[name]) for name in names)
    if any(p.is_complex() for p in model.parameters()):
        refuse("the model has complex parameters")
    return blocks


def has_blocks(function: Functional) -> bool:
    """Whether `find_blocks` finds any."""
    try:
        return bool(find_blocks(function))
    except (MeasurementError, ProblemError):
        return False


def refuse(why: str) -> NoReturn:
    """Raise an error that names the assumption that does not hold, and the way out.

    Raises:
        MeasurementError: always.
    """
    needs = "blocks called once each, in order, each on the output of the one before alone"
    cure = "name them in Problem(blocks=[...]), or take `method='auto'`"
    msg = f"`method='layer_streamed'`: {why}; it needs {needs}: {cure}"
    raise MeasurementError(msg)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding, as one computation done twice is."""
    return bool(alike(a, b))


def alike(a: Tensor, b: Tensor) -> Tensor:
    """`same`, unread: on the device of ``b``."""
    if a is b or a.shape != b.shape:
        return torch.tensor(a is b)
    off, scale = (a.detach() - b.detach()).norm().double(), b.detach().norm().double()
    near: Tensor = off <= scale * math.sqrt(torch.finfo(b.dtype).eps)
    return near


class Around:
    """The model around its blocks: a call of it calls ``enter(number, args, kwargs)`` where a block was called.

    Attributes:
        indices: of the parameters in θ that the model has outside of its blocks.
    """

    def __init__(self, function: Functional, blocks: Sequence[Block], enter: Enter) -> None:
        """Copies the modules that lead to the blocks; their tensors and all other modules are shared."""
        model = function.problem.bare_model()
        stands: dict[nn.Module, nn.Module] = {
            block.module: _Stand(block, number, enter) for number, block in enumerate(blocks)
        }
        self._problem: Problem = function.problem
        self._model = _with(stands, model)
        learned, fixed = _tensors(function, model, self._model)
        self.indices = tuple(learned.values())
        theta = {name: function.theta[index] for name, index in learned.items()}
        self._tensors = {**fixed, **theta}

    def total(self, batch: Any) -> Tensor:
        """The batch's summed loss at the checkpoint, a scalar."""
        total: Tensor = self._call(self._problem.total, batch)
        return total

    def outputs(self, batch: Any) -> Tensor:
        """The model's outputs at the checkpoint.

        Raises:
            UsageError: they are not one tensor.
        """
        return one_tensor(self._call(self._problem.outputs, batch))

    def _call(self, function: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        with swapped(self._model, self._tensors):
            return function(self._model, batch)


class _Stand(nn.Module):
    """Stands where a block was; plain facts that a forward asks of the block are answered by the block."""

    def __init__(self, block: Block, number: int, enter: Enter) -> None:
        super().__init__()
        # not as a submodule: its parameters are none of the model's around
        self.__dict__.update(real=block, number=number, enter=enter, training=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["enter"](self.__dict__["number"], args, kwargs)

    def __getattr__(self, name: str) -> Any:
        block: Block = self.__dict__["real"]
        value = getattr(block.module, name)
        if isinstance(value, Tensor) or callable(value):
            refuse(f"the model uses {block.name}.{name} by itself")
        return value


def _with(known: dict[nn.Module, nn.Module], module: nn.Module) -> nn.Module:
    """The module with others in place of some in it, ``known``; what leads to them is copied, nothing else."""
    if module not in known:
        known[module] = module
        children = {name: None if c is None else _with(known, c) for name, c in module._modules.items()}
        if any(children[name] is not child for name, child in module._modules.items()):
            twin = type(module).__new__(type(module))
            # not copy.copy, which asks __getstate__, and a module may refuse that
            twin.__dict__ = {**module.__dict__, "_modules": children, "training": False}
            known[module] = twin
    return known[module]


def _block(function: Functional, name: str, module: nn.Module) -> Block:
    return Block(name, module, *_tensors(function, function.problem.bare_model(), module))


def _tensors(function: Functional, model: nn.Module, part: nn.Module) -> tuple[dict[str, int], dict[str, Tensor]]:
    """A part's names of parameters that count with their indices in θ, and of its other tensors with copies."""
    place = {name: index for index, name in enumerate(function.names)}
    known = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    found = {name: known[id(tensor)] for name, tensor in (*part.named_parameters(), *part.named_buffers())}
    learned = {name: place[full] for name, full in found.items() if full in place}
    fixed = {name: function.fixed[full] for name, full in found.items() if full not in place}
    return learned, fixed


def _largest_stack(model: nn.Module) -> tuple[str, ...]:
    best: tuple[str, ...] = ()
    most = 0
    for parent, container in model.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        children = [(name, child) for name, child in container._modules.items() if child is not None]
        for kind, group in groupby(children, key=lambda item: _kind(item[1])):
            run = list(group)
            size = len(run) * sum(shape.numel() for _, shape in kind[1])
            if len(run) > 1 and size > most:
                best, most = tuple(f"{parent}.{name}" if parent else name for name, _ in run), size
    return best


def _kind(module: nn.Module) -> tuple[type, tuple[tuple[str, torch.Size], ...]]:
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())
