"""The one call: ``analyze(problem) -> Analysis``, one shared sweep for every number asked for."""

from hessdiag.analysis.measurement import Measurement
from hessdiag.analysis.one_call import analyze
from hessdiag.analysis.operator_of import hessian

__all__ = ["Measurement", "analyze", "hessian"]
