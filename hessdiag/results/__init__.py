"""What a measurement gives: one type per kind of knowledge, each with its interval.

======== ================= ==========================================================
kind     type              what [lo, hi] means
======== ================= ==========================================================
exact    `Estimate`        rounding only: no sampling was involved
probes   `Estimate`        confidence interval over random probes
ritz     `RitzValue`       Rayleigh quotient on one side, certificate on the other
bracket  `Estimate`        rigorous quadrature bracket, widened by the chance of the starts
bound    `Bound`           a bound on something else; [lo, hi] is what its inputs allow
======== ================= ==========================================================

All of it concerns the frozen sample set. What that set says about the population is
``data``, a second error bar (`DataError`).
"""

from hessdiag.results.analysis import SCHEMA, Analysis, Convergence, Cost, Layer, SecondOpinion, SelfTest
from hessdiag.results.fingerprint import Fingerprint
from hessdiag.results.metrics import (
    MEASURABLE,
    QUANTITIES,
    Bound,
    DataError,
    Estimate,
    Kind,
    Metric,
    Provenance,
    RitzValue,
    a_share,
    at_least,
)
from hessdiag.results.runfile import json_schema, load_run
from hessdiag.results.spectrum import Quadrature, Spectrum
from hessdiag.results.store import Store

__all__ = [
    "MEASURABLE",
    "QUANTITIES",
    "SCHEMA",
    "Analysis",
    "Bound",
    "Convergence",
    "Cost",
    "DataError",
    "Estimate",
    "Fingerprint",
    "Kind",
    "Layer",
    "Metric",
    "Provenance",
    "Quadrature",
    "RitzValue",
    "SecondOpinion",
    "SelfTest",
    "Spectrum",
    "Store",
    "a_share",
    "at_least",
    "json_schema",
    "load_run",
]
