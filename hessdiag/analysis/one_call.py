"""A measurement in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from hessdiag.analysis.asked import are_quantities, options_asked, problem_of
from hessdiag.analysis.measurement import Measurement, Progress
from hessdiag.described import takes
from hessdiag.engine.products.group import Group
from hessdiag.presenter import presenter
from hessdiag.problem import Problem
from hessdiag.results import Analysis
from hessdiag.settings import Options, Settings


@takes(Settings)
def analyze(
    problem: Problem | nn.Module,
    loss_fn: Any = None,
    data: Any = None,
    *,
    optimizer: Any = None,
    progress: Progress | bool | None = None,
    resume: str | Path | None = None,
    group: Any = None,
    shard_vectors: bool = False,
    **options: Unpack[Options],
) -> Analysis:
    """Measure how sharp a checkpoint is, every number with its interval.

    Either ``analyze(model, loss_fn, data)``, as a training loop has them, or ``analyze(problem)``, after which
    quantities may stand.

    Args:
        problem: what to measure; or the model.
        loss_fn: of a model: one of torch's losses, a name, ``f(outputs, targets)``, ``f(outputs, batch)`` or
            ``f(model, batch)``; see `Problem`.
        data: of a model: a ``DataLoader``, a data set, tensors (inputs, targets), or several by split.
        optimizer: that the model was trained with, or its state dict, for the quantity
            ``preconditioned_lambda_max``; by default the problem's.
        progress: True shows what is measured now, how long it has taken and about how long it will: a bar in a
            notebook, a table on a terminal, lines in a log, on stderr. Or called with (stage, done, total). By
            default nothing is shown.
        resume: folder in which to keep what has been found, from 10 seconds on and in at most 2% of the time. If
            the program is killed, the same call goes on from there; when it is done nothing is left in the folder.
            By default nothing is kept. The command keeps it under ``.hessdiag/cache/resume``.
        group: a process group of ``torch.distributed`` whose ranks measure together, each a share of the batches:
            ``torch.distributed.group.WORLD``. All of them make this call, and all have the result. By default this
            process measures alone, whatever group there is.
        shard_vectors: every rank of the group holds a part of every vector only: for bases that fit in none.
        **options: the fields of `Settings`.

    Returns:
        The numbers, with fingerprint, cost, environment and warnings. Cost with the defaults: about 90 products.

    Raises:
        OptionError: options that do not exist, are out of range or contradict each other: all of them.
        ProblemError: the first three arguments are no problem; its text says what to type.
        MeasurementError: the products cannot be believed (`hessdiag.engine.checks.preflight` says why).

    >>> import hessdiag, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> found = hessdiag.analyze(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y))
    >>> found["trace"].kind
    'exact'
    """
    quantities = None
    if isinstance(problem, Problem) and data is None and are_quantities(loss_fn):
        quantities, loss_fn = loss_fn, None
    settings = Settings(**options_asked(quantities, options))
    found = problem_of(problem, loss_fn, data, "hessdiag.analyze")
    found = found if optimizer is None else replace(found, optimizer=optimizer)
    ranks = Group(group, shard_vectors=shard_vectors)
    with ranks.together():
        measurement = Measurement(found, settings, group=ranks)
        if resume is not None:
            measurement.keep_in(resume)
        return _measured(measurement, progress if ranks.rank == 0 else None)


def _measured(measurement: Measurement, progress: Progress | bool | None) -> Analysis:
    if progress is True:
        with presenter().watched() as look:
            result = measurement.run(look=look)
    else:
        result = measurement.run(progress=progress or None)
    if measurement.kept is not None:
        measurement.kept.forget()
    return result
