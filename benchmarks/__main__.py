"""``python -m benchmarks NAME``: see benchmarks/README.md."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.tables import Row

HEADS = {
    "products": ("Cost of a product", "Gradients per product; ratio_to_best_peer is against the cheapest peer."),
    "extremes": (
        "The extreme eigenvalues to a true accuracy",
        "The cost of the first budget at which a tool is right; ratio_to_best_peer is against the fastest peer.",
    ),
    "trace": (
        "The trace to a true accuracy",
        "The cost of the first budget at which a tool is right; ratio_to_best_peer is against the fastest peer.",
    ),
    "analysis": (
        "A whole analysis",
        "hessdiag's one run against the sum of every part by the peer that is fastest at it.",
    ),
    "defaults": (
        "Every tool at its own defaults",
        "Called as its own README calls it: what it costs, the true error, and the error that it states itself.",
    ),
    "forecast": (
        "The forecast",
        "Products, seconds and peak memory as doctor and analyze say them beforehand; value is forecast / taken.",
    ),
    "memory": (
        "Peak memory",
        "Above model and data, each in a process of its own; the ratio is to the leanest correct peer.",
    ),
    "wrong": ("Wrong answers", "Closed-form cases put to every tool; value is its answer."),
    "steps": (
        "Cost of a step",
        "Gradients per step of a regularizer; ratio_to_best_peer is against SAM as two plain passes, in pairs.",
    ),
    "every": (
        "A penalty every k-th step",
        "What is left of its effect and cost; value is the ratio or difference to plain SGD of equal steps.",
    ),
    "closed_form": (
        "The closed form of a three-layer network",
        "Wolkowicz-Styan bound by formula, in both orders, alone and with its gradient; and a step of HSR.",
    ),
    "accelerator": (
        "An accelerator",
        "Its numbers beside the CPU's, and what a product costs there by how it is launched.",
    ),
    "startup": ("Startup", "The ratio is to `python -c 'import click'`."),
    "checkpoints": (
        "Real checkpoints",
        "Every quantity with its interval, beside an independent truth; value is hessdiag's.",
    ),
    "gate": (
        "The gate",
        "Shares of runs of `hessdiag check` that pass, cannot tell or fail, at true changes known in full.",
    ),
    "certificates": (
        "Certificates in float32",
        "Both ends of small trained networks against float64 truths on the same float32 weights and inputs; value "
        "is the number of certified intervals that miss.",
    ),
    "coverage": ("Coverage", "Share of seeds whose interval holds the truth; value is that share."),
}
ON_DEVICE = ("products", "extremes", "trace", "analysis", "defaults", "memory", "accelerator", "truth")
CHOOSING = (*ON_DEVICE, "forecast", "checkpoints", "gate")


@click.command()
@click.argument("name", type=click.Choice([*HEADS, "papers", "journeys", "truth", "all"]), default="all")
@click.option("--data", type=click.Path(exists=True, file_okay=False), help="Folder of data and checkpoints.")
@click.option("--device", default="cpu", show_default=True, help=f"For {', '.join(ON_DEVICE)}; the others: CPU.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all rows here.")
@click.option("--quick", is_flag=True, help="Smoke run on the digits MLP, under 3 minutes in all, no data needed.")
@click.option("--only", multiple=True, help=f"Workloads, instead of all ({', '.join(CHOOSING)}), or papers.")
@click.option("--quantity", multiple=True, help="lambda_max or lambda_min, instead of both (extremes).")
@click.option("--seeds", type=click.IntRange(1), help="Runs per sharper checkpoint, instead of 40 (gate).")
@click.option("--runs", type=click.IntRange(1), help="Runs of the same checkpoint, instead of 500 (gate).")
@click.option("--keep/--no-keep", default=None, help="Write benchmarks/results (default: unless --quick).")
def main(
    name: str,
    data: str | None,
    device: str,
    csv_file: Path | None,
    quick: bool,
    only: tuple[str, ...],
    quantity: tuple[str, ...],
    runs: int | None,
    seeds: int | None,
    keep: bool | None,
) -> None:
    """Run a benchmark and print its table."""
    from benchmarks import gate, tables, truth
    from benchmarks.timing import one_thread

    one_thread()
    if name == "truth":
        _truths(data, device, only)
        return
    if name == "journeys":
        from benchmarks import journeys

        found = journeys.run(only)
        click.echo(journeys.report(found))
        if keep or (keep is None and not quick and not only):
            journeys.save(found, truth.RESULTS)
        return
    if name == "papers":
        _papers(data, quick, only, keep or (keep is None and not quick))
        return
    rows: list[tables.Row] = []
    for chosen in HEADS if name == "all" else (name,):
        kept = keep or (keep is None and not quick)
        suffix = "".join(f"-{word.replace(' ', '')}" for word in (*only, *quantity, *_elsewhere(chosen, device)))
        if chosen == "gate":
            image = truth.RESULTS / f"gate{suffix}.png" if kept else None
            part = gate.run(data, quick, only, runs, seeds, image)
        else:
            part = _run(chosen, data, quick, only, quantity, device)
        rows += part
        text = tables.report(*HEADS[chosen], part)
        click.echo(text)
        if kept:
            tables.save(truth.RESULTS, chosen + suffix, text, part)
    if csv_file is not None:
        csv_file.write_text(tables.to_csv(rows))


def _elsewhere(name: str, device: str) -> tuple[str, ...]:
    return (device.replace(":", ""),) if name in ON_DEVICE and device != "cpu" else ()


def _run(
    name: str, data: str | None, quick: bool, only: tuple[str, ...], quantity: tuple[str, ...], device: str
) -> list[Row]:
    module = import_module(f"benchmarks.{name}")
    if name == "extremes":
        return module.run(data, quick, only, device, quantity)
    if name in ON_DEVICE:
        return module.run(data, quick, only, device)
    return module.run(data, quick, only) if name in CHOOSING else module.run(data, quick)


def _papers(data: str | None, quick: bool, only: tuple[str, ...], kept: bool) -> None:
    from benchmarks.papers import PAPERS, reproduce
    from benchmarks.papers.claims import markdown, save
    from benchmarks.truth import RESULTS

    for paper in only or PAPERS:
        outcome = reproduce(paper, data, quick)
        click.echo(markdown(outcome, None))
        if kept:
            save(outcome, RESULTS, paper)


def _truths(data: str | None, device: str, only: tuple[str, ...]) -> None:
    from benchmarks.truth import truth
    from benchmarks.workloads import WORKLOADS

    for workload in WORKLOADS.values():
        if (only and workload.name not in only) or (workload.needs_data and data is None):
            continue
        known = truth(workload, data, device)
        click.echo(
            f"{workload.name}: {known.examples} examples, {known.parameters} parameters, loss {known.loss:.6g}"
        )
        for quantity, fact in known.facts.items():
            click.echo(f"  {quantity:18} {fact.value:.8g} ± {fact.error:.2g} ({fact.how})")


if __name__ == "__main__":
    main()
