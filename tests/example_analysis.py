"""Analyses as a real measurement would give them, from dense matrices whose spectrum is known.

Each spectrum is true Lanczos quadrature (numpy, full reorthogonalization) of a diagonal matrix, so plots are tried
on the node patterns they will meet.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import torch

from hessdiag.operator import ClosureOperator
from hessdiag.results import (
    Analysis,
    Bound,
    Convergence,
    Cost,
    DataError,
    Estimate,
    Fingerprint,
    Layer,
    Provenance,
    Quadrature,
    RitzValue,
    SelfTest,
    Spectrum,
)
from hessdiag.spectral import lanczos, measure_of

ODD = 'run <script>alert("x")</script> & $\\alpha^{2}$ \x07 漢字'

FINGERPRINT = Fingerprint.of(
    {
        "samples": 1024,
        "split": "train",
        "n_params": 2410,
        "loss": "cross_entropy/mean",
        "operator": "hessian",
        "bn": "eval",
        "dtype": "float32",
        "seed": 0,
        "data_sha256": "3c1f6a0c8ce24f7e",
        "params_sha256": "9d27bb43a11e0c55",
    }
)
ENVIRONMENT = {"hessdiag": "0.1.0", "torch": "2.13.0", "device": "cpu", "python": "3.11.9"}


@functools.cache
def eigenvalues(dimension: int = 2410, sharpness: float = 1.0, sign: float = 1.0) -> np.ndarray:
    """A trained network's spectrum: ten outliers, a heavy bulk around zero, a small negative tail."""
    rng = np.random.default_rng(3)
    outliers = 2.64 * np.geomspace(1, 0.08, 10)
    bulk = 0.02 * rng.gamma(0.35, 1.0, int(0.7 * dimension)) ** 1.5
    negative = -0.004 * rng.gamma(0.5, 1.0, dimension - 10 - len(bulk))
    return np.sort(sign * sharpness * np.concatenate([outliers, bulk, negative]))


def quadrature(values: np.ndarray, start: np.ndarray, steps: int) -> Quadrature:
    """Gauss quadrature of diag(values) for ``start``; the weights sum to 1."""
    basis, alpha, beta = [start / np.linalg.norm(start)], [], []
    for _ in range(steps):
        product = values * basis[-1]
        alpha.append(basis[-1] @ product)
        for _ in range(2):
            product -= np.stack(basis).T @ (np.stack(basis) @ product)
        norm = np.linalg.norm(product)
        if norm < 1e-10 * max(1.0, abs(values).max()):
            break
        beta.append(norm)
        basis.append(product / norm)
    off = beta[: len(alpha) - 1]
    nodes, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(off, 1) + np.diag(off, -1))
    return Quadrature(nodes=tuple(nodes.tolist()), weights=tuple((vectors[0] ** 2).tolist()))


@functools.cache
def build_spectrum(
    probes: int = 10, steps: int = 40, sharpness: float = 1.0, sign: float = 1.0, dimension: int = 2410
) -> Spectrum:
    values = eigenvalues(dimension, sharpness, sign)
    top = np.argsort(-abs(values))[:10]
    rest = np.delete(values, top)
    rng = np.random.default_rng(7)
    share = len(rest) / dimension
    measured = []
    for _ in range(probes):
        one = quadrature(rest, rng.normal(size=len(rest)), steps)
        measured.append(Quadrature(nodes=one.nodes, weights=tuple(share * w for w in one.weights)))
    known = Quadrature(nodes=tuple(sorted(values[top].tolist())), weights=(1 / dimension,) * 10)
    return Spectrum(
        known=known,
        probes=tuple(measured),
        dimension=dimension,
        steps=steps,
        outliers=tuple(sorted(values[top].tolist(), reverse=True)),
        resolution=2e-5 * sharpness,
    )


@functools.cache
def own_spectrum(steps: int = 40, sharpness: float = 1.0, sign: float = 1.0, dimension: int = 2410) -> Spectrum:
    """As an analysis shows it by default: of the run's own start."""
    values = torch.from_numpy(eigenvalues(dimension, sharpness, sign))[:, None]
    seen = measure_of(lanczos(ClosureOperator(lambda block: values * block, dimension), steps=steps))
    assert seen is not None
    return seen.spectrum(2e-5 * sharpness)


