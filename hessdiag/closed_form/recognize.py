"""A three-layer network found inside a user's model, proven by value; or one line saying why not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.closed_form.activations import KNOWN, OTHERS, Activation, activation
from hessdiag.closed_form.gradient import Gradients
from hessdiag.closed_form.network import ThreeLayer
from hessdiag.closed_form.rows import Batch, Rows
from hessdiag.criteria import align_classes, target_of
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.gradients import gradient
from hessdiag.errors import HessdiagError, Refused, UsageError, one_line
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, leaves, map_tensors

PASSIVE = (nn.Flatten, nn.Unflatten, nn.Dropout, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHECKED = 16  # samples on which the network found must be the model
SHIFTS = (0.0, 0.1, 0.3)  # also away from the checkpoint, in steps of this length relative to each tensor
TOLERANCE = 1e-9  # relative, float64: layers in another order of summation agree to 1e-14


@dataclass(frozen=True)
class Recognized:
    """A model as a three-layer network.

    Attributes:
        net: with the checkpoint's weights in float64.
        names: the model's names of hidden weight, hidden bias, output weight, output bias; None where absent.
        batches: the sample set as (inputs, targets).
    """

    net: ThreeLayer
    names: tuple[str, str | None, str, str | None]
    batches: tuple[Batch, ...]

    def named(self, gradients: Gradients) -> dict[str, Tensor]:
        """Gradients by the model's parameter names, those that count."""
        triples = zip(self.names, gradients.tensors, self.net.counts, strict=True)
        return {name: g for name, g, counts in triples if counts and name is not None and g is not None}


def recognize(problem: Problem, samples: SampleSet, *, kind: str = "hessian") -> Recognized | Refused:
    """The three-layer network a problem's model is, or why it is none.

    Two ``nn.Linear`` with an elementwise activation between them, in a Sequential or as attributes, Flatten,
    Dropout and Identity anywhere; biases optional, frozen tensors allowed. Never trusted by structure: outputs and
    gradient must agree with the model's on 16 samples, at the checkpoint and at two points away from it.

    Args:
        problem: with criterion "cross_entropy".
        samples: the frozen sample set.
        kind: "hessian" or "ggn".

    Returns:
        The network with its data; or one line with the reason. Cost: 3 gradients of 16 samples, per activation
        tried where the model's forward applies it as a function.
    """
    if kind not in ("hessian", "ggn"):
        return Refused(f"operator {kind!r}: the closed form gives the Hessian and the Gauss-Newton matrix")
    known = problem.built_in
    if known is None or known.name != "cross_entropy" or not known.plain:
        return Refused(f"the loss is {problem.loss_name}: the closed form is for criterion 'cross_entropy'")
    if problem.weight is not None:
        return Refused(
            "Problem(weight=...) changes what a batch's mean stands for: the closed form counts targets"
        )
    found = _layers(problem.bare_model())
    if isinstance(found, Refused):
        return found
    try:
        batches = tuple(_rows(batch, found.linears[0][1].in_features) for batch in samples.batches)
        function = Functional(problem, dtype=torch.float64)
    except (HessdiagError, RuntimeError, TypeError) as error:
        return Refused(one_line(error))
    return _proven(found, function, samples, batches, kind)


@dataclass(frozen=True)
class _Found:
    linears: tuple[tuple[str, nn.Linear], tuple[str, nn.Linear]]
    activations: tuple[Activation, ...]  # to be tried
    modules: int  # of them, those the model itself holds

    @property
    def names(self) -> tuple[str, str | None, str, str | None]:
        first, second = (f"{name}." if name else "" for name, _ in self.linears)
        biases = [None if layer.bias is None else "bias" for _, layer in self.linears]
        return (
            first + "weight",
            first + "bias" if biases[0] else None,
            second + "weight",
            second + "bias" if biases[1] else None,
        )

    def parameters(self) -> dict[str, Tensor]:
        """The two layers' tensors by name, detached."""
        layers = (layer for _, layer in self.linears)
        tensors = [t for layer in layers for t in (layer.weight, layer.bias)]
        pairs = zip(self.names, tensors, strict=True)
        return {name: tensor.detach() for name, tensor in pairs if name is not None}


def _layers(model: nn.Module) -> _Found | Refused:
    """Two plain linear layers that own all parameters, and what may stand between them."""
    linears = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    rest = [m for m in model.modules() if type(m) is not nn.Linear]
    owners = [m for m in rest if next(m.parameters(recurse=False), None) is not None]
    if owners:
        return Refused(
            f"{type(owners[0]).__name__} has parameters of its own: the closed form knows two nn.Linear only"
        )
    odd = [name for name, layer in linears if set(layer._parameters) != {"weight", "bias"}]
    if odd:
        return Refused(
            f"{odd[0]} computes its weight from other tensors (pruning, a norm): not the plain layer needed"
        )
    if len(linears) != 2:
        return Refused(f"{len(linears)} linear layers: the closed form is for exactly two, one hidden layer")
    if sum(1 for _ in model.parameters()) != sum(1 for _, m in linears for _ in m.parameters()):
        return Refused("the layers share a tensor: the closed form needs weights of their own")
    first, second = linears
    if first[1].out_features != second[1].in_features:
        first, second = second, first
    if first[1].out_features != second[1].in_features:
        return Refused("the two linear layers do not follow each other: outputs and inputs differ in number")
    active = [
        m for m in rest if not isinstance(m, PASSIVE) and next(m.children(), None) is None and m is not model
    ]
    # where the forward applies a function instead, the values tell which
    return _Found((first, second), (*map(activation, active), *KNOWN.values(), *OTHERS), len(active))


