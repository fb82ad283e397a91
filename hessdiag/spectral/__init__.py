"""From products to numbers: never sees a model, works on any symmetric operator."""

from hessdiag.spectral.bounds import WS, wolkowicz_styan
from hessdiag.spectral.deflation import Forms, forms, forms_to
from hessdiag.spectral.density import DensityRun, density, known_half, spectrum
from hessdiag.spectral.eigenpairs import eigenpairs
from hessdiag.spectral.ends import Extremes, extremes_of
from hessdiag.spectral.enough import Goal, forms_for, probes_for
from hessdiag.spectral.estimated_bounds import wolkowicz_styan_of
from hessdiag.spectral.extremes import extremes
from hessdiag.spectral.krylov import Krylov, whole
from hessdiag.spectral.lanczos import lanczos
from hessdiag.spectral.measure import Measure, measure_of
from hessdiag.spectral.moments import (
    effective_rank,
    effective_rank_from,
    frobenius_squared,
    frobenius_squared_from,
    trace,
    trace_from,
)
from hessdiag.spectral.negative import negative_mass, own_negative_mass
from hessdiag.spectral.other_bounds import blockwise_ws, christoffel, deflated_ws, frobenius_bound, moment_lower
from hessdiag.spectral.probes import rademacher, sphere, stream
from hessdiag.spectral.ranked import Eigenpairs

__all__ = [
    "WS",
    "DensityRun",
    "Eigenpairs",
    "Extremes",
    "Forms",
    "Goal",
    "Krylov",
    "Measure",
    "blockwise_ws",
    "christoffel",
    "deflated_ws",
    "density",
    "effective_rank",
    "effective_rank_from",
    "eigenpairs",
    "extremes",
    "extremes_of",
    "forms",
    "forms_for",
    "forms_to",
    "frobenius_bound",
    "frobenius_squared",
    "frobenius_squared_from",
    "known_half",
    "lanczos",
    "measure_of",
    "moment_lower",
    "negative_mass",
    "own_negative_mass",
    "probes_for",
    "rademacher",
    "spectrum",
    "sphere",
    "stream",
    "trace",
    "trace_from",
    "whole",
    "wolkowicz_styan",
    "wolkowicz_styan_of",
]
