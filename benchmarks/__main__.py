"""``python -m benchmarks NAME``: see benchmarks/README.md."""

from __future__ import annotations

from pathlib import Path

import click

HEADS = {
    "peers": (
        "CPU time to a true accuracy",
        "The cost of the first budget at which a tool is right; ratio_to_best_peer is against the fastest peer.",
    ),
    "products": ("Cost of a product", "Gradients per product; ratio_to_best_peer is against the cheapest peer."),
    "wrong": ("Wrong answers", "Closed-form cases put to every tool; value is its answer."),
    "steps": (
        "Cost of a step",
        "Gradients per step of a regularizer; ratio_to_best_peer is against SAM as two plain passes, in pairs.",
    ),
    "closed_form": (
        "The closed form of a three-layer network",
        "Wolkowicz-Styan bound by formula, in both orders, alone and with its gradient; and a step of HSR.",
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
    "coverage": ("Coverage", "Share of seeds whose interval holds the truth; value is that share."),
}


@click.command()
@click.argument("name", type=click.Choice([*HEADS, "papers", "truth", "all"]), default="all")
@click.option("--data", type=click.Path(exists=True, file_okay=False), help="Folder of data and checkpoints.")
@click.option("--device", default="cpu", show_default=True, help="Where independent truths are computed.")
@click.option("--csv", "csv_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all rows here.")
@click.option("--quick", is_flag=True, help="Smoke run on the digits MLP, under a minute, no data needed.")
@click.option(
    "--only", multiple=True, help="Workloads to run, instead of all (peers, checkpoints, gate, truth), or papers."
)
@click.option("--quantity", multiple=True, help="lambda_max or trace, instead of both (peers).")
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
    if name == "papers":
        _papers(data, quick, only, keep or (keep is None and not quick))
        return
    rows: list[tables.Row] = []
    for chosen in HEADS if name == "all" else (name,):
        kept = keep or (keep is None and not quick)
        suffix = "".join(f"-{word}" for word in (*only, *quantity))
        if chosen == "gate":
            image = truth.RESULTS / f"gate{suffix}.png" if kept else None
            part = gate.run(data, quick, only, runs, seeds, image)
        else:
            part = _run(chosen, data, quick, only, quantity)
        rows += part
        text = tables.report(*HEADS[chosen], part)
        click.echo(text)
        if kept:
            tables.save(truth.RESULTS, chosen + suffix, text, part)
    if csv_file is not None:
        csv_file.write_text(tables.to_csv(rows))


def _run(name: str, data: str | None, quick: bool, only: tuple[str, ...], quantity: tuple[str, ...]) -> list:
    from benchmarks import checkpoints, closed_form, coverage, peers, products, startup, steps, wrong

    if name == "peers":
        return peers.run(data, quick, only, quantity)
    if name == "products":
        return products.run(data, quick, only)
    if name == "checkpoints":
        return checkpoints.run(data, quick, only)
    runner = {
        "wrong": wrong.run,
        "steps": steps.run,
        "closed_form": closed_form.run,
        "startup": startup.run,
        "coverage": coverage.run,
    }[name]
    return runner(data, quick)


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
