"""Benchmark rows to terminal, Markdown and CSV, with what is needed to repeat them."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch

from benchmarks.adapters import PACKAGES, version
from hessdiag.engine.products.devices import name_of, started
from hessdiag.files import write_whole


@dataclass(frozen=True)
class Row:
    """One line of every CSV."""

    workload: str
    tool: str
    quantity: str  # with its unit
    value: float | None  # None: not reached, crashed or not installed; ``accuracy`` says which
    ratio_to_best_peer: float | None
    accuracy: str


HEADINGS = tuple(field.name for field in fields(Row))


def to_csv(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEADINGS)
    for row in rows:
        writer.writerow(["" if cell is None else cell for cell in astuple(row)])
    return stream.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in rows:
        cells = [
            "–" if c is None else f"{c:.4g}" if isinstance(c, float) else c.replace("|", "/") for c in astuple(row)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def circumstances() -> str:
    """Command, date, machine and versions."""
    tools = ", ".join(f"{tool} {version(tool)}" for tool in ("hessdiag", *PACKAGES))
    words = list(sys.argv[1:])
    if "--data" in words:
        words[words.index("--data") + 1] = "DIR"  # where the data lie on this machine helps nobody
    command = "python -m benchmarks " + " ".join(words)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread"
    device = started()
    if device is not None:
        machine += f"; {name_of(device) or device.type}, CUDA {torch.version.cuda}"
    base = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"`{command}`, {today}, {base}, {tools}; {machine}.\n"


def report(title: str, explanation: str, rows: Sequence[Row]) -> str:
    return f"# {title}\n\n{explanation}\n\n{circumstances()}\n{to_markdown(rows)}"


def save(folder: Path, name: str, text: str, rows: Sequence[Row]) -> None:
    """Write ``name``.md and ``name``.csv."""
    write_whole(folder / f"{name}.md", text)
    write_whole(folder / f"{name}.csv", to_csv(rows))