def build_own(title: str = "digits-mlp/epoch-30", steps: int = 40, sharpness: float = 1.0, sign: float = 1.0):
    """A whole analysis of one start, which does not resolve the share of negative eigenvalues."""
    whole = build_analysis(title, sharpness=sharpness, sign=sign)
    share = dataclasses.replace(whole.metrics["negative_mass"], value=0.08, lo=0.06, hi=0.81, per_probe=())
    metrics = {**whole.metrics, "negative_mass": share}
    metrics["lambda_max"] = dataclasses.replace(
        metrics["lambda_max"], provenance=Provenance(method="Lanczos", settings={"max_steps": 160}, products=40)
    )
    return dataclasses.replace(whole, spectrum=own_spectrum(steps, sharpness, sign), metrics=metrics)


def build_analysis(
    title: str = "digits-mlp/epoch-30",
    probes: int = 10,
    steps: int = 40,
    sharpness: float = 1.0,
    sign: float = 1.0,
    tensors: int = 6,
) -> Analysis:
    """A whole analysis; ``sign=-1`` turns the spectrum over (negative trace)."""
    spectrum = build_spectrum(probes, steps, sharpness, sign)
    values = eigenvalues(2410, sharpness, sign)
    return Analysis(
        title=title,
        metrics=_metrics(values, probes),
        spectrum=spectrum,
        other_bounds=(_bound("deflated_ws", 1.00001 * values[-1] + 1e-6, values[-1], exact=True),),
        layers=_layers(values.sum(), tensors),
        convergence=_convergence(sharpness, sign, probes, steps),
        self_test=SelfTest(
            repeatability=0.0,
            symmetry=3.1e-7,
            finite_difference=4.2e-6,
            gradient_error=1.3e-8,
            worst_tensor="layers.2.weight",
            precision="float64",
            methods_agree=2.2e-7,
        ),
        fingerprint=FINGERPRINT,
        cost=Cost(products=482, gradients=911.4, seconds=14.2),
        environment=ENVIRONMENT,
        notes=("BatchNorm runs in eval mode: its running statistics are constants of the loss.",),
        warnings=("The gradient norm is 0.031: this is not a stationary point.",),
    )


def without(analysis: Analysis, *parts: str) -> Analysis:
    """The same analysis with some of spectrum, layers, convergence, metrics, self_test missing."""
    empty = {
        "spectrum": None,
        "layers": (),
        "convergence": Convergence(),
        "metrics": {},
        "self_test": None,
        "other_bounds": (),
        "fingerprint": Fingerprint(),
        "environment": {},
        "warnings": (),
        "notes": (),
        "title": "",
    }
    return dataclasses.replace(analysis, **{part: empty[part] for part in parts})


def all_zero() -> Analysis:
    """A linear loss: every eigenvalue is zero."""
    flat = Quadrature(nodes=(0.0,), weights=(1.0,))
    spectrum = Spectrum(
        known=Quadrature(nodes=(), weights=()), probes=(flat, flat), dimension=50, steps=1, outliers=()
    )
    exact = Provenance(method="exact trace", products=0, dtype="float64")
    zero = {"value": 0.0, "lo": 0.0, "hi": 0.0, "confidence": 1.0, "provenance": exact}
    metrics = {
        "lambda_max": RitzValue(quantity="lambda_max", kind="ritz", residual=0.0, floor=0.0, **zero),
        "trace": Estimate(quantity="trace", kind="exact", stderr=0.0, **zero),
    }
    layers = (Layer(name="weight", size=50, trace=0.0, lo=0.0, hi=0.0, kind="exact"),)
    history = Convergence(steps=(1,), ritz_max=(0.0,), ritz_min=(0.0,))
    return Analysis(metrics=metrics, spectrum=spectrum, layers=layers, convergence=history, title="all zero")


