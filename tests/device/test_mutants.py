"""Promise: these tests would notice a tensor that is left on the other device, and a wait that comes back.

Each mutant takes one ``.to(device)`` or ``device=`` out of a function, or puts back what waited, and runs a call
that must then fail, give other numbers than on the CPU, or exceed its budget. Left out are those that change
nothing: `rows` takes vectors of either device, an assignment into a tensor copies, indices may lie on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import hessdiag
from hessdiag.analysis.measurement import Measurement
from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.operator import Scaled
from hessdiag.settings import Settings
from hessdiag.spectral.basis import Storage
from hessdiag.spectral.deflation import forms
from tests import models
from tests.device import test_waits as budget
from tests.device.cases import THERE, examined, numbers, regularized
from tests.device.changed import changed
from tests.device.test_numbers import Drawing


def operator(device: str, make: Callable[[], Any] = models.mlp, **options: Any) -> Any:
    asked = {"method": "retained_graph", "batch_size": 7, "block": 3, "second_opinion": False, **options}
    return Measurement(make(), Settings(device=device, **asked)).operator


@cache
def ready(device: str) -> Any:
    return operator(device)


def product(device: str) -> Any:
    op = ready(device)
    with op.recorded() as record:
        image = op @ models.randn(op.size, seed=4)
    return [
        image.cpu(),
        record.batches,
        op.gradient().cpu(),
        (Scaled(op, torch.arange(op.size) + 1.0) @ image).cpu(),
    ]


def built(device: str) -> Any:
    return (operator(device) @ models.randn(ready(device).size)).cpu()


def run(device: str) -> Any:
    op = ready(device)
    krylov = hessdiag.lanczos(op, steps=20, max_basis=8)
    return [krylov.T.tolist(), krylov.ritz_vectors([0, 1]).cpu(), krylov.orthogonality < 1e-10]


def held(device: str) -> Any:
    """Rows in half precision on the device, and as they are in the host's memory."""
    kinds = (Storage(half=True), Storage(on_host=True))
    runs = [hessdiag.lanczos(ready(device), steps=14, max_basis=8, storage=kind) for kind in kinds]
    return [[one.T.tolist(), one.ritz_vectors([0, 1]).cpu()] for one in runs]


def density(device: str) -> Any:
    op = ready(device)
    return numbers(hessdiag.spectrum(op, probes=4, steps=4, krylov=hessdiag.lanczos(op, steps=6)))


def probes(device: str) -> Any:
    op = ready(device)
    krylov = hessdiag.lanczos(op, steps=6)
    return [forms(op, krylov, 4, 0).trace.tolist(), forms(op, None, op.size, 0).trace.tolist()]


def pairs(device: str) -> Any:
    return [pair.value for pair in hessdiag.eigenpairs(ready(device), 3, max_products=40).pairs]


def diagonal(device: str) -> Any:
    found = hessdiag.diagonal(ready(device), probes=4)
    return [found.value.cpu(), found.stderr.cpu()]


def exact_trace(device: str) -> Any:
    return numbers(gauss_newton_trace(ready(device)))


def drawn_trace(device: str) -> Any:
    return numbers(gauss_newton_trace(operator(device, models.attention, batch_size=4)))


def landscape(device: str) -> Any:
    around = Landscape(ready(device))
    shifts = 0.1 * models.randn(len(around.batches), around.operator.size)
    each = around.losses_and_gradients(shifts)
    slope = around.loss_and_gradient()
    return [around.draws(shifts).losses, *(one.cpu() for one in each), slope.loss, slope.gradient.cpu()]


def searches(device: str) -> Any:
    return examined(models.mlp(), device, "worst_sharpness_adaptive,average_sharpness_adaptive")


def radius(device: str) -> Any:
    return examined(models.mlp(), device, "pac_bayes_magnitude_sharpness")


def beginnings(device: str) -> Any:
    return examined(models.mlp(), device, "distance_from_start,relative_flatness")


def step(name: str) -> Callable[[str], Any]:
    def two_steps(device: str) -> Any:
        return regularized(name, device)

    two_steps.__name__ = name
    return two_steps


def drawn_data(device: str) -> Any:
    return len({hessdiag.draw(Drawing(device)).digest for _ in range(2)})


def stream_afterwards(device: str) -> Any:
    function, module = ready(device).function, torch if device == "cpu" else torch.get_device_module(device)
    before = module.get_rng_state()
    with function.measuring():
        torch.rand(3, device=device)
    return torch.equal(module.get_rng_state(), before)


ENGINE, SPECTRAL, GAP = "hessdiag.engine", "hessdiag.spectral", "hessdiag.gap"
MEASURES, PARTS = f"{GAP}.measures", "hessdiag.regularizers"

