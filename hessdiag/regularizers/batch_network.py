"""The three-layer network behind a closure: recognized once, checked on values at every step."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.closed_form import Gradients, Recognized, ThreeLayer, Traces, plan, recognize, three_layer
from hessdiag.engine.checks.seen import Seen
from hessdiag.engine.products.ranks import Pieces, ranks
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.errors import Refused
from hessdiag.problem import Problem
from hessdiag.samples import draw

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of logits and loss, relative to float64
PASS = 2e6  # multiply-adds that fit into what one gradient costs beside its own, whatever the size (measured)
ONE_HOT = 1e-3  # targets recovered from the loss's gradient are this close to a class, or they are soft


class BatchNetwork:
    """Exact traces of the current batch's Hessian where a model is a three-layer network under cross-entropy.

    Inputs, outputs z and the loss's gradient by z are watched during the gradient's pass. If the loss is the mean
    cross-entropy of N rows, the targets are softmax(z) − N · gradient; that it is, the loss's value proves.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = Problem(model, {"train": ()}, criterion="cross_entropy").bare_model()
        self._known: Recognized | None = None
        self._params: tuple[Tensor, ...] = ()
        self._places: tuple[Tensor | None, ...] = ()

    def traces(self, batch: BatchLoss, most: float = math.inf) -> tuple[Pieces, Traces | Refused]:
        """The loss's gradient, and the traces with their gradients or why there are none; 1 gradient.

        The first time also about 9 gradients of 16 samples, to prove that the model is the network found in it.

        Args:
            batch: the current one.
            most: what the traces may cost, in gradients of the batch (by multiply-adds: predicted, not timed).
        """
        with Seen(self._model) as seen:
            gradient = batch.gradient()
        if ranks() > 1:
            return gradient, Refused("several processes: tr H² of the union is no mean over ranks")
        if not seen.calls or not seen.regular:
            return gradient, Refused("the closure does not call the model on one tensor and get one back")
        x, z, grad = (torch.cat([call[i].flatten(1).double() for call in seen.calls]) for i in range(3))
        y = torch.softmax(z, 1) - len(z) * grad
        hard = y.argmax(1)
        classes = bool((y - F.one_hot(hard, y.shape[1])).abs().max() < ONE_HOT)
        targets = hard if classes else y
        tolerance = TOLERANCE.get(seen.calls[0][1].dtype, 0.0)
        loss = float(batch.loss) if batch.loss is not None else float("nan")
        if not abs(float(F.cross_entropy(z, targets)) - loss) <= tolerance * (1 + abs(loss)):
            return gradient, Refused("the closure's loss is not the mean cross-entropy of the model's outputs")
        net = self._network(batch.params, x, targets)
        if isinstance(net, Refused):
            return gradient, net
        if not float((net.forward(x) - z).abs().max()) <= tolerance * (1 + float(z.abs().max())):
            return gradient, Refused("the model's outputs in training are not the network's (dropout?)")
        takes = plan(net, len(x), gradient=True).cost.multiply_adds / (3 * len(x) * net.size + PASS)
        if takes > most:
            return gradient, Refused(
                f"the closed form would cost about {takes:.2g} gradients, more than {most:.2g}"
            )
        return gradient, three_layer(net, [(x, targets)], gradient=True)

    def pieces(self, gradients: Gradients) -> tuple[Tensor, ...]:
        """A gradient of the network as tensors in the order and dtype of the batch's parameters."""
        held = [(p, g) for p, g in zip(self._places, gradients.tensors, strict=True) if p is not None]
        found = {id(p): g for p, g in held if g is not None}
        return tuple(found[id(p)].to(p.dtype) for p in self._params)

    def _network(self, params: tuple[Tensor, ...], x: Tensor, targets: Tensor) -> ThreeLayer | Refused:
        """The network with the weights of now, or why it is none."""
        if self._known is None:
            problem = Problem(self._model, {"train": (x, targets)}, criterion="cross_entropy")
            found = recognize(problem, draw((x, targets), samples=len(x), batch_size=len(x)))
            if isinstance(found, Refused):
                return found
            self._known = found
        named = dict(self._model.named_parameters())
        self._params, self._places = params, tuple(None if n is None else named[n] for n in self._known.names)
        inside = {id(p) for p in self._places if p is not None}
        trained = {id(p) for p in params}
        if not trained <= inside:
            return Refused("the optimizer trains parameters outside of the network")
        one, two, three, four = (None if p is None else p.detach().double() for p in self._places)
        if one is None or three is None:
            return Refused("a layer has no weights")
        first, second, third, fourth = (p is not None and id(p) in trained for p in self._places)
        return ThreeLayer(one, two, three, four, self._known.net.activation, (first, second, third, fourth))
