"""Whether a loss is its criterion of one tensor of outputs, and of nothing else that the parameters give.

G, R and the trace by way of the outputs are made of that. A criterion over a tuple or a dict, and one that takes
from the parameters itself (an L2 penalty, a learned variance), leave the Hessian of the whole loss alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hessdiag.engine.products.functional import Functional
from hessdiag.errors import UsageError
from hessdiag.samples import divide

if TYPE_CHECKING:
    from hessdiag.engine.products.curvature import Curvature

EXAMPLES = 2  # of the first and of the last batch
_KNOWN: WeakKeyDictionary[Functional, str] = WeakKeyDictionary()


def beside_outputs(operator: Curvature) -> str:
    """Why the loss is not a criterion of one tensor alone, on one line; empty where it is.

    Costs two forward passes of two examples, the first time.
    """
    function = operator.function
    if function not in _KNOWN:
        with operator.timed():
            _KNOWN[function] = _look(function, operator.batches)
    return _KNOWN[function]


def require_outputs(operator: Curvature, kind: str) -> None:
    """Refuse a matrix that only a criterion of one tensor of outputs has.

    Raises:
        UsageError: with the reason and the way out.
    """
    if kind != "hessian" and (why := beside_outputs(operator)):
        msg = f"`operator={kind!r}`: {why}: G and R need one tensor and nothing else of the parameters; "
        raise UsageError(msg + "give forward= that returns one, leave penalties out, or take hessian")


def _look(function: Functional, batches: list[Any]) -> str:
    if not function.problem.has_outputs:
        return "the problem gives no outputs"
    for batch in {id(one): one for one in (batches[0], batches[-1])}.values():
        piece = next(divide(batch, EXAMPLES))
        with torch.no_grad():
            outputs = function.returned(function.theta, piece)
        if not isinstance(outputs, Tensor):
            return f"the model returns {type(outputs).__name__}"
        names = _reached(function, piece)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return f"the criterion takes {', '.join(names[:3])}{more} from the parameters, beside the outputs"
    return ""


def _reached(function: Functional, piece: Any) -> list[str]:
    """Names of the parameters that a criterion depends on while its outputs are held constant."""
    if function.problem.built_in is not None:
        return []
    function.total(function.theta, piece)  # the whole loss decides how its parameters are reached
    total = function.with_constant_outputs(function.theta, piece)
    if not total.requires_grad:
        return []
    grads = torch.autograd.grad(total, function.theta, allow_unused=True)
    return [name for name, grad in zip(function.names, grads, strict=True) if grad is not None]
