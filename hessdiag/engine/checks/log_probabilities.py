"""Whether what an NLL loss is given are log-probabilities: then it is the cross-entropy of them."""

from __future__ import annotations

import torch

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import one_tensor
from hessdiag.engine.products.losses import TRIAL_EXAMPLES
from hessdiag.errors import ProblemError
from hessdiag.samples import divide

OFF = 1e-3
"""Absolute. Rounding leaves 1e-6, a small number added to probabilities 1e-7 times the classes; logits 1."""


def require_log_probabilities(operator: Curvature) -> None:
    """Refuse an NLL loss of anything else; costs a forward pass of 16 examples, and nothing for other losses.

    Raises:
        ProblemError: exp(outputs) does not sum to one over the classes; with the line to type.
    """
    known, function = operator.problem.built_in, operator.function
    if known is None or known.name != "nll":
        return
    piece = next(divide(operator.batches[0], TRIAL_EXAMPLES))
    with operator.timed(), torch.no_grad():
        outputs = one_tensor(function.outputs(function.theta, piece))
        off = float(outputs.logsumexp(1 if outputs.dim() > 1 else 0).abs().max())
    if off > OFF:
        msg = f"{known.shown} needs log-probabilities, and log(sum(exp(outputs))) is {off:.2g} from 0: end the "
        raise ProblemError(msg + "model with nn.LogSoftmax(1), or give nn.CrossEntropyLoss()")
