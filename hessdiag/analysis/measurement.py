"""A problem and its settings become an `Analysis`: drawn, checked, forecast, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hessdiag.analysis.asked import sample_set
from hessdiag.analysis.closed import network_of
from hessdiag.analysis.foreseen import Foreseen, foresee, in_words
from hessdiag.analysis.going_on import keeping, name_of, opened, taken, told
from hessdiag.analysis.needs import PRECONDITIONED, planned
from hessdiag.analysis.preconditioned import take_preconditioned
from hessdiag.analysis.record import environment, fingerprint, key_of
from hessdiag.analysis.room import LONG as VECTORS
from hessdiag.analysis.room import fit_block
from hessdiag.analysis.so_far import Account, SoFar
from hessdiag.analysis.spending import Spending
from hessdiag.analysis.structure import by_structure, sought
from hessdiag.analysis.sweep import Sweep
from hessdiag.closed_form import Recognized
from hessdiag.engine.checks.batch_size import for_device
from hessdiag.engine.checks.preflight import Preflight, preflight, require_sound
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import device_of
from hessdiag.engine.products.group import ALONE, Group
from hessdiag.engine.products.preconditioned import preconditioner_for
from hessdiag.errors import UsageError
from hessdiag.problem import Problem
from hessdiag.results import Analysis, Cost, Fingerprint, Metric
from hessdiag.resume import Kept
from hessdiag.samples import SampleSet
from hessdiag.settings import Settings
from hessdiag.spectral.inner import vectors_of
from hessdiag.spectral.warm import Warm, ending

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Measurement:
    """A problem with its settings, checked and ready: `forecast` says what `run` will cost.

    Args:
        problem: what to measure.
        settings: as asked.
        samples: drawn before; None draws them.
        group: the ranks that measure together: all of them make the same calls, and have the same results.

    Attributes:
        checked: the preflight, with the operator.
        settings: as asked.
        samples: the frozen sample set.
        left: after `run`, what a run at the next checkpoint may start near; None without extremes.
        kept: after `keep_in`, what is kept; whoever has put the result in its place calls its ``forget``.
        repeatable: whether the last `run` would give the same again: neither a clock nor an interrupt ended it.
    """

    def __init__(
        self, problem: Problem, settings: Settings, samples: SampleSet | None = None, group: Group = ALONE
    ) -> None:
        self._begun = time.perf_counter()
        self.settings, self.samples = settings, samples or sample_set(problem, settings)
        if settings.params is not None:
            problem = replace(problem, params=tuple(settings.params))
        self._spending: Spending | None = None
        self._interrupted = False
        self.left: Warm | None = None
        self.repeatable = True
        self.kept: Kept | None = None
        wanted = settings.wants(PRECONDITIONED)
        if wanted and group.shares:
            msg = f"`shard_vectors`: {PRECONDITIONED} needs whole vectors: leave one of the two away"
            raise UsageError(msg)
        self.preconditioner = preconditioner_for(problem) if wanted else None
        where: dict[str, Any] = {
            "dtype": getattr(torch, settings.dtype) if settings.dtype else None,
            "device": device_of(settings.device),
        }
        if samples is None and settings.batch_size is None:
            self.samples = for_device(problem, self.samples, **where, group=group)
        self.checked: Preflight = preflight(
            problem,
            self.samples,
            kind=settings.operator,
            method=settings.method,
            products=planned(settings),
            **where,
            block=settings.block,
            opinion=settings.second_opinion,
            group=group,
        )

    @property
    def operator(self) -> Curvature:
        """H, or G, on the sample set."""
        return self.checked.operator

    @property
    def fingerprint(self) -> Fingerprint:
        """What must agree before the result may be compared with another."""
        found = fingerprint(self.operator, self.settings)
        return replace(found, optimizer_sha256=self.preconditioner.sha256) if self.preconditioner else found

    @property
    def key(self) -> str:
        """A name by all that the numbers depend on: a finished measurement is found again by it."""
        return key_of(self.fingerprint, self.environment, self.settings)

    @property
    def environment(self) -> dict[str, Any]:
        """Where it is measured."""
        return environment(self.checked)

    @cached_property
    def network(self) -> Recognized | None:
        """The three-layer network whose closed form gives the traces, where that is worth its time."""
        return network_of(self.operator, self.sought)

    @cached_property
    def structure(self) -> dict[str, Metric]:
        """Numbers that need no product."""
        return by_structure(self.operator, self.settings)

    @cached_property
    def sought(self) -> Settings:
        """The settings without these numbers."""
        return sought(self.settings, self.structure)

    @property
    def products(self) -> int:
        """Products the measurement will take, about."""
        return planned(self.sought, closed=self.network is not None, size=self.operator.size)

    @cached_property
    def foreseen(self) -> Foreseen:
        """What `run` will take; costs a product or two, whose graphs it then finds."""
        return foresee(self.checked, self.sought, self.network)

    def forecast(self) -> str:
        """One line: parameters, samples, and the products, time and memory the measurement will take."""
        if self.checked.texts("fault"):
            examples = f"{self.operator.size:,} parameters, {self.samples.examples:,} samples"
            return f"{examples}: no forecast before that is mended"
        return in_words(self.foreseen, self.operator, self.settings, closed=self.network is not None)

    def keep_in(self, folder: str | Path, *, fresh: bool = False, writes: bool = True) -> str:
        """Let `run` keep what it finds, and go on from what a killed run left; a line that says so, or "".

        The folder is of any number of measurements, and made when something is written, 10 s after the start.
        With ``fresh`` nothing is taken. Several ranks keep nothing.
        """
        if self.checked.texts("fault") or self.operator.group.size > 1:
            return ""
        place = Path(folder) / name_of(self.fingerprint, self.environment, self.settings, self.checked)
        self.kept = opened(place, self.checked, self._begun, fresh=fresh, writes=writes)
        self.checked = taken(self.kept, self.checked)
        return told(self.kept)

    def interrupt(self) -> None:
        """End with what there is: `run` returns the answer so far, its intervals as honest as ever.

        May be called from another thread or a signal handler. Asked before `run` begins, it ends that after five
        products.
        """
        self._interrupted = True
        if self._spending is not None:
            self._spending.interrupted = True

    def run(
        self,
        progress: Progress | None = None,
        warm: Warm | None = None,
        look: Callable[[SoFar], None] | None = None,
    ) -> Analysis:
        """Measure; where ``warm`` is given, the extremes start near what an earlier run left.

        Args:
            progress: called with (stage, done, total).
            warm: of an earlier run.
            look: called with what is known by then, five times per second at most. Who looks may end it because
                of what it shows: after an `interrupt` intervals over probes are made wider, and hold all the same.

        Raises:
            MeasurementError: the preflight found a fault, or a product is not finite.
        """
        require_sound(self.checked)
        if self.operator.size > VECTORS:
            self.foreseen.require_free()
        checked, op, total = self.checked, self.operator, self.products
        kept, clock = self.kept, self.kept.clock if self.kept else time.perf_counter
        begun, before, spent = clock(), op.products + op.beside, op.seconds
        report = progress or (lambda *_: None)

        def done() -> int:
            return op.products + op.beside - before

        def watch(_: int) -> None:
            report("products", min(done(), total), total)
            account.tell()

        account = Account(look, self.settings, done, total)
        spending = Spending(self.settings.spending, op, checked.gradient_seconds, self._begun, clock)
        self._spending, spending.interrupted, op.watch = spending, self._interrupted, watch
        known, warnings, notes = dict(self.structure), tuple[str, ...](), tuple[str, ...]()
        try:
            with keeping(kept, op, lambda: spending.interrupted):
                fit_block(op)
                if self.preconditioner is not None:
                    own, warnings, notes = take_preconditioned(op, self.settings, self.preconditioner, spending)
                    known[own.quantity] = own
                with vectors_of(op):
                    found = Sweep(op, self.sought, spending, self.network, warm, account, known).run()
        finally:
            op.watch = op.room = self._spending = None
            self._interrupted = False
            op.graphs.release()
        self.repeatable, retreats = spending.repeatable, op.group.all_of(op.notes)
        if found.krylov is not None and found.convergence.steps and not op.group.shares:
            self.left = ending(found.krylov, warm.turn + 1 if warm else 1)
        return Analysis(
            metrics={name: found.metrics[name] for name in self.settings.quantities if name in found.metrics},
            spectrum=found.spectrum,
            top=found.top,
            other_bounds=found.other_bounds,
            layers=found.layers,
            convergence=found.convergence,
            self_test=checked.self_test,
            second_opinion=checked.second_opinion,
            fingerprint=self.fingerprint,
            cost=Cost(
                products=done(),
                gradients=(op.seconds - spent) / max(checked.gradient_seconds, 1e-9),
                seconds=clock() - begun,
            ),
            environment=self.environment,
            warnings=(*checked.texts("warning"), *warnings, *found.warnings, *dict.fromkeys(retreats)),
            notes=(*checked.texts("note"), *notes, *found.notes, *(kept.notes if kept else ())),
        )