MUTANTS: dict[str, tuple[str, str, str, Callable[[str], Any]]] = {
    "a stream of data": (
        "hessdiag.samples.randomness:_of_accelerators",
        "for n in range(torch.accelerator.device_count())",
        "for n in range(0)",
        drawn_data,
    ),
    "a stream that a measurement moves": (
        f"{ENGINE}.products.restoring:random_states",
        "in drawing(devices)",
        "in ()",
        stream_afterwards,
    ),
    "given vectors": (
        "hessdiag.operator.symmetric:SymmetricOperator.multiplied",
        "device=self.device, ",
        "",
        product,
    ),
    "a scale": (
        "hessdiag.operator.scaled:Scaled.__init__",
        "diagonal.to(device=base.device, ",
        "diagonal.to(",
        product,
    ),
    "the sum over batches": (
        f"{ENGINE}.products.curvature:Curvature._sums",
        "rows.shape, dtype=wide, device=self.device",
        "rows.shape, dtype=wide",
        product,
    ),
    "the gradient": (
        f"{ENGINE}.products.curvature:Curvature._sum_of_gradients",
        ", device=self.device",
        "",
        product,
    ),
    "data and weights": (
        f"{ENGINE}.products.functional:Functional._place",
        "placed.to(self.device, ",
        "placed.to(",
        built,
    ),
    "trial vectors": (
        f"{ENGINE}.checks.planner:trial_vectors",
        ".to(operator.device, operator.dtype)",
        ".to(operator.dtype)",
        built,
    ),
    "the basis": (f"{SPECTRAL}.basis:Storage.rows", "dtype=dtype, device=device", "dtype=dtype", run),
    "rows on the host": (f"{SPECTRAL}.basis:Rows.parts", ".to(self.device, non_blocking=True)", "", held),
    "the rotation": (f"{SPECTRAL}.lanczos:Lanczos._rotate", ".to(self.op.device)", "", run),
    "weights of Ritz vectors": (f"{SPECTRAL}.krylov:Krylov.ritz_vectors", ".to(self.basis.device)", "", run),
    "the identity of a check": (f"{SPECTRAL}.krylov:Krylov.orthogonality", ", device=products.device", "", run),
    "bases side by side": (f"{SPECTRAL}.lockstep:_lanczos_block", ", device=op.device", "", density),
    "a start on the sphere": (f"{SPECTRAL}.probes:sphere", "device=op.device, ", "", density),
    "signs": (f"{SPECTRAL}.probes:rademacher", ".to(op.device)", "", probes),
    "every direction": (f"{SPECTRAL}.deflation:_complement", ", device=op.device", "", probes),
    "the turn of a subspace": (f"{SPECTRAL}.subspace:Subspace.add", ".to(vectors.device)", "", pairs),
    "the sum of a diagonal": (f"{SPECTRAL}.diagonal:Samples.of", ", device=op.device", "", diagonal),
    "units of the outputs": (
        f"{ENGINE}.squares.loss_roots:root",
        "dtype=outputs.dtype, device=outputs.device",
        "dtype=outputs.dtype",
        exact_trace,
    ),
    "signs on the host": (
        f"{ENGINE}.squares.gauss_newton:_exact",
        "signs.cpu()",
        "signs.to(pulled.function.device)",
        exact_trace,
    ),
    "squares": (f"{ENGINE}.squares.pullbacks:Pullbacks.squares", "found.cpu()", "found", exact_trace),
    "signs at the outputs": (f"{ENGINE}.squares.loss_roots:signs_of", ".to(outputs.device)", "", drawn_trace),
    "no shift": (f"{ENGINE}.landscape.landscape:Landscape._row", ", device=self.function.device", "", landscape),
    "a shift": (
        f"{ENGINE}.landscape.landscape:Landscape._row",
        "shift.to(self.function.device, ",
        "shift.to(",
        landscape,
    ),
    "divisors": (f"{ENGINE}.landscape.landscape:Landscape.__init__", ".to(operator.device)", "", landscape),
    "losses at many points": (
        f"{ENGINE}.landscape.landscape:Landscape.draws",
        ", device=rows.device",
        "",
        landscape,
    ),
    "the gradient at a shift": (
        f"{ENGINE}.landscape.passes:Passes.loss_and_gradient",
        ", device=shift.device",
        "",
        landscape,
    ),
    "the start of an ascent": (
        f"{MEASURES}.ascent:auto_pgd",
        "size, dtype=torch.float64, device=device",
        "size, dtype=torch.float64",
        searches,
    ),
    "steps of an ascent": (
        f"{MEASURES}.ascent:auto_pgd",
        "2 * radius, dtype=torch.float64, device=device",
        "2 * radius, dtype=torch.float64",
        searches,
    ),
    "groups of pieces": (
        f"{MEASURES}.adversaries:worst_rise",
        "(by_group.of[within] - some.start).to(op.device)",
        "by_group.of[within] - some.start",
        searches,
    ),
    "their shares": (
        f"{MEASURES}.adversaries:worst_rise",
        "shares[within].to(op.device)",
        "shares[within]",
        searches,
    ),
    "directions": (f"{MEASURES}.perturbations:directions", ".to(op.device, op.dtype)", ".to(op.dtype)", searches),
    "weights before training": (
        f"{GAP}.checkpoint:Checkpoint.start",
        "theta.device, theta.dtype",
        "theta.dtype",
        beginnings,
    ),
    "weights of layers": (
        f"{GAP}.checkpoint:Checkpoint._layer",
        "self.operator.device, self.operator.dtype",
        "self.operator.dtype",
        beginnings,
    ),
    "fractions of a shift": (f"{MEASURES}.tolerated:shortest", ".to(shift)", ".to(shift.dtype)", radius),
    "signs of a penalty": (
        f"{PARTS}.curvature_penalty:CurvaturePenalty.signs",
        "p.device, p.dtype",
        "p.dtype",
        step("TracePenalty"),
    ),
    "noise of labels": (
        f"{PARTS}.label_noise:LabelNoise.targets",
        "torch.Generator(y.device)",
        "torch.Generator()",
        step("LabelNoise"),
    ),
    "noise of weights": (f"{PARTS}.nso:NSO.perturbation", "Generator(device)", "Generator()", step("NSO")),
    "masks of dropout": (
        f"{ENGINE}.products.restoring:Randomness.replay",
        'offered(device, "set_rng_state")(state, device)',
        "pass",
        step("SAM"),
    ),
}


