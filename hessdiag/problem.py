"""The one description everything resolves to: a model, its data, what is minimised, which parameters count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.errors import NothingMatchedError, ProblemError, UsageError
from hessdiag.samples import row_count

CRITERIA = ("cross_entropy", "mse")
TARGET_KEYS = ("labels", "label", "target", "targets", "y")
IGNORE_INDEX = -100  # torch's own default for positions that do not count


@dataclass
class Problem:
    """A model and the mean loss whose curvature is asked for.

    Attributes:
        model: any ``nn.Module``; it is never changed.
        data: split name to a map-style dataset, a ``DataLoader``, a tuple of tensors, or an iterable of batches.
        criterion: ``"cross_entropy"`` (targets -100 do not count), ``"mse"`` (mean over all elements), or
            ``f(outputs, batch)`` returning the mean loss. Gives the Hessian, the Gauss-Newton matrix and their
            difference.
        forward: ``f(model, batch)`` returning the outputs; by default the model is called on the batch's first
            element, or on a dict's entries without its labels.
        loss: ``f(model, batch)`` returning the mean loss, instead of a criterion: gives the Hessian only.
        params: globs on parameter names; ``"!glob"`` leaves out. Frozen parameters never count.
        metric: ``f(outputs, batch)``, a score per batch, for reports.
        meta: facts about the run (lr, epoch, weight decay ...), kept with the results.
        weight: ``f(batch)``, how many terms a custom loss's mean stands for (unmasked tokens, say); by default
            the number of rows. The built-in criteria count for themselves.
        blocks: names of the modules that follow one another, for ``--way layer_streamed``; by default the alike
            children of a ``ModuleList`` or ``Sequential`` with most parameters.
    """

    model: nn.Module
    data: Mapping[str, Any]
    criterion: str | Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    params: Sequence[str] = ("*",)
    metric: Callable[[Any, Any], Tensor] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    weight: Callable[[Any], float] | None = None
    blocks: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse a description that contradicts itself."""
        if not isinstance(self.model, nn.Module):
            msg = f"model is {type(self.model).__name__}; a torch.nn.Module is needed: return Problem(model=...)"
            raise ProblemError(msg)
        if not isinstance(self.data, Mapping) or not self.data:
            msg = 'data must name at least one split: data={"train": dataset}'
            raise ProblemError(msg)
        if (self.criterion is None) == (self.loss is None):
            msg = 'give one of criterion ("cross_entropy", "mse" or f(outputs, batch)) and loss f(model, batch)'
            raise ProblemError(msg)
        if isinstance(self.criterion, str) and self.criterion not in CRITERIA:
            msg = f"criterion {self.criterion!r}: allowed are {', '.join(CRITERIA)} or f(outputs, batch)"
            raise ProblemError(msg)
        if isinstance(self.criterion, nn.Module):
            name = type(self.criterion).__name__
            msg = f"criterion {name}(): give lambda outputs, batch: loss(outputs, batch[1]), or a built-in name"
            raise ProblemError(msg)
        if isinstance(self.params, str):
            self.params = (self.params,)
        if isinstance(self.blocks, str):
            self.blocks = (self.blocks,)

    @property
    def has_outputs(self) -> bool:
        """Whether the loss is criterion ∘ outputs, so that G and R exist."""
        return self.criterion is not None

    @property
    def loss_name(self) -> str:
        """How the loss is called in fingerprints: "cross_entropy/mean", or a function's qualified name."""
        if isinstance(self.criterion, str):
            return f"{self.criterion}/mean"
        function = self.criterion or self.loss
        return str(getattr(function, "__qualname__", type(function).__name__))

    def bare_model(self) -> nn.Module:
        """The model without DataParallel, DistributedDataParallel or torch.compile around it."""
        model = self.model
        while True:
            inner = getattr(model, "_orig_mod", None)
            if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
                inner = model.module
            if not isinstance(inner, nn.Module):
                return model
            model = inner

    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters that count, in the model's order, tied ones once.

        Raises:
            ProblemError: the model has nothing trainable.
            NothingMatchedError: the globs match nothing.
        """
        named = dict(self.bare_model().named_parameters())
        trainable = [n for n, p in named.items() if p.requires_grad and (p.is_floating_point() or p.is_complex())]
        if not trainable:
            msg = f"the model has no trainable floating-point parameters ({len(named)} in all): unfreeze some"
            raise ProblemError(msg)
        chosen = matching(trainable, self.params)
        if not chosen:
            some = ", ".join(trainable[:5]) + (" ..." if len(trainable) > 5 else "")
            msg = f"--params {' '.join(self.params)} matches no trainable parameter; there are {some}"
            raise NothingMatchedError(msg)
        return chosen

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs on a batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Mapping):
            result = model(**{key: value for key, value in batch.items() if key not in TARGET_KEYS})
            return getattr(result, "logits", result)
        return model(batch if isinstance(batch, Tensor) else batch[0])

    def loss_sum(self, outputs: Any, batch: Any) -> Tensor:
        """The criterion summed over what it averages: sum / `count` is the mean loss."""
        if self.criterion == "cross_entropy":
            logits, targets = align_classes(outputs, target_of(batch))
            if targets.is_floating_point():
                return -(targets * F.log_softmax(logits, dim=-1)).sum()
            return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
        if self.criterion == "mse":
            # not F.mse_loss: its forward-mode derivative fails in torch 2.13 (pytorch#123996)
            difference: Tensor = outputs - target_of(batch).reshape(outputs.shape)
            return difference.square().sum()
        if not callable(self.criterion):
            msg = "this problem gives a loss(model, batch) only: there are no outputs to differentiate by"
            raise UsageError(msg)
        return require_scalar(self.criterion(outputs, batch), "criterion") * self.count(batch)

    def total(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch times what its mean stands for; the data set's loss is Σ total / Σ `count`."""
        if self.loss is not None:
            return require_scalar(self.loss(model, batch), "loss") * self.count(batch)
        return self.loss_sum(self.outputs(model, batch), batch)

    def count(self, batch: Any) -> float:
        """How many terms the batch's mean loss stands for: its weight in the data set's mean.

        Raises:
            ProblemError: a custom loss on a batch without rows, and no ``weight``.
        """
        if self.weight is not None:
            return float(self.weight(batch))
        if self.criterion == "cross_entropy":
            targets = target_of(batch)
            if targets.is_floating_point():
                return float(targets.shape[:-1].numel())
            return float((targets != IGNORE_INDEX).sum())
        if self.criterion == "mse":
            return float(target_of(batch).numel())
        rows = row_count(batch)
        if rows is None:
            msg = "cannot tell how many examples a batch holds: give Problem(weight=f(batch))"
            raise ProblemError(msg)
        return float(rows)


