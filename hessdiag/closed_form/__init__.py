"""Formulas in place of products, where a model has them: exact, and checked against dense Hessians."""

from hessdiag.closed_form.activations import Activation, activation
from hessdiag.closed_form.estimates import ClosedForm, affordable, closed_ws, exact_traces, foreseen
from hessdiag.closed_form.factorization import (
    end_to_end,
    factorization_loss,
    factorization_trace,
    factorization_trace_gradient,
    flattest_factors,
    induced_regularizer,
    induced_regularizer_depth_two,
    isotropic_trace,
)
from hessdiag.closed_form.gradient import Gradients
from hessdiag.closed_form.network import ThreeLayer
from hessdiag.closed_form.recognize import Recognized, recognize
from hessdiag.closed_form.traces import Plan, Traces, plan, three_layer

__all__ = [
    "Activation",
    "ClosedForm",
    "Gradients",
    "Plan",
    "Recognized",
    "ThreeLayer",
    "Traces",
    "activation",
    "affordable",
    "closed_ws",
    "end_to_end",
    "exact_traces",
    "factorization_loss",
    "factorization_trace",
    "factorization_trace_gradient",
    "flattest_factors",
    "foreseen",
    "induced_regularizer",
    "induced_regularizer_depth_two",
    "isotropic_trace",
    "plan",
    "recognize",
    "three_layer",
]
