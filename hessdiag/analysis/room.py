"""What a measurement may hold, decided from what is free after one product: the basis of its run, its blocks."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch

from hessdiag.analysis.costs import FIXED, Price, price
from hessdiag.analysis.needs import DEFLATION_STEPS, needs_square, run_steps, uses_trace
from hessdiag.engine.checks.selftest import LARGEST, SELF_TEST
from hessdiag.engine.products.curvature import LONG as LARGE
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.memory import free_bytes
from hessdiag.errors import MeasurementError
from hessdiag.resume import once
from hessdiag.settings import Settings
from hessdiag.spectral.basis import Storage
from hessdiag.spectral.lanczos import SMALLEST_BASIS

BASIS_BYTES = 2 << 30  # a Lanczos basis may have them, where half of the free memory is as much
SHARE, OWN_SHARE = 1 / 4, 1 / 2
"""Of the free memory, where that is more: of one that other programs use too, and of an accelerator's."""
ROUGH_BYTES, ROUGH_SHARE = 3 << 29, 1 / 12
"""The same for a first look (`ROUGH`), which is not worth as much: GPT-2 small then stays below 6 GiB in all."""
FEWEST_VECTORS = 12  # of a run that is restarted in full precision; with fewer, more in half precision say more
MARGIN = 1.3  # rows over what a run typically takes
ROUGH = 1e-2
"""Where no end is asked for more accurately, half precision costs nothing: what it rounds widens an interval by
2e-4 of the largest eigenvalue, that of a run that is restarted by 4e-3 (measured, docs/memory.md)."""
SMALL = 512 << 20  # bytes of a basis, of which nothing is saved
PER_VECTOR = 28
"""Bytes per parameter and vector of a block of probes in float32: signs, products, float64 sums, images."""
BLOCK_SHARE, KEPT_BLOCK_SHARE = 1 / 8, 1 / 32
"""Of the free memory: for blocks that share the building of graphs, and where all graphs are kept, so that a block
of one vector is as fast."""
LONG = 1 << 20  # numbers: shorter vectors need no look at the memory


