"""The one description everything resolves to: a model, its data, what is minimised, which parameters count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.criteria import (
    CRITERIA,
    IGNORE_INDEX,
    TARGET_KEYS,
    align_classes,
    check_values,
    squared_error,
    targets_of,
    terms,
)
from hessdiag.errors import NothingMatchedError, ProblemError, UsageError
from hessdiag.samples import row_count


@dataclass
class Problem:
    """A model and the mean loss whose curvature is asked for.

    Attributes:
        model: any ``nn.Module``; it is never changed.
        data: split name to a map-style dataset, a ``DataLoader``, a tuple of tensors, or an iterable of batches.
        criterion: ``"cross_entropy"`` (targets -100 do not count), ``"causal_lm"`` (the same of the next token:
            outputs (batch, tokens, words), labels (batch, tokens) not yet shifted), ``"mse"`` (mean over all
            elements), or ``f(outputs, batch)`` returning the mean loss. Gives the Hessian, the Gauss-Newton matrix
            and their difference. Names mean what torch's functions of that name do on the same tensors.
        forward: ``f(model, batch)`` returning the outputs; by default the model is called on the batch's first
            element, or on a dict's entries without its labels.
        loss: ``f(model, batch)`` returning the mean loss, instead of a criterion: gives the Hessian only.
        params: globs on parameter names; ``"!glob"`` leaves out. Frozen parameters never count.
        metric: ``f(outputs, batch)``, a score per batch, for reports.
        meta: facts about the run (lr, epoch, weight decay ...), kept with the results.
        weight: ``f(batch)``, how many terms a custom loss's mean stands for (unmasked tokens, say); by default
            the number of rows. The built-in criteria count for themselves; with a weight a batch's mean counts
            by that.
        blocks: names of the modules that follow one another, for ``method="layer_streamed"``; by default the alike
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
            names = ", ".join(f'"{name}"' for name in CRITERIA)
            msg = f"give one of criterion ({names} or f(outputs, batch)) and loss f(model, batch)"
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
            msg = f"`params={[*self.params]}` matches no trainable parameter; there are {some}"
            raise NothingMatchedError(msg)
        return chosen

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs on a batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Mapping):
            result = model(**{key: value for key, value in batch.items() if key not in TARGET_KEYS})
            return getattr(result, "logits", result)
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        return model(*inputs) if _takes_each(model, inputs) else model(inputs)

    def loss_sum(self, outputs: Any, batch: Any) -> Tensor:
        """The criterion summed over what it averages: sum / `count` is the mean loss."""
        if isinstance(self.criterion, str):
            total = self._built_in_sum(outputs, batch)
            return total if self.weight is None else total * self._weight_of_a_term(batch)
        if not callable(self.criterion):
            msg = "this problem gives a loss(model, batch) only: there are no outputs to differentiate by"
            raise UsageError(msg)
        return require_scalar(self.criterion(outputs, batch), "criterion") * self.count(batch)

    def targets(self, batch: Any) -> Tensor:
        """What a built-in criterion compares the outputs with, place by place; for "causal_lm" the next tokens."""
        return targets_of(self.criterion, batch)

    def _built_in_sum(self, outputs: Any, batch: Any) -> Tensor:
        targets = self.targets(batch)
        if self.criterion == "mse":
            return squared_error(outputs, targets).sum()
        logits, targets = align_classes(outputs, targets, self.criterion)
        if targets.is_floating_point():
            return -(targets * F.log_softmax(logits, dim=-1)).sum()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    def _weight_of_a_term(self, batch: Any) -> Any:
        own = terms(str(self.criterion), self.targets(batch))
        return self.count(batch) / (own.clamp(min=1) if isinstance(own, Tensor) else max(own, 1))

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
        if isinstance(self.criterion, str):
            targets = self.targets(batch)
            check_values(self.criterion, targets)
            return float(terms(self.criterion, targets))
        rows = row_count(batch)
        if rows is None:
            msg = "cannot tell how many examples a batch holds: give Problem(weight=f(batch))"
            raise ProblemError(msg)
        return float(rows)


def _takes_each(model: nn.Module, inputs: Any) -> bool:
    """Whether inputs ``(x1, x2)`` are the model's arguments one by one: it cannot be called with one."""
    if not isinstance(inputs, list | tuple):
        return False
    try:
        signature = inspect.signature(model.forward)
        signature.bind(inputs)
    except TypeError:
        return True
    except ValueError:  # code without a signature
        return False
    return False


def matching(names: Iterable[str], globs: Sequence[str]) -> tuple[str, ...]:
    """The names that a glob takes in and no ``"!glob"`` leaves out; without a glob that takes in, all are in."""
    include = [g for g in globs if not g.startswith("!")] or ["*"]
    exclude = [g[1:] for g in globs if g.startswith("!")]
    return tuple(
        name
        for name in names
        if any(fnmatchcase(name, g) for g in include) and not any(fnmatchcase(name, g) for g in exclude)
    )


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
