"""A checkpoint as the measures see it: what several of them need is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from hessdiag.engine.landscape.landscape import Landscape, LossAndGradient
from hessdiag.engine.landscape.scores import Scores
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import UsageError
from hessdiag.problem import Problem
from hessdiag.results import Analysis
from hessdiag.samples import SampleSet

Result = TypeVar("Result")
LayerKind = Literal["linear", "conv", "embedding", "norm"]
_KINDS: tuple[tuple[LayerKind, tuple[type[nn.Module], ...]], ...] = (
    ("linear", (nn.Linear,)),
    ("conv", (_ConvNd,)),
    ("embedding", (nn.Embedding, nn.EmbeddingBag)),
    ("norm", (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)),
)


@dataclass(frozen=True)
class WeightLayer:
    """A module with a weight.

    Attributes:
        name: in the model; "" for a model that is one layer.
        module: as it stands in the user's model; not to be changed.
        weight: detached, in the measurement's dtype; a convolution's is (out, in / groups, *kernel).
        bias: likewise, or None.
        kind: "linear", "conv", "embedding" or "norm".
    """

    name: str
    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    kind: LayerKind


class Checkpoint:
    """A trained model on a frozen sample set.

    Attributes:
        problem: model, data and loss.
        samples: what is measured on.
        operator: the curvature of the mean loss there.
        landscape: the loss around the checkpoint.
        analysis: of the same checkpoint and samples, or None: measures of curvature need it.
        facts: of the run, as the checkpoint's file tells them.
        seed: names every random stream.
    """

    def __init__(
        self,
        problem: Problem,
        samples: SampleSet,
        operator: Curvature,
        *,
        analysis: Analysis | None = None,
        start: Mapping[str, Tensor] | None = None,
        facts: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Gather; nothing is computed yet.

        Args:
            problem: model, data and loss.
            samples: the operator's.
            operator: of kind "hessian" or "ggn".
            analysis: of the same operator.
            start: weights before training, by parameter name.
            facts: of the run, beside ``problem.meta``.
            seed: of all draws.
        """
        self.problem, self.samples, self.operator = problem, samples, operator
        self.analysis, self.facts, self.seed = analysis, dict(facts or {}), seed
        self.landscape = Landscape(operator)
        self._start = start
        self._kept: dict[str, Any] = {}

    @property
    def meta(self) -> Mapping[str, Any]:
        """Hyper-parameters of the run; ``Problem.meta`` counts where the file says something else."""
        return {**self.facts, **self.problem.meta}

    @property
    def size(self) -> int:
        """P, the number of parameters that count."""
        return self.operator.size

    @property
    def examples(self) -> int:
        """n, the number of examples measured on."""
        return self.samples.examples

    @property
    def training_size(self) -> int:
        """m, the number of examples trained on: the split's size if known, else the number measured on."""
        return self.samples.available or self.samples.examples

    @cached_property
    def theta(self) -> Tensor:
        """The parameters that count, (P,), in the measurement's dtype."""
        return self.operator.function.flat(self.operator.function.theta).detach()

    @cached_property
    def start(self) -> Tensor | None:
        """The same parameters before training, (P,), or None if not given.

        Raises:
            UsageError: one is missing or has another shape.
        """
        if self._start is None:
            return None
        function, pieces = self.operator.function, []
        for name, theta in zip(function.names, function.theta, strict=True):
            piece = self._start.get(name)
            if piece is None or piece.shape != theta.shape:
                what = "no such tensor" if piece is None else f"shape {tuple(piece.shape)}"
                msg = f"initial weights: {name} ({tuple(theta.shape)}) has {what}; give those of the same model"
                raise UsageError(msg)
            pieces.append(piece.detach().to(theta.device, theta.dtype))
        return function.flat(tuple(pieces))

    def once(self, name: str, compute: Callable[[], Result]) -> Result:
        """What ``compute`` gives, computed at the first call with this name: for measures that share a search."""
        if name not in self._kept:
            self._kept[name] = compute()
        result: Result = self._kept[name]
        return result

    @cached_property
    def normalized(self) -> Landscape:
        """The landscape of the loss on logits that are centred and divided by their length."""
        return Landscape(self.operator, normalize=True)

    @cached_property
    def scores(self) -> Scores:
        """Loss, hit, margin and confidence of every example; one forward pass."""
        return self.landscape.examples()

    @property
    def loss(self) -> float:
        """Mean loss on the samples."""
        return self._gradient.loss

    @property
    def accuracy(self) -> float | None:
        """Share of the positions classified right, or None without integer classes."""
        return self._gradient.accuracy

    @property
    def gradient(self) -> Tensor:
        """Gradient (P,) of the mean loss, float64; one gradient, with `loss` and `accuracy`."""
        return self._gradient.gradient

    @cached_property
    def layers(self) -> tuple[WeightLayer, ...]:
        """The layers with weights in the order in which the model calls them; those it does not call, last."""
        modules = dict(self.operator.function.modules())
        names = (*self.landscape.order, *modules)
        found = [self._layer(name, modules[name]) for name in dict.fromkeys(names)]
        return tuple(layer for layer in found if layer is not None)

    @cached_property
    def _gradient(self) -> LossAndGradient:
        return self.landscape.loss_and_gradient()

    def _layer(self, name: str, module: nn.Module) -> WeightLayer | None:
        kind = next((kind for kind, types in _KINDS if isinstance(module, types)), None)
        weight = getattr(module, "weight", None)
        if kind is None or not isinstance(weight, Tensor):
            return None
        bias = getattr(module, "bias", None)
        placed = [
            None if not isinstance(t, Tensor) else t.detach().to(self.operator.device, self.operator.dtype)
            for t in (weight, bias)
        ]
        return WeightLayer(name, module, placed[0], placed[1], kind) if placed[0] is not None else None
