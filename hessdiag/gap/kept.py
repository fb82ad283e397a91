"""Records of checkpoints kept for a next time, by everything they depend on."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hessdiag import hashing
from hessdiag.analysis.asked import sample_set
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import UsageError
from hessdiag.gap.examine import Examination
from hessdiag.gap.record import SCHEMA, CheckpointRecord
from hessdiag.installed import version
from hessdiag.problem import Problem
from hessdiag.sources.spec import split_key

NUMBERS = 2  # one more whenever a measure of the same name becomes another number
SAME_LOSS = 1e-4  # relative: threads and devices move a mean loss by 1e-6, other code by more


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

    Args:
        *parts: hashes, options and facts that the record depends on.
        asked: the examination.
    """
    made_by = (SCHEMA, NUMBERS, version(), torch.__version__)
    return hashing.key(*made_by, sorted(asked.chosen()), asdict(asked), *parts)


def read(file: Path, problem: Problem, asked: Examination) -> CheckpointRecord | None:
    """The record, if there is one and it is still true.

    The model's code and its data are not in the key: the samples must be the same, and the model must make the
    same loss of their first batch.
    """
    try:
        record = CheckpointRecord.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, UsageError):
        return None
    s = asked.settings
    samples = sample_set(problem, s)
    if samples.digest != record.fingerprint.data_sha256:
        return None
    dtype = getattr(torch, s.dtype) if s.dtype else None
    first = Curvature(problem, replace(samples, batches=samples.batches[:1]), dtype=dtype, device=s.device)
    same = abs(first.batch_losses[0] - record.first_loss) <= SAME_LOSS * abs(record.first_loss)
    return _in_order(record, asked) if same else None


def _in_order(record: CheckpointRecord, asked: Examination) -> CheckpointRecord:
    """The record with its measures in the order in which they are taken: a file has them by their names."""
    order = list(asked.chosen())
    readings = {name: record.readings[name] for name in order if name in record.readings}
    return replace(
        record, readings=readings, guard={name: record.guard[name] for name in order if name in record.guard}
    )
