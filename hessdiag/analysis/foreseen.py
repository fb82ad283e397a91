"""What a measurement will take, said before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from hessdiag.analysis.costs import bytes_of, exact_trace_likely, price, seconds_of
from hessdiag.analysis.needs import preconditioned, shares, uses_trace
from hessdiag.analysis.room import LONG, Free, foreseen_bytes
from hessdiag.closed_form import Recognized, foreseen
from hessdiag.engine.checks.preflight import Preflight
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import MeasurementError
from hessdiag.formatting import format_seconds
from hessdiag.settings import Settings

TIRING = 600.0  # seconds: beyond, a shorter measurement is named
LEANER = "a smaller `batch_size`, `method='layer_streamed'` or `params` take less"
TRACE_GRADIENTS = 10  # of per-example gradients: 9 on MLPs, 21 on a ResNet-20
TRACE_BYTES = 32 * 2**20  # of a chunk of them, and of what torch loads for them


@dataclass(frozen=True)
class Foreseen:
    """What a run will take.

    Attributes:
        products: of the operator, about.
        seconds: on a machine that does nothing else, self-test and planning aside.
        bytes: at the peak, beside model and data: vectors, kept graphs and what a product fills.
        lacking: bytes of those still to be taken that are not free; 0 where all are.
        by_model: whether per-example gradients give the trace, where it is asked for.
    """

    products: int
    seconds: float
    bytes: int
    by_model: bool
    lacking: int = 0

    def require_free(self) -> None:
        """Refuse what does not fit.

        Raises:
            MeasurementError: some of the bytes are not free.
        """
        if self.lacking:
            whole, part = (f"{count / 2**30:.1f} GiB" for count in (self.bytes, self.lacking))
            msg = f"out of memory: this takes about {whole}, of which {part} are not free: "
            raise MeasurementError(msg + LEANER)


def foresee(checked: Preflight, settings: Settings, network: Recognized | None) -> Foreseen:
    """Right within a factor of 1.5 on MLPs of 2,000 to a million parameters and a small GPT.

    Not where the density is much harder: a ResNet-20 takes 136 steps to 35% where 52 are typical.

    Products are what such networks took (`hessdiag.analysis.needs`), their seconds and graphs are measured. Costs
    one product, two where they are cheap; the graphs stay for the run.
    """
    op = checked.operator
    each = price(op)
    by_model = network is None and uses_trace(settings) and exact_trace_likely(op)
    steps, probes = shares(settings, closed=network is not None, by_model=by_model)
    if steps + probes >= op.size:
        steps, probes = op.size, 0
    steps += min(preconditioned(settings), op.size)
    seconds = seconds_of(op, each, steps, probes) + by_model * TRACE_GRADIENTS * checked.gradient_seconds
    if network is not None:
        seconds += foreseen(network).cost.seconds
    spending = settings.spending
    if spending is not None:
        whole = {"s": seconds, "g": seconds / max(checked.gradient_seconds, 1e-9), "p": steps + probes}
        part = min(spending.amount / max(whole[spending.unit], 1e-9), 1.0)
        steps, probes, seconds = round(part * steps), round(part * probes), part * seconds
    if op.size <= LONG:
        memory = bytes_of(op, each, steps, probes) + by_model * TRACE_BYTES
        return Foreseen(steps + probes, seconds, memory, by_model)
    memory, ahead = foreseen_bytes(op, each, settings, steps, probes)
    lacking = int(op.group.number(max(ahead - Free.now(op).own, 0)))
    return Foreseen(steps + probes, seconds, memory + by_model * TRACE_BYTES, by_model, lacking)


def in_words(ahead: Foreseen, op: Curvature, settings: Settings, *, closed: bool) -> str:
    """One line; ``closed`` where the closed form of a three-layer network gives the traces."""
    beside = ", and per-example gradients for the trace" if ahead.by_model else ""
    if closed:
        beside = ", and the closed form of a three-layer network for the traces"
    if ahead.lacking:
        beside += f"; {ahead.lacking / 2**20:,.0f} MiB of it are not free: {LEANER}"
    if (idle := op.group.size - len(op.batches)) > 0:
        beside += f"; {idle} of {op.group.size} ranks have no batch: take a smaller `batch_size`"
    long = ahead.seconds > TIRING and settings.effort != "quick"
    return (
        f"{op.size:,} parameters, {op.samples.examples:,} samples in {len(op.batches)} batches: "
        f"about {ahead.products} products, {format_seconds(ahead.seconds)}, "
        f"{ahead.bytes / 2**20:,.0f} MiB beside the model ({settings.operator}, {op.method})"
        + beside
        + "; a first look: `effort='quick'`" * long
    )
