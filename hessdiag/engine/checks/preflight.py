"""Before anything is measured: is there something to measure, and can it be believed?

Each finding has its cause and its way out. Faults stop a measurement; warnings and notes go with its result.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from hessdiag.engine.checks.alike import require_alike
from hessdiag.engine.checks.facts import Finding, Level, model_facts
from hessdiag.engine.checks.failing import failures_named, too_large
from hessdiag.engine.checks.kept_weights import first_pass, require_kept_nothing, without_part
from hessdiag.engine.checks.kinks import kinks
from hessdiag.engine.checks.log_probabilities import require_log_probabilities
from hessdiag.engine.checks.masked_rows import masked_gradients
from hessdiag.engine.checks.planner import Plan, choose, trials_in
from hessdiag.engine.checks.second_opinion import second_opinion
from hessdiag.engine.checks.selftest import Fault, self_test, with_room
from hessdiag.engine.checks.unsteady import differ, why_it_changes, why_not_finite
from hessdiag.engine.checks.weighting import weighting
from hessdiag.engine.products.composition import require_outputs
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.gradients import Kind
from hessdiag.engine.products.methods import EXACT_METHODS
from hessdiag.errors import MeasurementError, NonFiniteError
from hessdiag.problem import Problem
from hessdiag.results import SecondOpinion, SelfTest
from hessdiag.samples import SampleSet, leaves

REPEATS = 4  # of the first batch's loss: two passes of a tiny network drop the same units once in 40 times


@dataclass(frozen=True)
class Preflight:
    """An operator ready to measure with, and what was found on the way.

    Attributes:
        operator: its method chosen, its rounding floor measured.
        plan: which method and why.
        self_test: the four numbers.
        second_opinion: the user's own loss and gradient; None if it was not asked for or could not be made.
        findings: everything looked at.
        loss: the mean loss on the sample set.
        gradient_norm: of the mean loss.
        gradient_seconds: of one gradient of the whole sample set.
    """

    operator: Curvature
    plan: Plan
    self_test: SelfTest
    second_opinion: SecondOpinion | None
    findings: tuple[Finding, ...]
    loss: float
    gradient_norm: float
    gradient_seconds: float

    def texts(self, level: Level) -> tuple[str, ...]:
        """The findings of one level."""
        return tuple(finding.text for finding in self.findings if finding.level == level)


def preflight(
    problem: Problem,
    samples: SampleSet,
    *,
    kind: Kind = "hessian",
    method: str = "auto",
    products: int | None = None,
    opinion: bool = True,
    **options: Any,
) -> Preflight:
    """Check a problem and choose the method that forms its products; about 4 gradients of the sample set.

    Args:
        problem: what to measure.
        samples: on what.
        kind: "hessian", "ggn" or "residual".
        method: "auto", or one of `methods.METHODS`.
        products: how many will be formed, about, if known.
        opinion: whether to ask the user's own model for loss and gradient, one gradient more.
        **options: dtype, device, block, group of `Curvature`; of a group, rank 0 looks at what is no sum.

    Returns:
        The operator and all findings; those of level "fault" forbid a measurement (`require_sound`).

    Raises:
        HessdiagError: there is nothing to measure: no parameters, no loss, NaN, a model that fails.
    """
    first_method = EXACT_METHODS[0] if method == "auto" else method
    operator = Curvature(problem, samples, kind=kind, method=first_method, **options)
    group = operator.group
    require_alike(operator)
    at_first = first_pass(with_room(operator))
    findings = [group.first(lambda: _loss_works(operator))]
    if findings[0].level == "fault":
        raise MeasurementError(findings[0].text)
    with failures_named(operator, "a later batch"):
        loss = operator.loss()
    if not math.isfinite(loss):
        msg = f"the loss on the sample set is {loss}: {why_not_finite(operator)}"
        raise NonFiniteError(msg)
    group.first(lambda: require_kept_nothing(operator, at_first))
    require_outputs(operator, kind)
    findings.append(Finding("ok", "loss", f"{loss:.6g}, the same twice"))
    findings += group.first(lambda: weighting(operator) + model_facts(operator))
    findings += [Finding("warning", "samples", text) for text in samples.warnings]
    findings += [Finding("note", "samples", text) for text in samples.notes]
    operator.divisible = all(f.check != "weighting" or f.level == "ok" for f in findings)
    plan, numbers, found, operator.floor = group.first(lambda: _believed(operator, method, products))
    operator.method = plan.method
    findings += found
    begun = time.perf_counter()
    gradient = operator.gradient()
    # the only gradient of the whole set may be slow to begin with: 2.4 times on a small GPT
    seconds = min(time.perf_counter() - begun, trials_in(operator) * plan.gradient_seconds)
    norm = float(gradient.norm())
    text = f"‖gradient‖ = {norm:.3g}: the checkpoint is this far from stationary"
    findings.append(Finding("note", "gradient", text))
    findings += group.first(lambda: without_part(operator, gradient))
    asked, said = group.first(lambda: second_opinion(operator, gradient)) if opinion else (None, [])
    return Preflight(operator, plan, numbers, asked, tuple(findings + said), loss, norm, seconds)


def _believed(
    operator: Curvature, method: str, products: int | None
) -> tuple[Plan, SelfTest, list[Finding], float]:
    """The method, the self-test of its products, what both found, and the floor; sets them."""
    findings = _kinks(operator) if method == "finite_difference" else []
    try:
        plan = choose(operator, fixed=method != "auto", products=products)
        operator.method = plan.method
        numbers, faults = self_test(operator, plan)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MeasurementError(too_large(operator, "products of the first examples", error)) from error
    findings += [_ways(plan), *_tested(operator, numbers, faults), *masked_gradients(operator)]
    return plan, numbers, findings, operator.floor


def require_sound(checked: Preflight) -> None:
    """Refuse a measurement that has faults.

    Raises:
        MeasurementError: its text is the first fault.
    """
    faults = checked.texts("fault")
    if faults:
        raise MeasurementError(faults[0])


def _loss_works(operator: Curvature) -> Finding:
    """The first batch's loss, twice, with the random stream moved on between."""
    function, batch = operator.function, operator.batches[0]
    versions = [leaf._version for leaf in leaves(batch)]
    with failures_named(operator, "the first batch"), function.measuring(), torch.no_grad():
        losses = []
        for _ in range(REPEATS):
            losses.append(float(function.total(function.theta, batch)))
            torch.rand(1, device=operator.device)
    first, second = losses[0], max(losses[1:], key=lambda loss: abs(loss - losses[0]))
    if [leaf._version for leaf in leaves(batch)] != versions:
        text = "the model or the loss writes into the batch, so that a second pass sees other data: work on a "
        return Finding("fault", "determinism", text + "copy in forward (x = x.clone(); no x.mul_(...) on inputs)")
    if differ(first, second):
        text = f"the same loss twice gave {first:.8g} and {second:.8g}: {why_it_changes(operator, batch)}"
        return Finding("fault", "determinism", text)
    require_log_probabilities(operator)
    return Finding("ok", "determinism", "the same loss twice is the same")


