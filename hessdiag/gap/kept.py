"""Records of checkpoints kept for a next time, by everything they depend on and by no path."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from hessdiag import hashing
from hessdiag.analysis.asked import sample_set
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import device_of
from hessdiag.errors import UsageError
from hessdiag.files import CACHE, cache_folder
from hessdiag.gap.examine import Examination
from hessdiag.gap.record import SCHEMA, CheckpointRecord
from hessdiag.installed import version
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.sources.code import digests_of
from hessdiag.sources.spec import split_key
from hessdiag.track.follow import positive, rate_of

NUMBERS = 2  # one more whenever a measure of the same name becomes another number
SAME_LOSS = 1e-4  # relative: threads and devices move a mean loss by 1e-6, other code by more
OF_THE_RUN = ("edge_of_stability", "noise_scale")
"""Measures that take hyper-parameters of the run into their numbers."""


def records(folder: str | Path | None = None) -> Path:
    """The folder that ``hessdiag gap`` keeps its records in.

    Args:
        folder: as its option ``cache`` takes it. None: what HESSDIAG_CACHE names, or ``.hessdiag/cache``.

    >>> records("/data/cache").as_posix()
    '/data/cache/gap'
    """
    return cache_folder(folder, "gap", CACHE / "gap")


def digest(path: str) -> str:
    """sha256 of a file, ``path::entry`` included, or of a folder; see `hessdiag.hashing.of_path`.

    Args:
        path: as ``-c`` takes it.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return hashing.of_path(Path(split_key(path)[0]))
    except OSError as error:
        msg = f"{error.filename or path} cannot be read: {error.strerror or error}"
        raise UsageError(msg) from error


def key(*parts: Any, asked: Examination) -> str:
    """A name for a record: of what it was made from, the versions that made it, and what was asked.

    Which of several devices of a kind it was made on, and which build of a version of torch made it, do not count.

    Args:
        *parts: hashes, options and facts that the record depends on.
        asked: the examination.
    """
    made_by = (SCHEMA, NUMBERS, version(), torch.__version__.partition("+")[0])
    # measures by their names, however they were asked for
    how = asdict(replace(asked, measures=("*",), settings=replace(asked.settings, device=None)))
    return hashing.key(*made_by, sorted(asked.chosen()), how, *parts)


def of_the_run(facts: Mapping[str, Any], meta: Mapping[str, Any], asked: Examination) -> list[Any]:
    """What the measures asked for read of a run's hyper-parameters; the others stand beside the numbers only.

    Args:
        facts: that files and paths tell.
        meta: of the problem.
        asked: the examination.
    """
    if not any(name in OF_THE_RUN for name in asked.chosen()):
        return []
    both = {**facts, **meta}
    return [rate_of(None, facts, meta), positive(both.get("lr")), positive(both.get("batch_size"))]


def content(problem: Problem, asked: Examination, *, tensors: bool = False) -> str:
    """Names what a problem is besides its checkpoint, wherever its files lie.

    That is: the examples of every split that are measured or judged on, the form of the model, the code of its
    modules and of the loss, and the kind of device. What else a forward pass calls is not seen; it shows in the
    loss, which `read` compares.

    Args:
        problem: built.
        asked: the examination.
        tensors: take the model's weights as well: those that the checkpoint's file does not name.

    Raises:
        HessdiagError: the examples cannot be drawn.
    """
    s, model = asked.settings, problem.bare_model()
    drawn = [sample_set(problem, s)]
    for split, source in problem.data.items():
        drawn.append(draw(source, split=split, samples=asked.evaluate, seed=s.seed, batch_size=s.batch_size))
    seen = [(one.split, one.digest, one.examples, one.available) for one in drawn]
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    layout = [(name, str(one.dtype), _shape(one), one.requires_grad) for name, one in state.items()]
    form = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))
    users = (problem.criterion, problem.loss, problem.forward, problem.metric, problem.weight)
    code = digests_of([*model.modules(), *(one for one in users if one is not None)])
    device = device_of(s.device) or next((one.device for one in state.values()), torch.device("cpu"))
    counted = state if tensors else state.keys() - model.state_dict().keys()  # those that no file holds
    weights = hashing.of_tensors(state[name] for name in sorted(counted))
    return hashing.key(seen, layout, form, problem.loss_name, code, device.type, weights, list(problem.params))


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(tensor.shape)


def read(file: Path, problem: Problem, asked: Examination) -> CheckpointRecord | None:
    """The record, if there is one and it is still true.

    Code that no module and no loss of the problem is written in is not in the key: the samples must be the same,
    and the model must make the same loss of their first batch.
    """
    record = trusted(file, asked)
    if record is None:
        return None
    s = asked.settings
    samples = sample_set(problem, s)
    if samples.digest != record.fingerprint.data_sha256:
        return None
    dtype = getattr(torch, s.dtype) if s.dtype else None
    first = Curvature(problem, replace(samples, batches=samples.batches[:1]), dtype=dtype, device=s.device)
    same = abs(first.batch_losses[0] - record.first_loss) <= SAME_LOSS * abs(record.first_loss)
    return record if same else None


def trusted(file: Path, asked: Examination) -> CheckpointRecord | None:
    """The record as it lies there, if there is one that can be read: its key is taken to say enough."""
    try:
        record = CheckpointRecord.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, UsageError):
        return None
    return _in_order(record, asked)


def _in_order(record: CheckpointRecord, asked: Examination) -> CheckpointRecord:
    """The record with its measures in the order in which they are taken: a file has them by their names."""
    order = list(asked.chosen())
    readings = {name: record.readings[name] for name in order if name in record.readings}
    return replace(
        record, readings=readings, guard={name: record.guard[name] for name in order if name in record.guard}
    )
