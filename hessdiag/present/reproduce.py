"""What is needed to repeat a measurement, and what it cost, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hessdiag.results import Analysis, SecondOpinion, SelfTest
from hessdiag.shown import plain


def reproduce(analysis: Analysis) -> list[tuple[str, list[tuple[str, str]]]]:
    """The definition lists under Reproduce, titles to (term, text) pairs; empty ones are left out."""
    cost = analysis.cost
    spent = {
        "products": f"{cost.products:,}",
        "time, in that of a gradient of the same samples": f"{cost.gradients:.4g}",
        "seconds": f"{cost.seconds:.4g}",
    }
    methods = {
        name: ", ".join(filter(None, (metric.provenance.method, _text(metric.provenance.settings))))
        for name, metric in analysis.metrics.items()
        if metric.provenance.method
    }
    parts: list[tuple[str, Mapping[str, Any]]] = [
        ("Fingerprint", analysis.fingerprint),
        ("Methods", methods),
        ("Self test", {} if analysis.self_test is None else _self_test(analysis.self_test)),
        ("Second opinion", {} if analysis.second_opinion is None else _opinion(analysis.second_opinion)),
        ("Cost", spent),
        ("Environment", analysis.environment),
    ]
    return [
        (title, [(plain(str(key)), plain(_text(value))) for key, value in part.items()])
        for title, part in parts
        if part
    ]


def _self_test(test: SelfTest) -> dict[str, str]:
    out = {
        "same product twice, relative difference": f"{test.repeatability:.1e}",
        "symmetry |u·Hv − v·Hu|, relative": f"{test.symmetry:.1e}",
        "product against differences of the gradient": (
            f"{test.finite_difference:.1e} in {test.precision}, worst at {test.worst_tensor}"
            + ("" if test.kink is None else f"; beside the checkpoint, which lies on a kink ({test.kink})")
        ),
        "gradient against differences of the loss": f"{test.gradient_error:.1e}",
    }
    if test.methods_agree is not None:
        out["products of two methods"] = f"{test.methods_agree:.1e}"
    return out


def _opinion(opinion: SecondOpinion) -> dict[str, str]:
    out = {
        "loss by the model alone": f"{opinion.loss:.6g}, the measured one is off by {opinion.loss_off:.1e}",
        "gradient by model.parameters()": f"off by {opinion.gradient_off:.1e}, worst at {opinion.worst_tensor}",
    }
    if opinion.model_loss is not None:
        out["model(**batch).loss of the first batch"] = f"{opinion.model_loss:.6g}"
    return out


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
