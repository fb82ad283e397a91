"""Records of checkpoints kept for a next time, by everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import UsageError
from hessdiag.gap.examine import Examination
from hessdiag.gap.record import SCHEMA, CheckpointRecord
from hessdiag.installed import version
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.sources.spec import split_key

NUMBERS = 2  # one more whenever a measure of the same name becomes another number
SAME_LOSS = 1e-4  # relative: threads and devices move a mean loss by 1e-6, other code by more


def digest(path: str) -> str:
    """sha256 of a file, ``path::entry`` included; of a folder, of the names and contents of all files below it.

    Args:
        path: as ``-c`` takes it. Links are followed, a folder that was seen already is not entered again.

    Raises:
        UsageError: it cannot be read.
    """
    plain = Path(split_key(path)[0])
    try:
        if not plain.is_dir():
            return _of_file(plain)
        whole = hashlib.sha256()
        for file in sorted(_files(plain), key=lambda file: os.fsencode(file.relative_to(plain))):
            whole.update(os.fsencode(file.relative_to(plain)) + b"\0" + bytes.fromhex(_of_file(file)))
        return whole.hexdigest()
    except OSError as error:
        msg = f"{error.filename or path} cannot be read: {error.strerror or error}"
        raise UsageError(msg) from error


def _of_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Regular files below; a pipe or socket would block, a broken link holds nothing."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two ways into one folder always the same
        yield from (Path(here, name) for name in names if Path(here, name).is_file())


def key(*parts: Any, asked: Examination) -> str:
    """A name for a record: of what it was made from, the versions that made it, and what was asked.

    Args:
        *parts: hashes, options and facts that the record depends on.
        asked: the examination.
    """
    named = [SCHEMA, NUMBERS, version(), torch.__version__, sorted(asked.chosen()), asdict(asked), *parts]
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:20]


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
    samples = draw(problem.data[s.split], split=s.split, samples=s.samples, seed=s.seed, batch_size=s.batch_size)
    if samples.digest != record.fingerprint.data_sha256:
        return None
    dtype = getattr(torch, s.dtype) if s.dtype else None
    first = Curvature(problem, replace(samples, batches=samples.batches[:1]), dtype=dtype, device=s.device)
    return record if abs(first.batch_losses[0] - record.first_loss) <= SAME_LOSS * abs(record.first_loss) else None