def _metrics(values: np.ndarray, probes: int) -> dict[str, Estimate | RitzValue | Bound]:
    settings = {"probes": probes, "seed": 0}
    largest, smallest, trace = float(values[-1]), float(values[0]), float(values.sum())
    data = DataError(
        stderr=0.31, lo=largest - 0.6, hi=largest + 0.6, blocks=16, method="delete-one-block jackknife"
    )

    def ritz(name: str, value: float, width: float, outer: float) -> RitzValue:
        lo, hi = sorted((value, value + outer * width))
        provenance = Provenance(method="Lanczos", settings=settings, products=24, dtype="float32")
        return RitzValue(
            quantity=name,
            value=value,
            lo=lo,
            hi=hi,
            kind="ritz",
            confidence=0.999,
            provenance=provenance,
            data=data if name == "lambda_max" else None,
            residual=3.2e-5,
            floor=1e-6,
        )

    def sampled(name: str, value: float, half: float, kind: str = "probes") -> Estimate:
        per_probe = tuple(np.random.default_rng(11).normal(value, half, probes).tolist())
        provenance = Provenance(method="deflated Hutchinson", settings=settings, products=482, dtype="float32")
        return Estimate(
            quantity=name,
            value=value,
            lo=value - half,
            hi=value + half,
            kind=kind,
            confidence=0.95,
            provenance=provenance,
            stderr=half / 2.1,
            per_probe=per_probe,
        )

    squared = float((values**2).sum())
    upper = values.mean() + values.std() * math.sqrt(len(values) - 1)
    metrics = {
        "lambda_max": ritz("lambda_max", float(largest), 4e-4, 1.0),
        "lambda_min": ritz("lambda_min", float(smallest), 9e-5, -1.0),
        "ws_upper": _bound("ws_upper", float(upper), float(largest), exact=False),
    }
    if probes < 2:  # one probe has no standard error: such estimates are refused, not reported
        return metrics
    return metrics | {
        "trace": sampled("trace", float(trace), 0.021 * abs(float(trace))),
        "frobenius_squared": sampled("frobenius_squared", squared, 0.004 * squared),
        "effective_rank": sampled("effective_rank", float(trace**2 / squared), 0.9),
        "negative_mass": sampled("negative_mass", float((values < 0).mean()), 0.012, "bracket"),
    }


def _bound(name: str, value: float, measured: float, *, exact: bool) -> Bound:
    half = 0.0 if exact else 0.004 * abs(value)
    return Bound(
        quantity=name,
        value=float(value),
        lo=float(value - half),
        hi=float(value + half),
        kind="bound",
        confidence=1.0 if exact else 0.95,
        provenance=Provenance(method="Wolkowicz-Styan", settings={}, products=482, dtype="float32"),
        of="lambda_max",
        side="upper",
        exact_inputs=exact,
        looseness=float(value / measured),
    )


def _layers(trace: float, tensors: int) -> tuple[Layer, ...]:
    rng = np.random.default_rng(5)
    shares = rng.dirichlet(np.full(tensors, 0.7))
    sizes = [1920 if i % 2 == 0 else 30 for i in range(tensors)]
    return tuple(
        Layer(
            name=f"layers.{i // 2}.{'weight' if i % 2 == 0 else 'bias'}",
            size=size,
            trace=float(share * trace),
            lo=float(share * trace - 0.02 * abs(trace * share)),
            hi=float(share * trace + 0.03 * abs(trace * share)),
            kind="exact" if i % 2 else "probes",
        )
        for i, (share, size) in enumerate(zip(shares, sizes, strict=True))
    )


@functools.cache
def _convergence(sharpness: float, sign: float, probes: int, steps: int) -> Convergence:
    values = eigenvalues(2410, sharpness, sign)
    start = np.random.default_rng(13).normal(size=len(values))
    count = range(2, min(steps, 24) + 1)
    ends = [quadrature(values, start, step).nodes for step in count]
    upper, lower = [end[-1] for end in ends], [end[0] for end in ends]
    span = values[-1] - values[0]
    slack = [math.inf if step < 4 else 3 * span * math.exp(-0.55 * (step - 4)) for step in count]
    means = values.sum() * (
        1 + 0.12 * np.cumsum(np.random.default_rng(2).normal(size=probes)) / np.arange(1, probes + 1)
    )
    halves = 0.25 * abs(values.sum()) / np.sqrt(np.arange(1, probes + 1))
    return Convergence(
        steps=tuple(count),
        ritz_max=tuple(upper),
        ritz_min=tuple(lower),
        certificate_max=tuple(u + s for u, s in zip(upper, slack, strict=True)),
        certificate_min=tuple(low - s for low, s in zip(lower, slack, strict=True)),
        trace_mean=tuple(means[1:].tolist()),
        trace_half_width=tuple(halves[1:].tolist()),
    )
