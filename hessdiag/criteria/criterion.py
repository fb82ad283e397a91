"""A loss whose formula is known: its terms are counted exactly, and its second derivative has a closed root.

A loss over classes is −Σ_c q_c log p_c per position, p = softmax of the logits, where q holds the target, class
weights and label smoothing; its Hessian by the logits is (Σ_c q_c) (diag p − p pᵀ). The other losses are sums over
single elements, whose Hessian is diagonal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hessdiag.criteria.elements import LAWS, aligned, factors
from hessdiag.criteria.layout import (
    IGNORE_INDEX,
    align_classes,
    check_index,
    check_values,
    counting,
    is_index,
    kind_of,
    squared_error,
    target_of,
)
from hessdiag.errors import ProblemError
from hessdiag.hashing import content, sha256

CRITERIA = ("cross_entropy", "mse", "causal_lm")
"""Names that `Problem.criterion` takes. Their layouts are wider than torch's: classes last or second."""
CLASSES = ("cross_entropy", "causal_lm", "nll")


@dataclass(frozen=True, eq=False)
class Criterion:
    """One of the built-in criteria or of torch's losses, with what it was given.

    Attributes:
        name: "cross_entropy", "causal_lm", "nll", "mse", "binary_cross_entropy", "huber", "smooth_l1" or "l1".
        given: torch's name for it, for messages; empty for a built-in criterion.
        weight: per class (C,); of a binary loss per output, anything that broadcasts.
        pos_weight: of a binary loss, what a positive target weighs, anything that broadcasts.
        label_smoothing: in [0, 1].
        ignore_index: class indices that do not count.
        reduction: torch's: "mean" over what counts, or "sum" over the sample set.
        width: where the Huber losses turn linear, δ or β.
        scale: what the mean is multiplied by: of a sum the number of its terms, once the sample set is known.
    """

    name: str
    given: str = ""
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = IGNORE_INDEX
    reduction: Literal["mean", "sum"] = "mean"
    width: float = 1.0
    scale: float | None = None

    @property
    def of_classes(self) -> bool:
        """Whether it is a cross-entropy of logits."""
        return self.name in CLASSES

    @property
    def plain(self) -> bool:
        """Whether nothing but its name matters: no weights, no smoothing, a mean over all but -100."""
        options = (self.weight, self.pos_weight, self.label_smoothing or None)
        return options == (None, None, None) and (self.ignore_index, self.reduction) == (IGNORE_INDEX, "mean")

    @property
    def unweighted(self) -> bool:
        """Whether every term counts alike, and no sum makes a multiple of them."""
        return self.weight is None and self.reduction == "mean"

    @property
    def shown(self) -> str:
        """As messages name it: "mse" in quotes, or torch's name."""
        return f"{self.given}()" if self.given.startswith("nn.") else self.given or f"'{self.name}'"

    @property
    def label(self) -> str:
        """As fingerprints spell it: "cross_entropy/mean", with the options that are not torch's defaults."""
        said = [
            f"{name}={_digest(value)}" for name in ("weight", "pos_weight") if _set(value := getattr(self, name))
        ]
        said += [f"label_smoothing={self.label_smoothing:g}"] if self.label_smoothing else []
        said += [f"ignore_index={self.ignore_index}"] if self.ignore_index != IGNORE_INDEX else []
        said += [f"width={self.width:g}"] if self.name in ("huber", "smooth_l1") else []
        return f"{self.name}/{self.reduction}" + (f"({', '.join(said)})" if said else "")

    def summed_over(self, terms: float) -> Criterion:
        """This criterion on a sample set of so many terms: a sum is their number times their mean."""
        known = self.reduction == "mean" or self.scale is not None
        return self if known else replace(self, scale=terms)

    def targets(self, batch: Any) -> Tensor:
        """What each output is compared with, -100 where nothing is; of "causal_lm" the next tokens.

        The last token, which has none, gets -100, so that shapes stay those of the labels.

        Raises:
            ProblemError: there are no targets, or labels of a causal language model that are not (batch, tokens).
        """
        targets = target_of(batch)
        if self.name == "causal_lm":
            return _next_tokens(targets)
        if self.ignore_index != IGNORE_INDEX and self.of_classes and is_index(targets):
            targets = targets.long()
            return targets.masked_fill(targets == self.ignore_index, IGNORE_INDEX)
        return targets

    def check(self, batch: Any) -> None:
        """Refuse targets whose values are none of this criterion's.

        Raises:
            ProblemError: with the line to type.
        """
        given, targets = target_of(batch), self.targets(batch)
        check_values(self.name if self.of_classes else "mse", targets)
        if self.of_classes and is_index(given):
            classes = None if self.weight is None else len(self.weight)
            check_index(given, self.given, self.ignore_index, classes)

    def terms(self, targets: Tensor) -> Tensor | int:
        """What torch divides the sum by for a mean; a tensor where it depends on the targets' values."""
        if not self.of_classes:
            return targets.numel()
        if is_index(targets):
            counts = counting(targets)
            if self.weight is None:
                return counts.sum()
            return self._of_class(targets)[counts].double().sum()
        # indices stored as floats, whatever they are, are refused by `align_classes`
        return targets.numel() // max(1, targets.shape[1]) if targets.dim() > 1 else targets.numel()

    def total(self, outputs: Any, targets: Tensor) -> Tensor:
        """The sum over all terms, a scalar."""
        if self.of_classes and self.plain and is_index(targets):  # without the log-probabilities of all classes
            logits, labels = self.align(outputs, targets)
            if torch._C._functorch.is_batchedtensor(logits):
                return _picked_apart(logits, labels)
            return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        total = self.each(outputs, targets).sum()
        return total if self.scale is None else total * self.scale

    def each(self, outputs: Any, targets: Tensor) -> Tensor:
        """Every term by itself: (positions,) of classes, else shaped like the outputs; without ``scale``."""
        if self.of_classes:
            return self.of_aligned(*self.align(outputs, targets))
        if self.name == "mse" and not self.given:
            return squared_error(outputs, targets)
        outputs, targets = aligned(outputs, targets, self.given)
        terms = LAWS[self.name].loss(outputs, targets, self.width, factors(self, outputs))
        return terms if self.weight is None else terms * self.weight.to(outputs)

    def align(self, outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) with targets (n,) or (n, classes).

        Raises:
            ProblemError: shapes that do not fit.
        """
        if self.name == "nll" and not is_index(targets):
            msg = f"{self.given} takes class indices, targets are {kind_of(targets)}: give targets.long(), or "
            raise ProblemError(msg + "nn.CrossEntropyLoss() for class probabilities")
        return align_classes(outputs, targets, self.name, torchs=self.given)

    def sizes(self, targets: Tensor) -> Tensor:
        """Σ_c q_c of aligned targets, (n,) float64, times ``scale``: what diag p − p pᵀ is multiplied by."""
        smooth, size = self.label_smoothing, 1.0 if self.scale is None else self.scale
        if targets.is_floating_point():
            soft = targets.double()
            if self.weight is None and not smooth:
                return soft.sum(-1) * size
            mixed = soft * (1 - smooth) + smooth / soft.shape[-1]
            return (mixed if self.weight is None else mixed * self.weight.to(mixed)).sum(-1) * size
        counts = counting(targets).double()
        if self.weight is None:
            return counts * size
        spread = float(self.weight.double().mean())
        return (self._of_class(targets).double() * (1 - smooth) + smooth * spread) * counts * size

    def bends(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Second derivative of every element's term, shaped like the outputs, float64, times ``scale``."""
        if self.name != "mse" or self.given:
            outputs, targets = aligned(outputs, targets, self.given)
        else:
            targets = targets.reshape(outputs.shape)
        wide = outputs.detach().double()
        bent = LAWS[self.name].bend(wide, targets.double(), self.width, factors(self, wide))
        bent = bent if self.weight is None else bent * self.weight.to(wide)
        return bent if self.scale is None else bent * self.scale

    def of_aligned(self, logits: Tensor, targets: Tensor) -> Tensor:
        """−Σ_c q_c log p_c of logits (n, classes), (n,); 0 where nothing counts."""
        if self.plain and not targets.is_floating_point():  # torch's names a class that is out of range
            return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
        logs = F.log_softmax(logits, dim=-1)
        weighted = logs if self.weight is None else logs * self.weight.to(logs)
        smooth = self.label_smoothing
        if targets.is_floating_point():
            soft = targets * (1 - smooth) + smooth / logs.shape[-1] if smooth else targets
            return -(weighted * soft).sum(-1)
        counts = counting(targets)
        picked = weighted.gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
        if smooth:
            picked = picked * (1 - smooth) + weighted.mean(-1) * smooth
        return -picked * counts

    def _of_class(self, targets: Tensor) -> Tensor:
        assert self.weight is not None
        targets = targets.long()
        return self.weight.detach().to(targets.device)[torch.where(counting(targets), targets, 0)]


def _picked_apart(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross-entropy in operations that vmap has rules for: torch's own imports sympy, 0.3 CPU s."""
    counted = counting(labels)
    chosen = F.log_softmax(logits, dim=-1).gather(1, labels.where(counted, 0)[:, None])[:, 0]
    return -chosen.where(counted, 0.0).sum()


def _next_tokens(targets: Tensor) -> Tensor:
    if targets.dim() < 2 or not is_index(targets):
        msg = f"criterion 'causal_lm': labels are {kind_of(targets)}; it needs token indices (batch, tokens)"
        raise ProblemError(msg)
    return F.pad(targets[..., 1:].long(), (0, 1), value=IGNORE_INDEX)


def _set(value: Any) -> bool:
    return value is not None


def _digest(weights: Tensor) -> str:
    return str(sha256(str(tuple(weights.shape)).encode(), content(weights.double())).hexdigest()[:8])
