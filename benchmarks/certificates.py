"""Certified intervals of float32 measurements against float64 truths on the same float32 weights and inputs.

At a failure of 1e-6 a certificate has to hold in every one of some hundred cases, at both ends, however confident
the examples are; at the default of 1e-3 it may miss once in a thousand. The truth is SciPy's ``eigsh`` on plain
double backward in float64, to 1e-12 of the spectral radius; no part of hessdiag takes part in it. ``slack`` says
how much of the room for rounding the worst case took: where the value of lambda_max passes the truth, the share of
the floor by which it does; above 1 is a miss.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import binom
from torch import nn

import hessdiag
from benchmarks.certificate_networks import KINDS, Trained, trained
from benchmarks.tables import Row
from benchmarks.timing import one_thread
from hessdiag.accuracy import Accuracy
from hessdiag.errors import HessdiagError
from hessdiag.results import RitzValue

SEEDS = 11  # of networks per kind, each measured at up to four stages of its training: over 300 cases
ENDS = ("lambda_min", "lambda_max")
FAILURES = (Accuracy().failure, 1e-6)  # per end
CHANCE = 1e-3  # of calling a certificate wrong that fails as often as it says


@dataclass(frozen=True)
class Case:
    """One network measured: both ends with their truths; no metrics where the self-test refused it."""

    kind: str
    loss: float
    truths: tuple[float, float]
    found: tuple[RitzValue, RitzValue] | None

    @property
    def beyond(self) -> tuple[float, float]:
        """How far each truth lies outside its interval, relative to itself; at most 0 where it holds."""
        assert self.found is not None
        pairs = zip(self.truths, self.found, strict=True)
        return tuple(max(m.lo - t, t - m.hi) / max(abs(t), 1e-300) for t, m in pairs)

    @property
    def slack(self) -> tuple[float, float]:
        """By how much of the floor each value passes its truth on the inner side."""
        assert self.found is not None
        (low, high), (least, most) = self.truths, self.found
        return (low - least.value) / least.floor, (most.value - high) / most.floor


def run(data: str | None = None, quick: bool = False) -> list[Row]:  # noqa: ARG001
    """Rows per kind of network, failure probability and end; no data are needed."""
    one_thread()
    rows = []
    for kind in list(KINDS)[: 2 if quick else None]:
        networks = [(seed, one) for seed in range(1 if quick else SEEDS) for one in trained(kind, seed)]
        truths = [truth(network) for _, network in networks]
        for failure in FAILURES:
            pairs = zip(networks, truths, strict=True)
            found = [Case(kind, one.loss, true, certified(one, seed, failure)) for (seed, one), true in pairs]
            rows += rows_of(kind, found, failure)
    return rows


def cases(kind: str, seed: int) -> list[Case]:
    """One network at its stages."""
    return [measured(kind, network, seed) for network in trained(kind, seed)]


def measured(kind: str, network: Trained, seed: int) -> Case:
    """One network, certified as by default."""
    return Case(kind, network.loss, truth(network), certified(network, seed, FAILURES[0]))


def certified(network: Trained, seed: int, failure: float) -> tuple[RitzValue, RitzValue] | None:
    """Both ends as hessdiag finds them; None where its self-test refuses the network."""
    problem = hessdiag.Problem(
        network.model, {"train": (network.inputs, network.targets)}, criterion=network.criterion
    )
    options = {"samples": len(network.inputs), "seed": seed, "accuracy": {"failure": failure}}
    try:
        metrics = hessdiag.analyze(problem, ENDS, **options).metrics
    except HessdiagError:
        return None
    least, most = (metrics[name] for name in ENDS)
    return least, most


def truth(network: Trained) -> tuple[float, float]:
    """Both ends of the spectrum in float64, of the weights and inputs as float32 has them."""
    model = copy.deepcopy(network.model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = network.mean_loss(model, torch.float64)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = nn.utils.parameters_to_vector(gradients)

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.asarray(vector, dtype=np.float64).reshape(-1).copy())
        parts = torch.autograd.grad(flat, parameters, v, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
        return torch.cat([g.reshape(-1) for g in whole]).numpy()

    size = len(flat)
    values = eigsh(
        LinearOperator((size, size), matvec=product, dtype=np.float64),
        k=2,
        which="BE",
        tol=1e-12,
        ncv=min(size, 80),
        v0=np.random.default_rng(0).normal(size=size),
        return_eigenvectors=False,
    )
    return float(min(values)), float(max(values))


def rows_of(kind: str, found: Sequence[Case], failure: float) -> list[Row]:
    """What became of one kind's cases, per end."""
    rows, told = [], [case for case in found if case.found is not None]
    refused = len(found) - len(told)
    for index, end in enumerate(ENDS):
        numbers: dict[str, list[float]] = defaultdict(list)
        for case in told:
            assert case.found is not None
            metric = case.found[index]
            numbers["beyond"].append(case.beyond[index])
            numbers["slack"].append(case.slack[index])
            numbers["width"].append((metric.hi - metric.lo) / max(abs(case.truths[index]), 1e-300))
            numbers["floor"].append(metric.floor / max(abs(t) for t in case.truths))
        missed = sum(beyond > 0 for beyond in numbers["beyond"])
        word = "MISSES" if missed > binom.ppf(1 - CHANCE, len(told), failure) else "misses no more than stated"
        text = f"{word}, the worst by {max(numbers['beyond']):.1e}" if missed else "never misses"
        text += f"; loss {min(c.loss for c in told):.0e} to {max(c.loss for c in told):.0e}" if told else ""
        text += f"; slack {max(numbers['slack']):.2g} of the floor, itself up to {max(numbers['floor']):.1e}"
        text += f"; width {np.median(numbers['width']):.1e}" + f"; {refused} refused" * bool(refused)
        quantity = f"{end}: misses of {len(told)} certificates at {failure:g}"
        rows.append(Row(kind, "hessdiag", quantity, float(missed), None, text))
    return rows
