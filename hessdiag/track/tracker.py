"""Sharpness during training: measured on the live model, on samples of its own, within a share of the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.analysis.asked import options_asked, problem_of, sample_set
from hessdiag.engine.products.devices import wait
from hessdiag.engine.products.group import Group
from hessdiag.errors import UsageError, one_line
from hessdiag.option import Fault, refuse
from hessdiag.results import Analysis
from hessdiag.samples import SampleSet
from hessdiag.settings import Settings
from hessdiag.shown import csv_text
from hessdiag.track import pacing, saved
from hessdiag.track.live import Live
from hessdiag.track.loggers import Logger, loggers_of
from hessdiag.track.measured import COLUMNS, Measured
from hessdiag.track.trajectory import Trajectory
from hessdiag.track.watch import Watch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATE = 1
DRAWING = 0.25  # of the time of measuring, at most, for figures that loggers take


class Tracker:
    """Measures a model while it is trained, now and then, and leaves it as it was.

    Args:
        problem: what to measure, as `hessdiag.analyze` takes it; or the model, with ``loss_fn`` and ``data``; or
            these three in a tuple.
        loss_fn: of a model.
        data: of a model: the training loader, as a rule.
        every: steps between two measurements, at least.
        quantities: out of those of `hessdiag.analyze`. λ_max and trace are the cheapest: 10 to 20 products in all
            where the trace needs no probes.
        budget: share of the wall time that measuring may take, "5%" or 0.05. Where it does not allow for one
            every ``every`` steps, the tracker measures less often, at multiples of ``every``, and says so once.
            The first is always made. None: always measure. 5%: a run of an hour then takes three minutes more.
        samples: how many examples; by default 1024, or all. They are drawn once, and kept in memory.
        optimizer: of the training: gives learning rate and momentum for the line 2/lr, and what
            ``preconditioned_lambda_max`` needs.
        log: where numbers go as they come: a TensorBoard ``SummaryWriter``, a W&B run, ``mlflow``,
            ``(MlflowClient, run_id)``, a logger of Lightning, the path of a CSV file, ``f(dict, step)``, or a list
            of these.
        seed: of samples and random starts.
        group: a process group whose ranks measure together, as for `hessdiag.analyze`; all of them call ``step``.
        **options: other fields of `Settings`. ``effort`` is "quick": λ_max to 1%, the trace to 5%.

    Attributes:
        samples: what it measures on.

    Raises:
        OptionError: options that do not exist or are out of range.
        ProblemError: the first three are no problem, or the data cannot be read.
        UsageError: ``log`` is of no known kind.

    >>> import hessdiag, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model, x, y = nn.Linear(5, 3), torch.randn(64, 5), torch.randint(3, (64,))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> tracker = hessdiag.Tracker(model, nn.CrossEntropyLoss(), (x, y), every=10, budget=None)
    >>> for step in range(30):
    ...     optimizer.zero_grad()
    ...     nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    ...     _ = tracker.step(step, lr=0.5)
    >>> tracker.history[tracker.history.quantity == "trace"].step.tolist()
    [0, 10, 20]
    """

    def __init__(
        self,
        problem: Any,
        loss_fn: Any = None,
        data: Any = None,
        *,
        every: int = 100,
        quantities: str | Sequence[str] = ("lambda_max", "trace"),
        budget: str | float | None = "5%",
        samples: int | None = None,
        optimizer: Any = None,
        log: Any = None,
        seed: int = 0,
        group: Any = None,
        **options: Any,
    ) -> None:
        if isinstance(problem, tuple) and len(problem) == 3 and loss_fn is None and data is None:
            problem, loss_fn, data = problem
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            refuse(Fault("every", every, "a whole number of steps, 1 or more, is needed"))
        asked = {"effort": "quick", **options, "quantities": quantities, "samples": samples, "seed": seed}
        self.settings = Settings(**options_asked(None, asked))
        self.every, self._pace = every, pacing.Pace(pacing.share_of(budget))
        self._budget = budget
        found = problem_of(problem, loss_fn, data, "hessdiag.Tracker")
        self.problem = found if optimizer is None else replace(found, optimizer=optimizer)
        self._group = Group(group)
        self._loggers: list[Logger] = loggers_of(log, self._table) if self._group.rank == 0 else []
        self.samples: SampleSet = self._group.first(lambda: sample_set(self.problem, self.settings))
        self._watch = Watch(self.problem, self.settings, self.samples, self._group)
        self._found: list[Measured] = []
        self._last: int | None = None
        self._live, self._drawing, self._figure_cost = Live(), 0.0, 0.0

    def step(self, step: int, lr: float | None = None) -> Analysis | None:
        """Measure, if it is due and within the budget; else nothing. To be called after the optimizer's step.

        What cannot be measured (a loss that is NaN, no memory) becomes a row with the reason, and training goes
        on. An interrupt passes through. The model's weights are copied while it is measured; weights, modes,
        ``.grad``, buffers, ``requires_grad`` and random states are as they were afterwards.

        Args:
            step: of training, counted by the caller.
            lr: learning rate at it; by default the optimizer's.

        Returns:
            What was measured now; None where nothing was.
        """
        self._pace.begin(step)
        reached, self._last = pacing.due(step, self._last, self.every), step
        if not reached:
            return None
        if not self._group.number(self._pace.allows()):
            self._watch.tell(self._pace.slower(step, self.every, self._budget), key="budget")
            return None
        wait()  # what training has queued is no time of measuring
        with self._pace.measuring():
            found = self._watch.measure(step, lr)
            self._found.append(found)
            self._report(found)
        return found.point.analysis

    @property
    def trajectory(self) -> Trajectory:
        """What was measured, as ``hessdiag track`` shows it."""
        return Trajectory(points=tuple(one.point for one in self._found), notes=tuple(self._watch.notes))

    @property
    def history(self) -> pd.DataFrame:
        """Tidy table, one row per step and quantity.

        Columns: step, quantity, value, lo, hi, how (exact, probes, ritz, ...), lr, seconds and products (of the
        whole measurement, the same in each of its rows), reason ('' where there is a number).
        """
        import pandas as pd

        rows = [row for one in self._found for row in one.rows(self.settings.quantities)]
        return pd.DataFrame(rows, columns=[*COLUMNS])

    @property
    def share(self) -> float:
        """Share of the wall time since the first step that measuring took; 0.0 before."""
        return self._pace.spent / self._pace.elapsed if self._pace.elapsed else 0.0

    def plot(self, *, live: bool = False) -> Figure:
        """The trajectory: λ_max with its interval and the line 2/lr, trace and loss, over the steps.

        Args:
            live: in a notebook, open a display here and draw it anew after each measurement.

        Raises:
            UsageError: nothing was measured, and it is not ``live``.
        """
        if live and not self._live.shown:
            self._live.open()
        if live and not self.trajectory.measured:
            from matplotlib.figure import Figure

            return Figure()
        from hessdiag.track.plots import evolution

        figure = evolution(self.trajectory)
        if self._live.shown:
            from hessdiag.present.vector import svg

            self._live.update(svg(figure, title="trajectory"))
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``step-*/run.json`` of each measurement, trajectory.json and history.csv.

        ``hessdiag track FOLDER`` shows them, ``hessdiag compare`` takes two of the run folders.

        Raises:
            OutputError: the folder cannot be written.
        """
        return saved.save(folder, self.trajectory, self._table()) if self._group.rank == 0 else Path(folder)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs to go on with the same rows; loads with ``weights_only=True``."""
        return {
            "version": STATE,
            "samples": self.samples.digest,
            "last": self._last,
            "pace": self._pace.state(),
            "watch": self._watch.state(),
            "measured": [one.state() for one in self._found],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a tracker of the same problem and options was.

        Raises:
            UsageError: the state is of other samples, or of a newer version.
        """
        if state.get("version") != STATE:
            msg = f"a tracker's state of version {state.get('version')}, hessdiag reads {STATE}: update hessdiag"
            raise UsageError(msg)
        if state["samples"] != self.samples.digest:
            msg = "the state is of a tracker with other samples: give it the same data, `samples` and `seed`"
            raise UsageError(msg)
        found = [Measured.of(one) for one in state["measured"]]
        self._last, self._found = state["last"], found
        self._pace.resume(state["pace"])
        self._watch.resume(state["watch"], [one.point for one in found])

    def _table(self) -> str:
        return csv_text(self.history)

    def _report(self, found: Measured) -> None:
        """Hand a measurement to the loggers, and figures as far as these keep to their part of the time."""
        scalars = found.scalars()
        for logger in self._loggers:
            logger.take(scalars, found.step)
        wanted = [logger for logger in self._loggers if logger.figure is not None]
        if not scalars or not (wanted or self._live.shown):
            return
        if self._drawing + self._figure_cost > DRAWING * (self._pace.spent + found.seconds):
            return
        begun = pacing.clock()
        try:
            figure = self.plot()
            for logger in wanted:
                logger.draw(figure, found.step)
        except Exception as error:  # a picture is not worth a training
            self._watch.tell(f"the trajectory cannot be drawn: {one_line(error)}", key="figure")
        self._figure_cost = pacing.clock() - begun
        self._drawing += self._figure_cost
