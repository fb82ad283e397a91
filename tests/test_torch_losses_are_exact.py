"""Promise: torch's losses given to a problem are measured as torch computes them over the whole data.

The truth is the dense Hessian, by torch.autograd.functional, of the user's own loss on all examples at once.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag import Problem
from hessdiag.criteria import recognized
from hessdiag.engine.landscape.scores import normalized
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.engine.squares.loss_roots import root, signed_root, signs_of
from tests import models

N, CLASSES = 21, 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
LABELS = models.labels(N, CLASSES)
SOME = LABELS.clone()
SOME[::3] = 2
HOLES = LABELS.clone()
HOLES[[1, 5, 6, 18]] = -100
MARKED = LABELS.clone()
MARKED[[0, 7]] = 9
SOFT = models.randn(N, CLASSES, seed=8).softmax(1)
REAL = models.randn(N, CLASSES, seed=9)
BITS = (models.randn(N, CLASSES, seed=10) > 0).double()
PIXELS = torch.stack([models.labels(9, CLASSES, seed=s).view(3, 3) for s in range(N)])


def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double(), models.randn(N, 3)


def piecewise():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, CLASSES)).double(), models.randn(N, 3)


def log_probabilities():
    model, x = flat()
    return nn.Sequential(*model, nn.LogSoftmax(1)), x


def segmentation():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, CLASSES, 1)).double()
    return model, models.randn(N, 2, 3, 3)


LOSSES = {
    "cross-entropy": (flat, nn.CrossEntropyLoss(), LABELS),
    "class weights": (flat, nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "label smoothing": (flat, nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "all of it": (flat, nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), HOLES),
    "all of it, summed": (
        flat,
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2, ignore_index=9, reduction="sum"),
        MARKED,
    ),
    "ignored": (flat, nn.CrossEntropyLoss(), HOLES),
    "another index is ignored": (flat, nn.CrossEntropyLoss(ignore_index=9), MARKED),
    "soft targets": (flat, nn.CrossEntropyLoss(), SOFT),
    "soft targets and class weights": (flat, nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), SOFT),
    "summed": (flat, nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "segmentation": (segmentation, nn.CrossEntropyLoss(weight=WEIGHTS), PIXELS),
    "bytes": (segmentation, nn.CrossEntropyLoss(ignore_index=1), PIXELS.to(torch.uint8)),
    "F.cross_entropy": (flat, F.cross_entropy, LABELS),
    "partial": (flat, partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.1), LABELS),
    "partial of a partial": (
        flat,
        partial(partial(F.cross_entropy, reduction="sum"), label_smoothing=0.1),
        LABELS,
    ),
    "nll": (log_probabilities, nn.NLLLoss(), LABELS),
    "nll with weights": (log_probabilities, nn.NLLLoss(weight=WEIGHTS, ignore_index=2), SOME),
    "F.nll_loss": (log_probabilities, partial(F.nll_loss, reduction="sum"), HOLES),
    "mse": (flat, nn.MSELoss(), REAL),
    "mse, summed": (flat, nn.MSELoss(reduction="sum"), REAL),
    "F.mse_loss": (flat, F.mse_loss, REAL),
    "binary": (flat, nn.BCEWithLogitsLoss(), BITS),
    "binary with weights": (flat, nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=WEIGHTS.flip(0)), BITS),
    "binary, summed": (flat, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0), reduction="sum"), BITS),
    "F.binary_cross_entropy_with_logits": (flat, F.binary_cross_entropy_with_logits, BITS),
    "huber": (flat, nn.HuberLoss(delta=0.7), REAL),
    "smooth l1": (flat, nn.SmoothL1Loss(beta=0.7), REAL),
    "F.smooth_l1_loss": (flat, partial(F.smooth_l1_loss, beta=0.4, reduction="sum"), REAL),
    "l1": (flat, nn.L1Loss(), REAL),
}


def torch_loss(loss_fn, outputs, targets):
    return loss_fn(outputs, targets.long() if not targets.is_floating_point() else targets)


def dense(model, x, loss):
    """The Hessian of a loss of the model's outputs by its parameters, in their order."""
    names, tensors = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)
    sizes = [t.numel() for t in tensors]

    def of(flat):
        pieces = [piece.view_as(t) for piece, t in zip(torch.split(flat, sizes), tensors, strict=True)]
        return loss(torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (x,)))

    return torch.autograd.functional.hessian(of, torch.cat([t.reshape(-1) for t in tensors]))


def gauss_newton(model, x, loss):
    """Jᵀ (d²loss/doutputs²) J, dense."""
    names, tensors = zip(*((name, p.detach()) for name, p in model.named_parameters()), strict=True)

    def outputs(*pieces):
        return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (x,))

    here = outputs(*tensors)
    J = torch.cat([j.reshape(here.numel(), -1) for j in torch.autograd.functional.jacobian(outputs, tensors)], 1)
    S = torch.autograd.functional.hessian(lambda flat: loss(flat.view_as(here)), here.reshape(-1))
    return J.T @ S @ J


