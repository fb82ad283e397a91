"""``hessdiag demo``."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Literal

import click

from hessdiag.cli.output import REPORT, page_of, say, show, tell, write_run
from hessdiag.cli.progress import display

Kind = Literal["plain", "flat"]
NAMES: dict[Kind, str] = {"plain": "SGD", "flat": "SGD with weight noise"}


@click.command()
@click.option(
    "-o",
    "folder",
    default="hessdiag-demo",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for checkpoints, plots and the report.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of training and measurement.")
@click.option("--debug", is_flag=True, help="Show the traceback of a refusal.")
def demo(folder: Path, seed: int, debug: bool) -> None:  # noqa: ARG001
    """Train two small networks on the embedded digits, measure both, and write a report."""
    from hessdiag.files import require_writable

    require_writable(folder)

    import torch
    from safetensors.torch import save

    from hessdiag.analysis import Measurement
    from hessdiag.cli.measuring import measured
    from hessdiag.files import write_whole
    from hessdiag.settings import Settings
    from hessdiag.sources.digits import problem, train_digits

    torch.set_num_threads(1)  # on networks this small, threads mostly wait for each other
    results = {}
    for kind, name in NAMES.items():
        with display(quiet=False) as report:
            trained = train_digits(kind, seed=seed, on_epoch=partial(report, f"training {kind}"))
        checkpoint = write_whole(folder / f"{kind}.safetensors", save(trained.state_dict()))
        subject = problem()
        subject.model.load_state_dict(trained.state_dict())
        found, _ = measured(Measurement(subject, Settings(seed=seed)), quiet=False, title=kind)
        result = found.about(f"{kind}: {name}")
        write_run(result, folder / kind)
        results[result.title] = result
        say([f"{checkpoint}: measured"], quiet=False)
    page = write_whole(folder / REPORT, page_of(results))
    show(results)
    tell(f"run folders: {folder}/plain, {folder}/flat (run.json, metrics.csv, plots)")
    tell(f"report:      {page.resolve().as_uri()}")
    flat = shlex.quote(f"{folder}/flat.safetensors")
    same = f" --seed {seed}" if seed else ""
    tell(f"again:       hessdiag analyze hessdiag.sources.digits:problem -c {flat}{same}")
