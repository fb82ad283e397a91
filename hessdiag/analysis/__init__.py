"""The one call: ``analyze(problem) -> Analysis``, one shared sweep for every number asked for."""

from hessdiag.analysis.measurement import Measurement, analyze

__all__ = ["Measurement", "analyze"]