def _rows(batch: Any, features: int) -> Batch:
    """The batch's only input as (n, d), its targets as (n,) or (n, C).

    Raises:
        UsageError: another number of inputs, or rows that do not match.
    """
    targets = target_of(batch)
    inputs = [leaf for leaf in leaves(batch) if leaf is not targets]
    if len(inputs) != 1 or not inputs[0].is_floating_point():
        msg = f"{len(inputs)} inputs per batch: the closed form takes one floating-point tensor"
        raise UsageError(msg)
    x = inputs[0]
    x = x.reshape(-1, features) if x.shape[-1] == features else x.flatten(1)
    flat = targets.reshape(-1, targets.shape[-1]) if targets.is_floating_point() else targets.reshape(-1)
    if len(x) != len(flat) or x.shape[1] != features:
        msg = f"inputs {tuple(inputs[0].shape)} and targets {tuple(targets.shape)}: it needs rows of {features}"
        raise UsageError(msg)
    return x, flat


def _proven(
    found: _Found, function: Functional, samples: SampleSet, batches: tuple[Batch, ...], kind: str
) -> Recognized | Refused:
    """The network with the first activation whose outputs and gradients are the model's."""
    piece = function.place(map_tensors(samples.batches[0], lambda leaf: leaf[:CHECKED]))
    reasons = []
    for candidate in found.activations:
        net = _network(found, function, function.theta, candidate, kind)
        try:
            reason = _difference(found, function, piece, candidate)
            # a rare branch (an overflow guard, ReLU6) may show on few samples
            pairs = zip(samples.batches, batches, strict=True)
            if not reason and not all(_agree(net, function, function.theta, *pair) for pair in pairs):
                reason = _unlike(candidate)
        except (HessdiagError, RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = f"the model could not be compared with a three-layer network: {one_line(error, 160)}"
        if not reason:
            return Recognized(net, found.names, batches)
        reasons.append(reason)
    if found.modules == 1:
        return Refused(reasons[0])
    return Refused(f"tried {len(reasons)} activations, {found.activations[0].name} first: {reasons[0]}")


def _difference(found: _Found, function: Functional, piece: Any, candidate: Activation) -> str:
    """Where model and network differ in outputs or gradient, at the checkpoint and away from it; or nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = _rows(piece, found.linears[0][1].in_features)
    for step in SHIFTS:
        theta = tuple(_moved(tensor, step, generator) for tensor in function.theta)
        net = _network(found, function, theta, candidate, "hessian")
        if not _agree(net, function, theta, piece, rows):
            return _unlike(candidate)
        with function.measuring():
            theirs = function.split(gradient(function, piece, theta))
        ours = dict(zip(found.names, _gradients(net, rows), strict=True))
        for name, grad in zip(function.names, theirs, strict=True):
            if not _close(ours[name], grad):
                return f"the gradient by {name} is not that of two linear layers around {candidate.name}"
    return ""


def _unlike(candidate: Activation) -> str:
    return f"the model's outputs are not those of two linear layers around {candidate.name}"


def _agree(net: ThreeLayer, function: Functional, theta: tuple[Tensor, ...], batch: Any, rows: Batch) -> bool:
    placed = function.place(batch)
    with function.measuring(), torch.no_grad():
        logits, _ = align_classes(function.outputs(theta, placed), target_of(placed))
    return _close(net.forward(rows[0].to(logits.device, torch.float64)), logits)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not bool(torch.isfinite(other).all()):
        return False
    return float((one - other).abs().max()) <= TOLERANCE * (float(other.abs().max()) + 1e-300)


def _moved(tensor: Tensor, step: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    scale = float(tensor.detach().square().mean().sqrt()) or 1.0
    return (tensor.detach() + step * scale * noise).requires_grad_()


def _network(
    found: _Found, function: Functional, theta: tuple[Tensor, ...], candidate: Activation, kind: str
) -> ThreeLayer:
    frozen = {n: p.to(function.device, torch.float64) for n, p in found.parameters().items()}
    here = {**frozen, **dict(zip(function.names, theta, strict=True))}
    hidden, hidden_bias, output, output_bias = (None if n is None else here[n].detach() for n in found.names)
    if hidden is None or output is None:
        msg = "a linear layer without weight: the closed form needs both"
        raise UsageError(msg)
    one, two, three, four = (name in function.names for name in found.names)
    return ThreeLayer(hidden, hidden_bias, output, output_bias, candidate, (one, two, three, four), kind == "ggn")


def _gradients(net: ThreeLayer, rows: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the summed loss by hidden weight and bias, output weight and bias."""
    everything = Rows(net, [rows], len(rows[0]))
    (tile,) = everything
    by_z = tile.r * (tile.w / everything.scale)[:, None]
    by_a = (by_z @ net.output) * tile.h1
    return by_a.T @ tile.x, by_a.sum(0), by_z.T @ tile.h, by_z.sum(0)
