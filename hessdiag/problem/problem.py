"""The one description everything resolves to: a model, its data, what is minimised, which parameters count."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessdiag.criteria import TARGET_KEYS, Called, Criterion, how_called, recognized, target_of
from hessdiag.criteria.calling import call, name_of
from hessdiag.errors import NothingMatchedError, ProblemError, UsageError
from hessdiag.problem.arguments import LOSSES, fields_of, require_loss, splits_of
from hessdiag.problem.names import matching
from hessdiag.problem.passes import require_scalar, takes_each, unwrapped
from hessdiag.samples import row_count


@dataclass(repr=False)
class Problem:
    """A model and the mean loss whose curvature is asked for.

    Attributes:
        model: any ``nn.Module``; it is never changed.
        data: a map-style dataset, a ``DataLoader``, a tuple of tensors, or an iterable of batches; or several, by
            split name. One alone is "train".
        criterion: ``"cross_entropy"`` (targets -100 do not count), ``"causal_lm"`` (the same of the next token:
            outputs (batch, tokens, words), labels (batch, tokens) not yet shifted), ``"mse"`` (mean over all
            elements); torch's ``nn.CrossEntropyLoss``, ``nn.NLLLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``,
            ``nn.HuberLoss``, ``nn.SmoothL1Loss``, ``nn.L1Loss`` with their options, their functional forms and
            partials of these; or a mean loss of your own, ``f(outputs, batch)`` or ``f(outputs, targets)``: by the
            name of its second argument, else the first of the two that works on the first batch. Gives the
            Hessian, the Gauss-Newton matrix and their difference. Names mean what torch's functions of that name
            do on the same tensors; a sum is the sum over the samples measured.
        forward: ``f(model, batch)`` returning the outputs; by default the model is called on the batch's first
            element, or on a dict's entries without its labels.
        loss: ``f(model, batch)`` returning the mean loss, instead of a criterion: gives the Hessian only.
        params: globs on parameter names; ``"!glob"`` leaves out. Frozen parameters never count.
        metric: ``f(outputs, batch)``, a score per batch, for reports.
        meta: facts about the run (lr, epoch, weight decay ...), kept with the results.
        weight: ``f(batch)``, how many terms a custom loss's mean stands for, such as unmasked tokens; by default
            the number of rows. The built-in criteria count for themselves; with a weight a batch's mean counts
            by that.
        blocks: names of the modules that follow one another, for ``method="layer_streamed"``; by default the alike
            children of a ``ModuleList`` or ``Sequential`` with most parameters.
        optimizer: that the model was trained with, or its state dict, for ``preconditioned_lambda_max``.
        loss_chosen: the loss is another than the model's own on purpose: where they differ, that is a note.

    >>> import hessdiag, torch
    >>> from torch import nn
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> hessdiag.Problem(nn.Linear(5, 3), {"train": (x, y)}, criterion="cross_entropy")
    <Problem of Linear, 18 parameters: cross_entropy/mean on train>
    """

    model: nn.Module
    data: Any
    criterion: str | Criterion | Callable[[Any, Any], Tensor] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    params: Sequence[str] = ("*",)
    metric: Callable[[Any, Any], Tensor] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    weight: Callable[[Any], float] | None = None
    blocks: Sequence[str] | None = None
    optimizer: Any = None
    loss_chosen: bool = False
    _called = cast("Called | None", None)
    _known = cast("tuple[Any, Criterion | None] | None", None)

    def __post_init__(self) -> None:
        """Refuse a description that contradicts itself."""
        if not isinstance(self.model, nn.Module):
            msg = f"model is {type(self.model).__name__}; a torch.nn.Module is needed: return Problem(model=...)"
            raise ProblemError(msg)
        self.data = splits_of(self.data)
        if (self.criterion is None) == (self.loss is None):
            msg = f"give one of criterion ({LOSSES}, nn.CrossEntropyLoss(), or f(outputs, targets)) and "
            raise ProblemError(msg + "loss f(model, batch)")
        if self.criterion is not None:
            require_loss(self.criterion)
        self.params = (self.params,) if isinstance(self.params, str) else self.params
        self.blocks = (self.blocks,) if isinstance(self.blocks, str) else self.blocks

    @classmethod
    def of(cls, model: nn.Module, loss_fn: Any, data: Any, *, call: str = "Problem.of", **fields: Any) -> Problem:
        """The problem of a model, a loss and data as a training loop has them.

        Args:
            model: any ``nn.Module``.
            loss_fn: whatever ``criterion`` takes, or ``f(model, batch)``, told by the name of its first argument.
            data: whatever ``data`` takes.
            call: what refusals name.
            **fields: the other fields of a problem.

        Raises:
            ProblemError: an argument is something else; its text says what to type.

        >>> import hessdiag, torch
        >>> from torch import nn
        >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
        >>> hessdiag.Problem.of(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y))
        <Problem of Linear, 18 parameters: cross_entropy/mean on train>
        """
        return cls(**fields_of(model, loss_fn, data, call), **fields)

    def __repr__(self) -> str:
        """Model, loss and how it is called, splits."""
        size = sum(parameter.numel() for parameter in self.bare_model().parameters() if not is_lazy(parameter))
        called = f" called as {self.called}" if self.built_in is None else ""
        splits = ", ".join(map(str, self.data))
        return (
            f"<Problem of {type(self.model).__name__}, {size:,} parameters: {self.loss_name}{called} on {splits}>"
        )

    @property
    def has_outputs(self) -> bool:
        """Whether the loss is criterion ∘ outputs, so that G and R exist."""
        return self.criterion is not None

    @property
    def loss_name(self) -> str:
        """How the loss is called in fingerprints: "cross_entropy/mean", or a function's qualified name."""
        if self.built_in is not None:
            return self.built_in.label
        return name_of(self.criterion or self.loss)

    @property
    def built_in(self) -> Criterion | None:
        """The criterion, where its formula is known: it counts its terms, and its curvature has a closed form."""
        if self._known is None or self._known[0] is not self.criterion:
            self._known = (self.criterion, recognized(self.criterion))
        return self._known[1]

    @property
    def called(self) -> str:
        """How a loss of one's own is called; both ways, as long as no batch has told."""
        if self.loss is not None:
            return "f(model, batch)"
        named = None if self.criterion is None else how_called(self.criterion)
        return self._called or named or "f(outputs, batch) or f(outputs, targets)"

    def on(self, batches: Iterable[Any]) -> Problem:
        """This problem on a sample set: the mean that a sum is a multiple of then has its factor."""
        known = self.built_in
        if known is None or known.reduction == "mean" or known.scale is not None:
            return self
        terms = math.fsum(float(known.terms(known.targets(batch))) for batch in batches)
        return replace(self, criterion=known.summed_over(terms))

    def split(self, name: str) -> Any:
        """The data of a split.

        Raises:
            UsageError: there is none of this name.
        """
        if name not in self.data:
            msg = f"`split={name!r}`: the problem has {', '.join(self.data)}"
            raise UsageError(msg)
        return self.data[name]

    def bare_model(self) -> nn.Module:
        """The model without DataParallel, DistributedDataParallel or torch.compile around it."""
        return unwrapped(self.model)

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
        return model(*inputs) if takes_each(model, inputs) else model(inputs)

    def loss_sum(self, outputs: Any, batch: Any) -> Tensor:
        """The criterion summed over what it averages: sum / `count` is the mean loss."""
        if (known := self.built_in) is not None:
            total = known.total(outputs, self.targets(batch))
            return total if self.weight is None else total * self._weight_of_a_term(batch)
        return require_scalar(self.mean_loss(outputs, batch), "criterion") * self.count(batch)

    def mean_loss(self, outputs: Any, batch: Any) -> Tensor:
        """A loss of one's own on a batch, called as its arguments say.

        Raises:
            UsageError: the problem has none.
        """
        if not callable(self.criterion):
            msg = "this problem gives a loss(model, batch) only: there are no outputs to differentiate by"
            raise UsageError(msg)
        likely = self._called or how_called(self.criterion)
        value, self._called = call(self.criterion, outputs, batch, likely, sure=self._called is not None)
        return cast("Tensor", value)

    def targets(self, batch: Any) -> Tensor:
        """What a built-in criterion compares the outputs with, place by place; for "causal_lm" the next tokens."""
        known = self.built_in
        return target_of(batch) if known is None else known.targets(batch)

    def _weight_of_a_term(self, batch: Any) -> Any:
        assert self.built_in is not None
        own = self.built_in.terms(self.targets(batch))
        own = torch.where(own > 0, own, 1) if isinstance(own, Tensor) else max(own, 1)
        return self.count(batch) / own

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
        if (known := self.built_in) is not None:
            known.check(batch)
            return float(known.terms(known.targets(batch)))
        if (rows := row_count(batch)) is None:
            msg = "cannot tell how many examples a batch holds: give Problem(weight=f(batch))"
            raise ProblemError(msg)
        return float(rows)
