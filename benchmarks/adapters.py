"""The peers' own operators, made of the same model, loss and batches."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import process_time
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

PACKAGES = {
    "PyHessian": ("pyhessian", "pyhessian"),
    "eigenthings": ("hessian_eigenthings", "hessian-eigenthings"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
}


class FlatLogits(nn.Module):
    """The model with logits as (n, classes): two of the peers know no others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).flatten(0, -2)


@dataclass(frozen=True)
class Case:
    """What a peer is given: a model, a mean loss of its outputs, and batches of (inputs, targets)."""

    model: nn.Module
    loss: nn.Module  # with a ``reduction`` of "mean", as curvlinops asks
    batches: Sequence[tuple[Tensor, Tensor]]
    whole: bool = True  # whether one graph may hold all batches: PyHessian then reuses it

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def joined(self) -> list[tuple[Tensor, Tensor]]:
        """All rows as one batch, if one graph may hold them."""
        if not self.whole:
            return list(self.batches)
        inputs, labels = (torch.cat(column) for column in zip(*self.batches, strict=True))
        return [(inputs, labels)]


def classification(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], whole: bool = True) -> Case:
    """Mean cross-entropy on the model's device; tokens become rows."""
    device = next(model.parameters()).device
    rows = [(inputs.to(device), labels.flatten().to(device)) for inputs, labels in batches]
    flat = model if batches[0][1].dim() == 1 else FlatLogits(model)
    return Case(flat, nn.CrossEntropyLoss(), rows, whole)


def installed(tool: str) -> bool:
    """Whether the tool can be imported here."""
    return tool == "hessdiag" or importlib.util.find_spec(PACKAGES[tool][0]) is not None


def version(tool: str) -> str:
    """Its version, or "not installed"."""
    name = "hessdiag" if tool == "hessdiag" else PACKAGES[tool][1]
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        import hessdiag

        return hessdiag.__version__ if tool == "hessdiag" else "not installed"


class TooLong(Exception):
    """A call has taken as long as anybody waits."""


class Meter:
    """Counts a tool's products, and ends its call after some CPU seconds.

    Attributes:
        products: so far.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.products, self._end = 0, process_time() + limit

    def add(self, number: int = 1) -> None:
        """Before ``number`` products."""
        if process_time() > self._end:
            raise TooLong
        self.products += number


@contextmanager
def pyhessian_object(case: Case, meter: Meter) -> Iterator[Any]:
    """A fresh PyHessian object, its products metered; gradients it leaves behind are dropped."""
    source = importlib.import_module("pyhessian.hessian")  # the package hides it behind a class of that name
    plain = source.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        meter.add()
        return plain(*arguments)

    batches = case.joined
    data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
    with patch.object(source, "hessian_vector_product", counted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Using backward() with create_graph=True ..."
        try:
            built = source.hessian(case.model, case.loss, cuda=case.device.type == "cuda", **data)
            through_loader = built.dataloader_hv_product

            def counted_loader(vector: Any) -> Any:
                meter.add()
                return through_loader(vector)

            built.dataloader_hv_product = counted_loader
            yield built
        finally:
            case.model.zero_grad(set_to_none=True)


def eigenthings_operator(case: Case, meter: Meter | None = None, **options: Any) -> Any:
    from hessian_eigenthings import HessianOperator

    class Counted(HessianOperator):  # type: ignore[misc]
        def matvec(self, v: Tensor) -> Tensor:
            if meter is not None:
                meter.add()
            return super().matvec(v)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(model(batch[0]), batch[1])

    return Counted(case.model, list(case.batches), loss, **options)


def curvlinops_operator(case: Case, meter: Meter | None = None, *, check: bool = False) -> Any:
    from curvlinops import HessianLinearOperator

    class Counted(HessianLinearOperator):  # type: ignore[misc]
        def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
            if meter is not None:
                meter.add(columns[0].shape[-1])
            return super()._matmat(columns)

    parameters = [p for p in case.model.parameters() if p.requires_grad]
    return Counted(case.model, case.loss, parameters, list(case.batches), check_deterministic=check)


class MeanLoss(nn.Module):
    """The outputs are the losses; used for functions of known Hessian."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        return outputs.mean()
