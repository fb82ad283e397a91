"""The loggers people have, told by what they can do; nothing is imported for them.

What a logger raises ends no training: it is said once, and the next measurement is handed to it all the same.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.errors import UsageError, one_line
from hessdiag.files import write_whole
from hessdiag.track.measured import PREFIX

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (
    "a TensorBoard SummaryWriter, a W&B run, mlflow, (MlflowClient, run_id), a logger of Lightning, a path of a "
    "CSV file, f(dict, step), or a list of these"
)
FIGURE = f"{PREFIX}trajectory"
STEP = f"{PREFIX}step"

Scalars = Mapping[str, float]
say = logging.getLogger("hessdiag")


class Logger:
    """One of the kinds: takes scalars at a step, and figures where ``figure`` is not None.

    Attributes:
        name: of the object, for messages.
        table: whether it takes the whole history, rows without a number included.
    """

    def __init__(
        self,
        name: str,
        scalars: Callable[[Scalars, int], Any],
        figure: Callable[[Figure, int], Any] | None = None,
        *,
        table: bool = False,
    ) -> None:
        self.name, self.scalars, self.figure, self.table = name, scalars, figure, table
        self._told = False

    def take(self, scalars: Scalars, step: int) -> None:
        """Hand on what was measured; a table gets the reason where nothing was."""
        if scalars or self.table:
            self._guarded(self.scalars, scalars, step)

    def draw(self, figure: Figure, step: int) -> None:
        """Hand on a figure."""
        if self.figure is not None:
            self._guarded(self.figure, figure, step)

    def _guarded(self, call: Callable[..., Any], *given: Any) -> None:
        try:
            call(*given)
        except Exception as error:  # a logger of the user's can raise anything
            if not self._told:
                kind = type(error).__name__
                say.warning("hessdiag: the logger %s raised %s: %s", self.name, kind, one_line(error, 200))
            self._told = True


def loggers_of(log: Any, table: Callable[[], str]) -> list[Logger]:
    """The loggers that an object, or a list of objects, stands for.

    Args:
        log: what the user has; None for none.
        table: gives the whole history as CSV text.

    Raises:
        UsageError: an object of no known kind; the text lists the kinds.
    """
    if log is None:
        return []
    each = log if isinstance(log, list) else [log]
    return [_logger(one, table) for one in each]


def _logger(log: Any, table: Callable[[], str]) -> Logger:
    name = type(log).__name__
    if isinstance(log, str | Path):
        return Logger(str(log), lambda _scalars, _step: write_whole(log, table()), table=True)
    if _has(log, "add_scalar"):
        return Logger(name, _each(log.add_scalar), _tensorboard_figure(log))
    if isinstance(log, tuple) and len(log) == 2 and _has(log[0], "log_metric"):
        return _mlflow_client(*log)
    if _has(log, "log_metrics") and _binds(log.log_metrics, {}, step=0):
        return Logger(name, lambda scalars, step: log.log_metrics(dict(scalars), step=step), _metrics_figure(log))
    if _has(log, "log_metric") and _binds(log.log_metric, "run_id", "key", 0.0, step=0):
        msg = f"log={name}: a client of MLflow needs the run's id beside it: log=(client, run.info.run_id)"
        raise UsageError(msg)
    if _has(log, "log") and _binds(log.log, {}, step=0):
        return _wandb(log)
    if callable(log) and _binds(log, {}, 0):
        return Logger(getattr(log, "__qualname__", name), lambda scalars, step: log(dict(scalars), step))
    msg = f"log={name}: allowed: {KINDS}"
    raise UsageError(msg)


def _each(add: Callable[..., Any]) -> Callable[[Scalars, int], None]:
    def scalars(values: Scalars, step: int) -> None:
        for name, value in values.items():
            add(name, value, step)

    return scalars


def _tensorboard_figure(writer: Any) -> Callable[[Figure, int], Any] | None:
    if not _has(writer, "add_figure"):
        return None
    return lambda figure, step: writer.add_figure(FIGURE, figure, step, close=False)


def _metrics_figure(log: Any) -> Callable[[Figure, int], Any] | None:
    """Of mlflow, or of the writer inside a logger of Lightning."""
    if _has(log, "log_figure"):
        return lambda figure, _step: log.log_figure(figure, f"{FIGURE}.png")
    return _tensorboard_figure(getattr(log, "experiment", None))


def _mlflow_client(client: Any, run: str) -> Logger:
    def scalars(values: Scalars, step: int) -> None:
        for name, value in values.items():
            client.log_metric(run, name, value, step=step)

    def figure(drawn: Figure, _step: int) -> None:
        client.log_figure(run, drawn, f"{FIGURE}.png")

    return Logger(type(client).__name__, scalars, figure if _has(client, "log_figure") else None)


def _wandb(run: Any) -> Logger:
    """W&B drops what is logged at a step before its own, so that each number carries its step beside it."""
    if _has(run, "define_metric"):
        run.define_metric(f"{PREFIX}*", step_metric=STEP)

    def at(step: int) -> int:
        reached = getattr(run, "step", None)
        return max(step, reached) if isinstance(reached, int) else step

    def figure(drawn: Figure, step: int) -> None:
        run.log({FIGURE: sys.modules["wandb"].Image(drawn), STEP: step}, step=at(step))

    drawable = hasattr(sys.modules.get("wandb"), "Image")
    return Logger(
        type(run).__name__,
        lambda values, step: run.log({**values, STEP: step}, step=at(step)),
        figure if drawable else None,
    )


def _has(log: Any, name: str) -> bool:
    return callable(getattr(log, name, None))


def _binds(function: Any, *given: Any, **named: Any) -> bool:
    """Whether it can be called so; a function without a signature is taken at its word."""
    try:
        inspect.signature(function).bind(*given, **named)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
