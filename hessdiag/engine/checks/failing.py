"""What the user's code raises, as a refusal that says where and what to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hessdiag.criteria import TARGET_KEYS
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory, to_check
from hessdiag.errors import HessdiagError, MeasurementError, ProblemError, one_line
from hessdiag.samples import row_count


@contextmanager
def failures_named(operator: Curvature, where: str) -> Iterator[None]:
    """What the user's code raises becomes a refusal that says where."""
    try:
        yield
    except HessdiagError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise MeasurementError(too_large(operator, where, error)) from error
        kind = type(error).__name__
        msg = f"model or loss fails on {where} ({kind}: {one_line(error, 140)}): {to_check(error)}"
        msg += _without_labels(operator)
        msg = "; ".join((msg, *operator.samples.notes))
        raise ProblemError(msg) from error


def _without_labels(operator: Curvature) -> str:
    problem, batch = operator.problem, operator.batches[0]
    if problem.loss is not None or problem.forward is not None or not isinstance(batch, Mapping):
        return ""
    labels = next((key for key in TARGET_KEYS if key in batch), None)
    if labels is None:
        return ""
    return (
        f"; it was called without {labels}; if it needs them, forward=lambda model, batch: model(**batch).logits"
    )


def too_large(operator: Curvature, where: str, error: BaseException) -> str:
    """What to say where memory runs out."""
    rows = row_count(operator.batches[0])
    return f"out of memory on {where} ({one_line(error, 100)}): a `batch_size` below {rows}, or `params`"