def matching(names: Iterable[str], globs: Sequence[str]) -> tuple[str, ...]:
    """The names that a glob takes in and no ``"!glob"`` leaves out; without a glob that takes in, all are in."""
    include = [g for g in globs if not g.startswith("!")] or ["*"]
    exclude = [g[1:] for g in globs if g.startswith("!")]
    return tuple(
        name
        for name in names
        if any(fnmatchcase(name, g) for g in include) and not any(fnmatchcase(name, g) for g in exclude)
    )


def target_of(batch: Any) -> Tensor:
    """The targets of a batch: its second element, or a dict's entry called labels, target or y.

    Raises:
        ProblemError: there are none.
    """
    target: Any = None
    if isinstance(batch, Mapping):
        target = next((batch[key] for key in TARGET_KEYS if key in batch), None)
    elif isinstance(batch, Sequence) and len(batch) > 1:
        target = batch[1]
    if not isinstance(target, Tensor):
        msg = f"no targets in a batch of type {type(batch).__name__}: give (inputs, targets), or a criterion"
        raise ProblemError(msg)
    return target


def align_classes(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as (n, classes) and targets as (n,) or (n, classes), whether classes come last or second.

    Raises:
        ProblemError: shapes that fit neither, or both.
    """
    if not isinstance(outputs, Tensor):
        msg = f"the model returns {type(outputs).__name__}, not logits: give forward=lambda model, batch: ..."
        raise ProblemError(msg)
    if targets.is_floating_point() and targets.shape == outputs.shape:
        return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1, outputs.shape[-1])
    last = outputs.dim() == targets.dim() + 1 and outputs.shape[:-1] == targets.shape
    second = (
        outputs.dim() == targets.dim() + 1
        and outputs.dim() > 2
        and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    )
    if last == second:
        why = "could be read two ways" if last else "do not fit"
        msg = (
            f"logits {tuple(outputs.shape)} and targets {tuple(targets.shape)} {why} (classes last or second): "
            "give criterion=lambda outputs, batch: ..."
        )
        raise ProblemError(msg)
    if second:
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1).long()


def require_scalar(value: Any, name: str) -> Tensor:
    """The value, if it is a scalar floating tensor.

    Raises:
        ProblemError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        msg = f"{name} returned {shape}, not a scalar: return the mean loss of the batch"
        raise ProblemError(msg)
    return value.reshape(())