def case(name, batch_size=4):
    make, loss_fn, targets = LOSSES[name]
    model, x = make()
    problem = Problem.of(model, loss_fn, (x, targets))
    return model, x, lambda out: torch_loss(loss_fn, out, targets), problem, models.sample(problem, batch_size)


@pytest.mark.parametrize("name", LOSSES)
def test_products_are_those_of_the_loss_over_all_data(name):
    model, x, loss, problem, samples = case(name)
    H, truth = Curvature(problem, samples).dense(), dense(model, x, loss)
    assert torch.allclose(H, truth, rtol=1e-9, atol=1e-10 * float(truth.abs().max()))
    assert Curvature(problem, samples).loss() == pytest.approx(float(loss(model(x).detach())), rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gauss_newton_matrix_has_the_closed_form(name):
    """Of log-probabilities G is that of the logits: the last layer belongs to the loss."""
    model, x, loss, problem, samples = case(name)
    if recognized(problem.criterion).name == "nll":
        logits, loss_fn = model[:-1], problem.criterion
        options = loss_fn.keywords if isinstance(loss_fn, partial) else {}
        weight, ignored = getattr(loss_fn, "weight", None), getattr(loss_fn, "ignore_index", -100)
        targets = problem.data["train"][1]
        truth = gauss_newton(
            logits, x, lambda z: F.cross_entropy(z, targets, weight=weight, ignore_index=ignored, **options)
        )
    else:
        truth = gauss_newton(model, x, loss)
    G = Curvature(problem, samples, kind="ggn")
    scale = float(truth.abs().max()) or 1.0
    assert torch.allclose(G.dense(), truth, rtol=1e-9, atol=1e-10 * scale)
    if name not in ("segmentation", "bytes"):
        trace = gauss_newton_trace(G)
        assert trace.exact
        assert float(trace.draws[0]) == pytest.approx(float(truth.trace()), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_roots_multiply_to_the_second_derivative_by_the_outputs(name):
    model, _, _, problem, samples = case(name, batch_size=3)
    problem, batch = problem.on(samples.batches), samples.batches[0]
    outputs = model(batch[0]).detach()
    A = root(problem, outputs, batch).flatten(2)
    summed = lambda flat: problem.loss_sum(flat.view_as(outputs), batch)  # noqa: E731
    S = torch.autograd.functional.hessian(summed, outputs.reshape(-1))
    blocks = S.view(3, A.shape[2], 3, A.shape[2])
    for n in range(3):
        assert torch.allclose(A[n].T @ A[n], blocks[n, :, n], atol=1e-12)
    signs = signs_of(problem, outputs, batch, [torch.Generator().manual_seed(k) for k in range(1000)])
    draws = [signed_root(problem, outputs, batch, one) for one in signs]
    z = torch.stack(draws).flatten(2)[:, 0]
    assert torch.allclose(z.T @ z / len(z), blocks[0, :, 0], atol=0.15 * float(blocks.abs().max()) + 1e-12)


@pytest.mark.parametrize(
    "name", ["all of it, summed", "binary with weights", "nll with weights", "huber", "segmentation"]
)
def test_an_analysis_agrees_with_the_dense_matrix(name):
    model, x, loss, problem, _ = case(name)
    truth = torch.linalg.eigvalsh(dense(model, x, loss))
    found = hessdiag.analyze(problem, quantities=("lambda_max", "lambda_min", "trace"), batch_size=3)
    assert found.metrics["lambda_max"].lo - 1e-9 <= float(truth[-1]) <= found.metrics["lambda_max"].hi + 1e-9
    assert found.metrics["lambda_min"].lo - 1e-9 <= float(truth[0]) <= found.metrics["lambda_min"].hi + 1e-9
    assert found.metrics["trace"].lo - 1e-9 <= float(truth.sum()) <= found.metrics["trace"].hi + 1e-9
    assert found.second_opinion.loss_off < 1e-12
    assert found.second_opinion.gradient_off < 1e-9


@pytest.mark.parametrize("name", ["class weights", "summed", "binary", "mse, summed"])
def test_the_trace_is_exact_where_the_model_is_piecewise_linear(name):
    _, loss_fn, targets = LOSSES[name]
    model, x = piecewise()
    truth = float(dense(model, x, lambda out: torch_loss(loss_fn, out, targets)).trace())
    trace = hessdiag.analyze(Problem.of(model, loss_fn, (x, targets)), "trace", batch_size=3).metrics["trace"]
    assert trace.kind == "exact"
    assert trace.value == pytest.approx(truth, rel=1e-9)
    assert trace.data.lo < trace.value < trace.data.hi


def test_an_error_over_data_of_a_sum_is_that_of_the_mean_times_the_number():
    model, x = piecewise()
    mean, summed = (
        hessdiag.analyze(Problem.of(model, nn.MSELoss(reduction=how), (x, REAL)), "trace", batch_size=3)
        for how in ("mean", "sum")
    )
    mean, summed = mean.metrics["trace"], summed.metrics["trace"]
    assert summed.data.stderr == pytest.approx(REAL.numel() * mean.data.stderr, rel=1e-9)


def test_any_division_into_batches_gives_the_same(name="all of it"):
    _, _, _, problem, _ = case(name)
    whole, *parts = (Curvature(problem, models.sample(problem, size)).dense() for size in (21, 1, 2, 8))
    for part in parts:
        assert torch.allclose(part, whole, rtol=1e-10, atol=1e-13)


def test_fingerprints_tell_losses_apart():
    labels = [
        recognized(loss).label
        for loss in (
            nn.CrossEntropyLoss(),
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(weight=WEIGHTS),
            nn.CrossEntropyLoss(weight=WEIGHTS + 1e-9),
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.HuberLoss(delta=2.0),
            nn.HuberLoss(),
        )
    ]
    assert len(set(labels)) == len(labels)
    assert recognized(nn.CrossEntropyLoss()).label == recognized("cross_entropy").label == "cross_entropy/mean"


class Halved(nn.CrossEntropyLoss):
    """A subclass is a loss of its own."""

    def forward(self, input, target):
        return super().forward(input, target) / 2


def test_a_subclass_of_a_torch_loss_is_called_and_not_read():
    model, x = flat()
    half, one = (Problem.of(model, loss, (x, LABELS)) for loss in (Halved(), nn.CrossEntropyLoss()))
    assert half.built_in is None
    samples = models.sample(one, 4)
    assert torch.allclose(2 * Curvature(half, samples).dense(), Curvature(one, samples).dense(), atol=1e-12)


def test_outputs_of_nll_that_are_no_log_probabilities_are_refused():
    model, x = flat()
    with pytest.raises(hessdiag.HessdiagError, match=r"nn.LogSoftmax\(1\).*nn.CrossEntropyLoss\(\)"):
        hessdiag.hessian(Problem.of(model, nn.NLLLoss(), (x, LABELS)))
    with pytest.raises(hessdiag.HessdiagError, match=r"nn.LogSoftmax\(1\)"):
        hessdiag.analyze(Problem.of(model, nn.NLLLoss(), (x, LABELS)), second_opinion=False)


REFUSED = {
    "class labels for numbers": (nn.MSELoss(), LABELS, r"class indices; give nn.CrossEntropyLoss\(\)"),
    "classes for bits": (nn.BCEWithLogitsLoss(), LABELS, r"class indices; give nn.CrossEntropyLoss\(\)"),
    "one weight per example": (nn.BCEWithLogitsLoss(weight=torch.ones(N, 1)), BITS, "one per example of a batch"),
    "weights that do not fit": (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), BITS, "one number per output"),
    "too few class weights": (nn.CrossEntropyLoss(weight=torch.ones(2)), LABELS, "one per class"),
    "a hole of another number": (nn.CrossEntropyLoss(ignore_index=9), HOLES, "ignore_index=-100"),
    "probabilities for nll": (nn.NLLLoss(), SOFT, "targets.long()"),
    "no reduction": (nn.MSELoss(reduction="none"), REAL, "reduction='mean' or 'sum'"),
    "a class": (nn.MSELoss, REAL, r"give an instance, nn.MSELoss\(\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_mean_is_refused_with_the_line_to_type(name):
    loss_fn, targets, text = REFUSED[name]
    model, x = flat()
    with pytest.raises(hessdiag.HessdiagError, match=text) as found:
        hessdiag.analyze(Problem.of(model, loss_fn, (x, targets)), "trace", batch_size=7)
    assert "\n" not in str(found.value)


def test_one_column_of_outputs_beside_flat_targets_is_not_broadcast():
    model = nn.Linear(3, 1).double()
    with pytest.raises(hessdiag.HessdiagError, match=r"every row with every other: give targets.unsqueeze\(-1\)"):
        hessdiag.analyze(Problem.of(model, nn.MSELoss(), (models.randn(N, 3), models.randn(N))), "trace")


def test_logits_are_normalised_along_the_classes_where_both_axes_could_be():
    """Three classes, three places: torch has the classes second."""
    outputs, targets = torch.randn(2, 3, 3, dtype=torch.float64), torch.randint(3, (2, 3))
    problem = Problem(nn.Identity(), {"train": (outputs, targets)}, criterion=nn.CrossEntropyLoss())
    found = normalized(problem, outputs, (outputs, targets))
    assert torch.allclose(found.square().sum(1), torch.ones(2, 3, dtype=torch.float64))
    assert torch.allclose(found.sum(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-12)