@dataclass(frozen=True)
class Free:
    """Bytes that could be allocated: where the vectors are, and of the host if that is another memory."""

    own: int
    host: int | None = None

    @classmethod
    def now(cls, operator: Curvature) -> Free:
        """As it is; of several ranks the least."""
        device, smallest = operator.device, operator.group.smallest
        host = None if device.type == "cpu" else smallest(free_bytes(torch.device("cpu")))
        return cls(smallest(free_bytes(device)), host)

    def basis(self, *, rough: bool) -> dict[bool, int]:
        """Bytes that a basis may take, by whether it lies in the host's memory; none where that is the same."""
        least, share = (ROUGH_BYTES, ROUGH_SHARE) if rough else (BASIS_BYTES, SHARE)
        own = share if self.host is None else OWN_SHARE
        rooms = ((False, self.own, own), (True, self.host or 0, share))
        return {on_host: max(min(least, free // 2), int(part * free)) for on_host, free, part in rooms}


def foreseen_bytes(
    operator: Curvature, each: Price, settings: Settings, steps: int, probes: int
) -> tuple[int, int]:
    """Bytes at the peak of a measurement of long vectors beside model and data, and those still to be taken.

    The peak is that of the self-test, which is over by now, or of the run: its basis, and beside it a product, a
    block of probes, or what the trace by way of the model holds. Right within 1.3 (benchmarks/memory_stages.py).

    Args:
        operator: after its self-test.
        each: price of a product.
        settings: what is wanted.
        steps: of the run, about.
        probes: after it.

    Raises:
        MeasurementError: not even the smallest basis fits.
    """
    size, width, free = operator.size, operator.dtype.itemsize, Free.now(operator)
    kept = _basis(operator, settings, free)
    most = block(size, width, operator.block, free, kept=operator.graphs.kept == len(operator.mine))
    long, largest = size >= LARGE, max(count for _, count in operator.layout)
    rows = 1 + min(
        max(steps, DEFLATION_STEPS if needs_square(settings) else 0), kept.vectors or settings.max_steps
    )
    basis = 0 if kept.on_host else rows * operator.width * (2 if kept.half else width)
    product = (2 * width + 8) * size + (2 * width * largest if long else 2 * width * size)
    beside = [product, min(most, probes) * size * PER_VECTOR * width // 4]
    if uses_trace(settings):
        beside.append((3 * width if long else 3 * 8) * size + 4 * width * largest)
    run = each.kept + each.passing + basis + max(beside)
    test = SELF_TEST * size + LARGEST * largest + 2 * (each.kept + each.passing) if width < 8 else 40 * size
    return FIXED + width * size + max(run, test), FIXED + run - each.kept


def held(operator: Curvature, settings: Settings, notes: list[str]) -> Storage:
    """How the run's basis is held, given what is free now; a choice that is not the default is noted, with why."""
    each = operator.width * operator.dtype.itemsize
    if settings.max_steps * each <= SMALL // 4:
        return Storage()
    # one that goes on has the basis that it began with
    found = once(operator, "basis", partial(_chosen, operator, settings), into=Storage)
    if found.reason:
        notes.append(found.reason)
    return found


def _chosen(operator: Curvature, settings: Settings) -> Storage:
    free = measured(operator)
    found = _basis(operator, settings, free)
    said = f"{found.reason} ({free.own / 2**30:.2g} GiB were free)" if found.reason else ""
    return replace(found, reason=said)


def _basis(operator: Curvature, settings: Settings, free: Free) -> Storage:
    if not operator.group.shares:
        return storage(operator.size, operator.dtype.itemsize, settings, free)
    # what rounding a row has is known of whole vectors only
    each, most = operator.width * operator.dtype.itemsize, settings.max_steps
    vectors = max(free.basis(rough=False)[False] // each - 1, FEWEST_VECTORS + settings.top)
    return Storage() if vectors >= most else _said(vectors, False, False, each, most)


def fit_block(operator: Curvature) -> None:
    """Let no more vectors travel together than a share of what is free holds."""
    if operator.size > LONG and operator.block > 1:
        free, graphs = measured(operator), operator.graphs
        kept = graphs.kept == len(operator.mine)
        numbers = operator.size, operator.dtype.itemsize, operator.block, free
        operator.block = operator.group.smallest(once(operator, "block", partial(block, *numbers, kept=kept)))


def measured(operator: Curvature) -> Free:
    """What is free once a product has been formed; of a large model one is formed for it, which does not count."""
    if operator.size > LONG and not operator.group.number(operator.graphs.largest) and not operator.products:
        price(operator)
    return Free.now(operator)


def storage(size: int, itemsize: int, settings: Settings, free: Free) -> Storage:
    """How the run's basis is held: as it is while what it will need fits, then more tightly, then restarted.

    Args:
        size: P.
        itemsize: bytes of a number.
        settings: how many steps the ends and the density need, typically, and how well they must be known.
        free: bytes.

    Raises:
        MeasurementError: not even the smallest basis fits.
    """
    most, least = settings.max_steps, SMALLEST_BASIS + settings.top - 1
    needed = min(most, math.ceil(MARGIN * run_steps(settings)))
    bytes_of = {False: size * itemsize, True: size * 2}  # of a row, by whether it is held in half precision
    rough = min(settings.known_to.lambda_max, settings.known_to.lambda_min) >= ROUGH
    rooms, saving = free.basis(rough=rough), rough and needed * bytes_of[False] > SMALL
    for on_host, half in itertools.product((False, True), (saving, True)):
        vectors = rooms[on_host] // bytes_of[half] - 1  # and the residual
        if vectors >= most and not (on_host or half):
            return Storage()
        if vectors >= needed:
            return _said(needed if saving else min(vectors, most), half, on_host, bytes_of[half], most)
    on_host = rooms[True] > rooms[False]
    half = rooms[on_host] < (FEWEST_VECTORS + settings.top) * bytes_of[False]
    vectors = max(rooms[on_host] // bytes_of[half] - 1, least)
    left = free.own if free.host is None or not on_host else free.host
    if (vectors + 1) * bytes_of[half] > left:
        msg = f"out of memory: the smallest Lanczos basis of {size:,} parameters, {least} vectors, takes "
        msg += f"{least * bytes_of[half] / 2**30:.1f} GiB, and {left / 2**30:.1f} GiB are free: choose `params`"
        raise MeasurementError(msg)
    return _said(vectors, half, on_host, bytes_of[half], most)


def _said(vectors: int, half: bool, on_host: bool, each: int, most: int) -> Storage:
    """With what it is, and what that means for the numbers."""
    where = " in half precision" * half + " in the host's memory" * on_host
    text = f"the Lanczos basis holds {vectors} vectors at a time{where}, {vectors * each / 2**30:.2g} GiB"
    text += ", and is restarted beyond" if vectors < most else ""
    return Storage(vectors, half, on_host, text + "; its rounding is in the intervals" * half)


def block(size: int, itemsize: int, most: int, free: Free, *, kept: bool) -> int:
    """Vectors that travel together: as many as asked for, or as fit in a share of what is free.

    Args:
        size: P.
        itemsize: bytes of a number.
        most: as asked.
        free: bytes.
        kept: whether the graphs of all batches are kept.
    """
    share = OWN_SHARE / 2 if free.host is not None else KEPT_BLOCK_SHARE if kept else BLOCK_SHARE
    each = size * itemsize * PER_VECTOR // 4
    return max(1, min(most, int(share * free.own) // max(each, 1)))
