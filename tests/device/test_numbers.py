"""Promise: on a device with a memory of its own the numbers are those of the CPU, bit for bit.

Its kernels are the CPU's, so that whatever differs is hessdiag's doing: a tensor on the other device, a stream of
random numbers, an order of additions.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import Problem
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.resume import pace
from tests import models
from tests.command import call
from tests.device.cases import REGULARIZERS, THERE, analysis, examined, moved, narrowed, numbers, regularized

METHODS = ("retained_graph", "stacked_graph", "finite_difference")
BLOCKS = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)))


def blocks() -> Problem:
    torch.manual_seed(11)
    model = nn.Sequential(BLOCKS, nn.Linear(5, 3)).double()
    return Problem(model, {"train": (models.randn(20, 5), models.labels(20, 3))}, criterion="cross_entropy")


def loss_only() -> Problem:
    problem = models.mlp()
    data = problem.data
    return Problem(problem.bare_model(), data, loss=lambda model, batch: model(batch[0]).square().mean())


def with_adam() -> Problem:
    problem = models.mlp()
    optimizer = torch.optim.Adam(problem.bare_model().parameters())
    x, y = problem.data["train"]
    nn.functional.cross_entropy(problem.bare_model()(x), y).backward()
    optimizer.step()
    return Problem(problem.bare_model(), problem.data, criterion="cross_entropy", optimizer=optimizer)


CASES = {
    **{f"an MLP, {method}": (models.mlp, {"method": method}) for method in METHODS},
    "a CNN with BatchNorm in float32": (lambda: narrowed(models.cnn()), {"method": "retained_graph"}),
    "an attention block": (models.attention, {"method": "retained_graph", "batch_size": 4}),
    "a Gauss-Newton matrix": (models.regression, {"method": "forward_over_reverse", "operator": "ggn"}),
    "a regression in float32": (lambda: narrowed(models.regression()), {"method": "double_backward"}),
    "float32 weights in float64": (
        lambda: narrowed(models.mlp()),
        {"dtype": "float64", "method": "double_backward"},
    ),
    "blocks streamed": (blocks, {"method": "layer_streamed"}),
    "Adam's coordinates": (with_adam, {"method": "retained_graph", "quantities": "preconditioned_lambda_max"}),
    "a loss alone": (loss_only, {"method": "retained_graph", "second_opinion": True}),
    "some parameters": (
        models.mlp,
        {"params": ["0.*"], "method": "retained_graph", "top": 2},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_analysis_is_that_of_the_cpu(case):
    make, options = CASES[case]
    assert analysis(make(), THERE, **options) == analysis(make(), "cpu", **options)


@pytest.mark.parametrize("case", ["an MLP, retained_graph", "Adam's coordinates", "a regression in float32"])
def test_a_killed_analysis_goes_on_there(case, tmp_path, monkeypatch):
    make, options = CASES[case]
    monkeypatch.setattr(pace, "FIRST", 0.0)
    monkeypatch.setattr(pace, "SHARE", 1e9)
    multiply, formed = Curvature.multiply, []

    def killed(self, rows):
        formed.append(len(rows))
        if sum(formed) > 6:
            raise KeyboardInterrupt
        return multiply(self, rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Curvature, "multiply", killed)
        analysis(make(), THERE, resume=tmp_path, **options)
    assert list(tmp_path.glob("*/found.jsonl"))
    assert analysis(make(), THERE, resume=tmp_path, **options) == analysis(make(), THERE, **options)


def test_a_model_is_measured_where_it_is():
    found = analysis(moved(models.mlp(), THERE), None, method="retained_graph")
    assert found == analysis(models.mlp(), None, method="retained_graph")
    assert found == analysis(moved(models.mlp(), THERE), "cpu", method="retained_graph")


def test_one_call_finds_a_method():
    """With the clock choosing between methods nothing else changes: equal to their own agreement."""
    (here, there) = (
        hessdiag.analyze(models.mlp(), device=device)["lambda_max"].value for device in ("cpu", THERE)
    )
    assert there == pytest.approx(here, rel=1e-9)


def test_a_checkpoint_of_a_gap_report_is_that_of_the_cpu():
    assert examined(models.cnn(), THERE) == examined(models.cnn(), "cpu")


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_regularizer_steps_as_on_the_cpu(name):
    assert all(map(torch.equal, regularized(name, THERE), regularized(name, "cpu")))


def test_operators_and_lanczos_take_vectors_of_either_device():
    here, there = (hessdiag.hessian(models.mlp(), device=device) for device in ("cpu", THERE))
    v = models.randn(here.size, seed=4)
    assert torch.equal((there @ v).cpu(), here @ v)
    assert torch.equal((there @ v.to(THERE)).cpu(), here @ v)
    assert (there @ v.numpy() == here @ v.numpy()).all()
    runs = [hessdiag.lanczos(op, steps=30, start=v, max_basis=8) for op in (here, there)]
    assert (runs[0].T == runs[1].T).all()
    assert (there.to_scipy() @ v.numpy() == here.to_scipy() @ v.numpy()).all()
    assert numbers(hessdiag.spectrum(there, probes=3, steps=4)) == numbers(
        hessdiag.spectrum(here, probes=3, steps=4)
    )


def test_random_streams_are_left_as_found():
    class Noisy(nn.Linear):
        def forward(self, x):
            torch.rand(2, device=x.device)
            return super().forward(x)

    problem = Problem(Noisy(5, 3).double(), models.mlp().data, criterion="cross_entropy")
    function = Functional(problem, device=THERE)
    batch, before = function.place(problem.data["train"]), torch.pretend.get_rng_state()
    with function.measuring():
        function.total(function.theta, batch)
        assert not torch.equal(torch.pretend.get_rng_state(), before)
    assert torch.equal(torch.pretend.get_rng_state(), before)


class Drawing(torch.utils.data.Dataset):
    """Examples whose augmentation draws on the device."""

    def __init__(self, device=THERE):
        self.device = device

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(5, device=self.device).cpu(), index % 3


def test_data_that_draw_on_the_device_are_seeded_and_leave_its_stream():
    before = torch.pretend.get_rng_state()
    found = [hessdiag.draw(Drawing()).digest for _ in range(2)]
    assert torch.equal(torch.pretend.get_rng_state(), before)
    torch.rand(3, device=THERE)
    assert {*found, hessdiag.draw(Drawing()).digest} == {found[0]}


FILE = """
import torch
from torch import nn
from hessdiag import Problem

def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = (torch.randn(40, 5).double(), torch.randint(3, (40,)))
    return Problem(model, {"train": data}, criterion="cross_entropy")
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prob.py").write_text(FILE)
    torch.manual_seed(1)
    for name, scale in (("a", 1.0), ("b", 1.5)):
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        torch.save({key: scale * value for key, value in model.state_dict().items()}, f"{name}.pt")
    return tmp_path


def test_compare_says_on_a_device_what_it_says_on_the_cpu(repository):
    few = ("--problem", "prob.py:problem", "--quantities", "lambda_max,trace", "--method", "retained_graph", "-q")
    found = [call("compare", "a.pt", "b.pt", *few, "--device", device) for device in ("cpu", THERE)]
    assert found[0] == found[1]
    assert found[0][0] == 0
    assert "lambda_max" in found[0][1]


def test_init_writes_its_device_and_check_measures_there(repository):
    code, out, err = call("init", "prob.py:problem", "-c", "a.pt", "--device", THERE, "-q")
    assert code == 0, err
    assert f'device = "{THERE}"' in (repository / "hessdiag.toml").read_text()
    code, out, err = call("check")
    assert code == 0, out + err
    assert "device" not in out + err  # no warning: it is measured where the baseline was