@cache
def expected(probe: Callable[[str], Any]) -> Any:
    return numbers(probe("cpu"))


def differs(probe: Callable[[str], Any]) -> bool:
    """Whether a call on the device fails, or gives other numbers than on the CPU."""
    truth = expected(probe)
    try:
        return numbers(probe(THERE)) != truth
    except (RuntimeError, TypeError, hessdiag.HessdiagError):
        return True


@pytest.mark.parametrize(
    "probe", dict.fromkeys(mutant[3] for mutant in MUTANTS.values()), ids=lambda f: f.__name__
)
def test_nothing_differs(probe):
    assert not differs(probe)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_tensor_on_the_other_device_is_noticed(name):
    where, old, new, probe = MUTANTS[name]
    with changed(where, old, new):
        assert differs(probe)


TWO_COPIES = "torch.stack([column.reshape(-1).double() for column in columns]).cpu().numpy()"
WAITING: dict[str, tuple[str, str, str, Callable[..., None]]] = {
    "numbers read one by one": (
        f"{SPECTRAL}.inner:read",
        TWO_COPIES,
        "np.stack([one.reshape(-1).double().cpu().numpy() for one in columns])",
        budget.test_a_lanczos_step_waits_once,
    ),
    "a look at every product": (
        "hessdiag.operator.symmetric:SymmetricOperator.multiplied",
        "return result, result.sum()",
        "return result, torch.tensor(float(result.sum()))",
        budget.test_a_product_waits_for_nothing,
    ),
    "places as a list": (
        f"{ENGINE}.products.curvature:consecutive",
        "slice(first, end)",
        "list(indices)",
        budget.test_a_product_waits_for_nothing,
    ),
    "forms fetched at once": (
        f"{ENGINE}.products.records:Record.note",
        "= weights, total",
        "= weights, total; self._fetch()",
        budget.test_a_product_waits_for_nothing,
    ),
    "a second pass that is asked for": (
        f"{SPECTRAL}.inner:project_out",
        'much.device.type != "cpu"',
        "False",
        budget.test_probes_wait_for_their_own_copies,
    ),
    "signs of eight bytes": (
        f"{SPECTRAL}.probes:rademacher",
        ".to(op.device).to(op.dtype)",
        ".to(op.device, op.dtype)",
        budget.test_probes_wait_for_their_own_copies,
    ),
    "starts by their numbers": (
        f"{SPECTRAL}.lockstep:_lanczos_block",
        "follow.copy_(work)",
        "follow[torch.from_numpy(alive)] = work",
        budget.whole_basis,
    ),
    "a second pass of three terms": (
        f"{SPECTRAL}.inner:continue_basis",
        'work.device.type != "cpu"',
        "False",
        budget.three_terms,
    ),
    "counts of examples": (
        f"{ENGINE}.squares.gauss_newton:gauss_newton_trace",
        "operator.samples.batches",
        "operator.batches",
        budget.test_the_trace_waits_for_no_example,
    ),
    "losses one by one": (
        f"{ENGINE}.landscape.passes:Passes.loss_and_gradient",
        "hit.double()])",
        "hit.double()]).cpu()",
        budget.test_losses_and_gradients_of_a_search_stay_on_the_device,
    ),
    "places of losses": (
        f"{ENGINE}.landscape.landscape:Landscape.losses_and_gradients",
        "consecutive(",
        "list(",
        budget.test_losses_and_gradients_of_a_search_stay_on_the_device,
    ),
    "points by way of the host": (
        f"{MEASURES}.ascent:inside",
        "return points.clamp(-radius, radius)",
        "return points.cpu().clamp(-radius, radius).to(points.device)",
        budget.test_no_vector_travels_to_the_host_and_back_in_a_gap_report,
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_that_comes_back_is_noticed(name):
    where, old, new, test = WAITING[name]
    given = (budget.operator("stacked_graph"),) if test.__code__.co_argcount else ()
    with changed(where, old, new), pytest.raises(AssertionError):
        test(*given)
