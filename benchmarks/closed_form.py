"""Time and memory of the closed-form bound of a three-layer network: both orders, with and without gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tables import Row
from benchmarks.timing import GIVING_BACK, STATUS, gradient_seconds, median_seconds, one_thread, peak_mib
from hessdiag.closed_form import ThreeLayer, Traces, activation, plan, three_layer
from hessdiag.problem import Problem
from hessdiag.regularizers import HSR

FEATURES, UNITS, CLASSES = 64, 64, 10
SAMPLES = (
    250,
    1000,
    4000,
)  # the middle one is what is asked of a release, the others lie beyond both sides' crossover
REPEATED = 2000  # beyond, a call takes many seconds: once is enough
QUICK = (100,)
Order = Literal["pairwise", "linear"]
HSRTraces = Literal["closed_form", "probes", "auto"]
ORDERS: tuple[Order, ...] = ("pairwise", "linear")


def subject(samples: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A tanh network and normal data, float32."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, UNITS), nn.Tanh(), nn.Linear(UNITS, CLASSES))
    x = torch.randn(samples, FEATURES, generator=generator)
    return model, x, torch.randint(0, CLASSES, (samples,), generator=generator)


def network(model: nn.Sequential) -> ThreeLayer:
    """The same for the closed form."""
    one, two, three, four = (p.detach().double() for p in model.parameters())
    return ThreeLayer(one, two, three, four, activation("tanh"))


def run(data: str | None = None, quick: bool = False) -> list[Row]:  # noqa: ARG001  (as every benchmark has it)
    """Per order, with and without gradient: CPU time in seconds and gradients, peak memory; and the choice."""
    one_thread()
    return [row for samples in (QUICK if quick else SAMPLES) for row in _of(samples, quick)]


def _of(samples: int, quick: bool) -> list[Row]:
    model, x, y = subject(samples)
    unit = gradient_seconds(Problem(model, {"train": (x, y)}, criterion="cross_entropy"), [(x, y)])
    net, repeats, peaks = network(model), 1 if quick or samples > REPEATED else 3, {} if quick else _peaks(samples)
    name = f"N={samples}, d={FEATURES}, m={UNITS}, C={CLASSES}"
    rows = []
    for gradient in (False, True):
        quantity = "bound and gradient" if gradient else "bound"
        ahead = plan(net, samples, gradient=gradient)
        taken = {order: _seconds(net, x, y, order, gradient, repeats) for order in ORDERS}
        for order, seconds in taken.items():
            cost = ahead.pairwise if order == "pairwise" else ahead.linear
            note = f"predicted {cost.seconds:.2g} s, {cost.memory / 2**20:.0f} MiB"
            peak = peaks.get(_key(order, gradient))
            rows += [
                Row(name, order, f"{quantity} [s]", seconds, None, note),
                Row(name, order, f"{quantity} [gradients]", seconds / unit, None, f"gradient {unit:.3g} s"),
                Row(
                    name,
                    order,
                    f"{quantity} [MiB]",
                    peak,
                    None,
                    "peak above the data's own" if peaks else "not measured",
                ),
            ]
        right = "the faster" if taken[ahead.order] == min(taken.values()) else "NOT the faster"
        note = f"{right}: one takes {max(taken.values()) / min(taken.values()):.2g} times the other"
        rows.append(Row(name, f"auto: {ahead.order}", f"{quantity} [s]", taken[ahead.order], None, note))
    return rows + _steps(name, model, x, y, unit, repeats)


def _seconds(net: ThreeLayer, x: Tensor, y: Tensor, order: Order, gradient: bool, repeats: int) -> float:
    def call() -> Traces:
        return three_layer(net, [(x, y)], order=order, gradient=gradient)

    if repeats > 1:
        call()
    return median_seconds(call, repeats)


def _steps(name: str, model: nn.Sequential, x: Tensor, y: Tensor, unit: float, repeats: int) -> list[Row]:
    """A step of HSR by each of its ways, and the one it takes by itself."""
    rows = []
    ways: tuple[HSRTraces, ...] = ("closed_form", "probes", "auto")
    for traces in ways:
        own = HSR(torch.optim.SGD(model.parameters(), lr=0.0), model, 0.01, traces=traces)

        def step(own: HSR = own) -> Tensor:
            return own.step(lambda: F.cross_entropy(model(x), y))

        step()
        note = own.reason or "closed form"
        rows.append(
            Row(name, f"HSR {traces}", "step [gradients]", median_seconds(step, repeats) / unit, None, note)
        )
    return rows


def _peaks(samples: int) -> dict[str, float]:
    """MiB above the data's own at the peak of every call, in a process whose freed memory goes back at once."""
    command = [sys.executable, "-m", "benchmarks.closed_form", str(samples)]
    freeing = {**os.environ, **GIVING_BACK}
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600, env=freeing)
    found: dict[str, float] = json.loads(told.stdout)
    return found


def _measured_peaks(samples: int) -> dict[str, float]:
    """By Linux's own account; nothing elsewhere."""
    if not STATUS.exists():
        return {}
    one_thread()
    model, x, y = subject(samples)
    net, found = network(model), {}
    three_layer(net, [(x[:8], y[:8])], gradient=True)  # what torch loads at its first use
    for order in ORDERS:
        for gradient in (False, True):
            call = partial(three_layer, net, [(x, y)], order=order, gradient=gradient)
            found[_key(order, gradient)] = peak_mib(call)[0]
    return found


def _key(order: str, gradient: bool) -> str:
    return f"{order} with gradient" if gradient else order


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measured_peaks(int(sys.argv[1]))))
