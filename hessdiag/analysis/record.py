"""What is needed to repeat a measurement: the fingerprint of its subject, and its surroundings."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

from hessdiag import hashing
from hessdiag.engine.checks.preflight import Preflight
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import name_of
from hessdiag.installed import version
from hessdiag.results import Fingerprint
from hessdiag.settings import Settings

COMPUTED_BY = ("hessdiag", "torch", "device", "device_name", "batches")
"""Surroundings that can move a number."""

PROBE_LAW = "projected signs"
"""How deflated probes are drawn: probes of another law (those of earlier versions) are others at the same seed."""


def fingerprint(operator: Curvature, settings: Settings) -> Fingerprint:
    """What must agree before two measurements may be compared, field by field."""
    samples = operator.samples
    layout = "\n".join(f"{name} {size}" for name, size in operator.layout)
    return Fingerprint(
        samples=samples.examples,
        available=samples.available,
        split=samples.split,
        data_sha256=samples.digest,
        params_sha256=hashing.of_text(layout),
        weights_sha256=weights_digest(operator),
        fixed_sha256=fixed_digest(operator),
        n_params=operator.size,
        tensors=len(operator.layout),
        loss=operator.problem.loss_name,
        operator=operator.kind,
        mode="eval",
        dtype=str(operator.dtype).removeprefix("torch."),
        seed=settings.seed,
        probes=settings.probes,
        probe_law=PROBE_LAW,
        density_probes=settings.density_probes,
        steps=settings.steps,
        rtol=settings.known_to.lambda_max,
        failure=settings.known_to.failure,
        confidence=settings.confidence,
    )


def weights_digest(operator: Curvature) -> str:
    """sha256 of the parameters that count, in the precision measured."""
    return hashing.of_tensors(operator.function.theta)


def fixed_digest(operator: Curvature) -> str:
    """sha256 of all else in the model: frozen parameters and buffers move the curvature of those that count."""
    model, counted = operator.problem.bare_model(), {*operator.function.names}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return hashing.of_tensors(named[name] for name in sorted(named.keys() - counted))


def key_of(subject: Fingerprint, surroundings: Mapping[str, Any], settings: Settings) -> str:
    """Names a measurement by all its numbers depend on: subject, weights, settings, and what computes them.

    Args:
        subject: its `fingerprint`.
        surroundings: its `environment`.
        settings: as asked.
    """
    computed_by = {name: surroundings[name] for name in COMPUTED_BY}
    # the fingerprint does not see the model's code: the same weights in another function have another loss
    code = [f"{surroundings[name]:.6g}" for name in ("loss", "gradient_norm")]
    asked = [list(settings.quantities), settings.max_steps, settings.top, settings.block]
    asked += [dataclasses.asdict(settings.known_to), settings.budget]
    return hashing.key(dict(subject), computed_by, code, asked)


def environment(checked: Preflight) -> dict[str, Any]:
    """Where it was measured: informs, and forbids no comparison."""
    device = checked.operator.device
    return {
        "hessdiag": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": name_of(device) or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": checked.plan.method,
        "method_reason": checked.plan.reason,
        "batches": len(checked.operator.batches),
        "block": checked.operator.block,
        "loss": checked.loss,
        "gradient_norm": checked.gradient_norm,
        "seconds_per_gradient": checked.gradient_seconds,
        **({"ranks": checked.operator.group.size} if checked.operator.group.size > 1 else {}),
    }