def _kinks(operator: Curvature) -> list[Finding]:
    found = kinks(operator.function, operator.batches[0])
    if not found:
        return []
    text = f"`method='finite_difference'` on a network with kinks ({found[0]}) does not converge to its Hessian "
    raise MeasurementError(text + "(10 to 70 % off): take an exact method")


def _ways(plan: Plan) -> Finding:
    agreed = "" if plan.agreement is None else f"; two methods agree to {plan.agreement:.1g}"
    return Finding("ok", "product", f"{plan.method} ({plan.reason}){agreed}")


def _tested(operator: Curvature, numbers: SelfTest, faults: tuple[Fault, ...]) -> list[Finding]:
    if faults:
        return [Finding("fault", fault.name, fault.text) for fault in faults]
    beside = "" if numbers.kink is None else " beside the checkpoint"
    text = (
        f"repeats to {numbers.repeatability:.1g}, symmetric to {numbers.symmetry:.1g}, differences{beside} agree "
    )
    text += f"to {numbers.finite_difference:.1g} (worst {numbers.worst_tensor}, {numbers.precision})"
    found = [Finding("ok", "self-test", text)]
    if numbers.kink is not None:
        found.append(Finding("warning", "kink", _on_a_kink(operator, numbers.kink)))
    return found


def _on_a_kink(operator: Curvature, tensor: str) -> str:
    bent = kinks(operator.function, operator.function.place(operator.trial))
    operations = f" ({', '.join(bent[:3])})" if bent else ""
    side = " (ReLU'(0) = 0)" if any(name.startswith("ReluBackward") for name in bent) else ""
    return (
        f"the checkpoint lies exactly on a kink{operations}, as zeros of an untrained network do: the gradient "
        f"jumps in {tensor}; the numbers are those of the piece that torch's derivative takes{side}, and one "
        "optimizer step moves off it: take a checkpoint after some steps to know the trained network"
    )
