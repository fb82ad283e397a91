"""Promise: a model without fault is measured, to the right numbers, whatever it is built of. (30 s)

And what cannot be measured as it is, is refused by its name.
"""

from __future__ import annotations

import copy
import re
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation
from torch.nn.utils import prune

import hessdiag
from hessdiag.engine.checks import differences, planner, selftest
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.engine.products import stacking, substitutes
from hessdiag.errors import HessdiagError
from hessdiag.problem import Problem
from tests import models

X, Y = models.randn(24, 5), models.labels(24, 3)
BAGS = torch.randint(0, 9, (24, 4), generator=models.generator(3))


def problem(model, x=X, y=Y, **options):
    options = {"criterion": "cross_entropy"} | ({"criterion": None} if "loss" in options else {}) | options
    return Problem(model, {"train": (x, y)}, **options)


def net(*middle, seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(width, 3)).double().eval()


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def refusal(subject, **options) -> str:
    """The refusal of a problem; empty where there is none."""
    try:
        require_sound(preflight(subject, models.sample(subject, 24), **options))
    except HessdiagError as error:
        return str(error)
    return ""


def truth(subject):
    """The Hessian by differences of plain gradients of the untouched model, float64."""
    parameters = [p for p in subject.model.parameters() if p.requires_grad]
    batch = next(iter(models.sample(subject, 24).batches))

    def slope():
        loss = subject.total(subject.model, batch) / subject.count(batch)
        slopes = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return torch.cat([s.to_dense().flatten() for s in slopes])

    rows, h = [], 1e-6
    for parameter in parameters:
        for index in range(parameter.numel()):
            with torch.no_grad():
                entry = parameter.view(-1)[index]
                kept = entry.clone()
                entry += h
            up = slope()
            with torch.no_grad():
                entry.copy_(kept - h)
            down = slope()
            with torch.no_grad():
                entry.copy_(kept)
            rows.append((up - down) / (2 * h))
    return torch.stack(rows)


def miss(subject, **options) -> float:
    """Of the products, relative to the Hessian by differences."""
    H = truth(subject)
    operator = hessdiag.hessian(subject, samples=24, batch_size=24, **options)
    return float((operator @ torch.eye(operator.size).to(operator.dtype) - H).norm() / H.norm())


ROWS = dict.fromkeys(("Softmin", "Softmax", "LogSoftmax"), (1,))
ARGUMENTS = ROWS | {"Threshold": (0.1, 0.0), "GLU": (-1,), "MultiheadAttention": (6, 2)}


def activations():
    for name in activation.__all__:
        module = getattr(nn, name)(*ARGUMENTS.get(name, ()))
        if name == "MultiheadAttention":
            attention = module
            yield name, [_Attention(attention)], 6
        elif name == "Softmax2d":
            yield name, [nn.Unflatten(1, (6, 1, 1)), module, nn.Flatten()], 6
        else:
            yield name, [module], 3 if name == "GLU" else 6


class _Attention(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        rows = x[:, None] * torch.linspace(0.5, 1.5, 3).to(x)[:, None]
        return self.attention(rows, rows, rows)[0].mean(1)


ACTIVATIONS = {name: (middle, width) for name, middle, width in activations()}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_of_torch_is_measured(name):
    middle, width = ACTIVATIONS[name]
    subject = problem(net(*middle, width=width))
    assert refusal(subject) == ""
    assert miss(subject) < 1e-5


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, indices):
        return self.head(torch.tanh(self.bag(indices)))


def ragged(model, batch):
    rows = torch.arange(len(batch[0]))
    offsets = 4 * rows - (rows % 3 == 1).long()
    return model.head(torch.tanh(model.bag(batch[0].reshape(-1), offsets)))


def sparse():
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    return nn.Sequential(table, nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def pruned(deep):
    model = net(nn.Tanh(), *((nn.Linear(6, 6), nn.ReLU()) if deep else ()))
    prune.l1_unstructured(model[0], "weight", 0.4)
    prune.random_unstructured(model[-1], "bias", 1)
    return problem(model)


def spectral():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.nn.utils.spectral_norm(model[0])
    return problem(model.eval())


def margin(**options):
    return problem(net(), criterion=lambda o, b: F.multi_margin_loss(o, b[1], **options))


def margins():
    labels = torch.tensor([[1, 2, -1], [0, -1, -1]]).repeat(12, 1)
    return problem(net(), X, labels, criterion=lambda o, b: F.multilabel_margin_loss(o, b[1]))


MEASURED = {  # name: problem
    "hardsigmoid in place": lambda: problem(net(nn.Hardsigmoid(inplace=True))),
    "hardsigmoid as a function": lambda: problem(net(Called(F.hardsigmoid))),
    "bags, mean": lambda: problem(Bags().double(), BAGS),
    "bags, sum, sparse": lambda: problem(Bags(mode="sum", sparse=True).double(), BAGS),
    "bags, max": lambda: problem(Bags(mode="max").double(), BAGS),
    "bags, padded": lambda: problem(Bags(padding_idx=0).double(), BAGS),
    "bags, ragged": lambda: problem(Bags().double(), BAGS, forward=ragged),
    "sparse embedding": lambda: problem(sparse(), BAGS),
    "multi-margin loss": lambda: margin(),
    "multi-margin loss, squared and weighted": lambda: margin(p=2, weight=torch.tensor([1.0, 2, 3]).double()),
    "multi-label margin loss": margins,
    "pruned, two layers": lambda: pruned(False),
    "pruned, three layers": lambda: pruned(True),
    "spectral norm by a hook": spectral,
}


@pytest.mark.parametrize("name", MEASURED)
def test_it_is_measured_rightly(name):
    subject = MEASURED[name]()
    assert refusal(subject) == ""
    assert miss(subject) < 1e-5


@pytest.mark.parametrize("name", ["pruned, two layers", "pruned, three layers", "spectral norm by a hook"])
def test_a_whole_analysis_agrees(name):
    subject = MEASURED[name]()
    H = truth(subject)
    found = hessdiag.analyze(subject, quantities=["lambda_max", "trace"], dtype="float64").metrics
    largest, trace = float(torch.linalg.eigvalsh((H + H.T) / 2)[-1]), float(H.trace())
    assert found["lambda_max"].lo * (1 - 1e-5) <= largest <= found["lambda_max"].hi * (1 + 1e-5)
    assert abs(found["trace"].value - trace) <= 5 * found["trace"].stderr + 1e-5 * abs(trace)


def test_a_compiled_part_is_measured_as_it_was_written():
    plain = net(nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
    model = copy.deepcopy(plain)
    model[1] = torch.compile(model[1], backend=_compiler)
    subject = problem(model)
    assert refusal(subject) == ""
    v = models.randn(sum(p.numel() for p in plain.parameters()))
    ours, theirs = (hessdiag.hessian(one, samples=24, batch_size=24) @ v for one in (subject, problem(plain)))
    assert torch.equal(ours, theirs)


def _compiler(graph, inputs):
    raise AssertionError("compiled while measuring")


def logistic(seed):
    torch.manual_seed(seed)
    return problem(nn.Linear(1, 2), torch.randn(40, 1), torch.randint(2, (40,)))


def tiny(scale=1e-10):
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return problem(model)


@pytest.mark.parametrize("seed", range(8))
def test_logistic_regression_of_two_classes_is_measured(seed):
    assert refusal(logistic(seed)) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-13, 1e-10, 1e-4, 0.0])
def test_weights_next_to_zero_are_measured(scale, dtype):
    assert refusal(tiny(scale), dtype=dtype) == ""


FLAT = {
    "linear": lambda: problem(nn.Linear(5, 3), X.float(), loss=lambda m, b: m(b[0]).mean()),
    "absolute error": lambda: problem(
        nn.Linear(5, 1), X.float(), X[:, :1].float(), criterion=lambda o, b: F.l1_loss(o, b[1])
    ),
}


@pytest.mark.parametrize("name", FLAT)
def test_a_hessian_of_zero_is_zero(name):
    subject = FLAT[name]()
    assert refusal(subject) == ""
    operator = hessdiag.hessian(subject, samples=24)
    assert float((operator @ torch.ones(operator.size)).abs().max()) == 0


def test_a_multiple_of_the_identity_is_no_contradiction():
    torch.manual_seed(0)
    model = nn.Linear(40, 3, bias=False)
    x = torch.eye(40).repeat(2, 1)
    found = hessdiag.analyze(problem(model, x, torch.randn(80, 3), criterion="mse"), samples=80, batch_size=80)
    assert not [text for text in found.warnings if "do not trust" in text]


def rounded():
    """A language model's habit: parts computed in float32, whatever comes in."""
    return problem(net(nn.Tanh(), Called(lambda x: F.silu(3 * x.float()).to(x))))


def test_what_rounds_to_single_precision_inside_has_its_floor():
    checked = preflight(rounded(), models.sample(rounded(), 24), dtype=torch.float64)
    assert not checked.texts("fault")
    assert checked.operator.floor >= 16 * torch.finfo(torch.float32).eps


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner(x).float()


def cast_weight(x):
    return F.linear(x.bfloat16(), torch.eye(6).bfloat16()).to(x)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6)), {nn.Linear})
    return nn.Sequential(nn.Linear(5, 6), part, nn.Linear(6, 3))


def at_a_root():
    model = net(Called(lambda x: x.sign() * x.abs().sqrt()))
    with torch.no_grad():
        model[0].weight[2].zero_()
        model[0].bias[2] = 0
    return model


class Scripted(nn.Module):
    def forward(self, x):
        return x.tanh()


def scripted_part():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net(torch.jit.script(Scripted()))


REFUSED = {  # name: (problem, options, cause and cure)
    "autocast": (
        lambda: problem(Autocast()),
        {"dtype": torch.float32},
        "inner.0 computes in bfloat16 under torch.autocast.*training loop.*`dtype='float64'`",
    ),
    "a cast to half precision": (
        lambda: problem(net(nn.Tanh(), Called(cast_weight))),
        {},
        r"2 computes in bfloat16 by a cast.*x.to\(weight.dtype\)|computes in bfloat16 by a cast",
    ),
    "a cast of the input": (
        lambda: problem(Called(lambda x: x)),
        {"model": lambda: nn.Sequential(Called(lambda x: x.bfloat16()), nn.Linear(5, 3))},
        "casts to a precision of its own.*weight.dtype",
    ),
    "lazy": (
        lambda: problem(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(3))),
        {},
        "0.weight is not initialized yet.*call the model once",
    ),
    "quantized": (lambda: problem(quantized()), {}, "quantized.*floating-point model"),
    "TorchScript inside": (lambda: problem(scripted_part()), {}, "1 of the model is TorchScript.*nn.Module"),
    "an infinite second derivative": (
        lambda: problem(at_a_root()),
        {},
        "NaN or infinite in 0.weight.*sqrt.*small constant",
    ),
    "a loss without second derivative": (
        lambda: problem(net(Called(lambda x: nn.CrossMapLRN2d(2)(x[:, :, None, None])[:, :, 0, 0]))),
        {},
        "no exact product works here.*replace the operation",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_named(name):
    make, options, text = REFUSED[name]
    options = dict(options)
    subject = problem(options.pop("model")()) if "model" in options else make()
    said = refusal(subject, **options)
    assert re.search(text, said), said
    assert "\n" not in said


def test_autocast_leaves_double_precision_alone():
    assert refusal(problem(Autocast()), dtype=torch.float64) == ""


def test_torch_is_as_it_was_afterwards():
    before = [getattr(room, name) for room, name, _ in substitutes.SUBSTITUTES]
    with pytest.raises(ZeroDivisionError), substitutes.twice_differentiable():
        with substitutes.twice_differentiable():
            assert F.hardsigmoid(torch.ones(1, requires_grad=True)).grad_fn.name() == "DivBackward0"
        1 / 0  # noqa: B018
    assert [getattr(room, name) for room, name, _ in substitutes.SUBSTITUTES] == before


def test_batch_norm_without_statistics_is_said():
    subject = problem(net(nn.BatchNorm1d(6, track_running_stats=False)))
    checked = preflight(subject, models.sample(subject, 24))
    notes = checked.texts("note")
    assert any("normalises by the batch" in note for note in notes)
    assert not any("with its running statistics" in note for note in notes)


def test_batch_norm_without_statistics_is_said_of_batches_too_small_to_cut():
    """One example alone has no batch statistics: examples of several batches are put together by fours."""
    model = net(nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh())
    asked = hessdiag.analyze(problem(model), ["lambda_max"], samples=24, batch_size=3)
    assert any("batches of 3 examples only" in warning for warning in asked.warnings)


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.inner(packed)[1][0][-1])


def said_of_packed(capfd, monkeypatch) -> str:
    monkeypatch.setattr(planner, "WORTH_STACKING", 0)  # or its batches are not tried together
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(models.randn(24, 4, 2).float(), torch.arange(24) % 4 + 1, Y)
    subject = Problem(
        Packed(),
        {"train": data},
        forward=lambda model, batch: model(*batch[:2]),
        criterion=lambda outputs, batch: F.cross_entropy(outputs, batch[2]),
    )
    for kind in ("hessian", "ggn"):
        hessdiag.analyze(subject, ["lambda_max", "trace"], operator=kind, batch_size=4)
    return capfd.readouterr().err


def test_a_packed_sequence_is_measured_without_a_word_of_torchs(capfd, monkeypatch):
    """Torch prints past Python's filters where a warning that is an error meets an error."""
    assert said_of_packed(capfd, monkeypatch) == ""


def test_this_promise_would_notice_torchs_word(capfd, monkeypatch):
    monkeypatch.setattr(stacking, "quiet_vmap", nullcontext)
    monkeypatch.setattr(planner, "batching_rules_only", nullcontext)
    torch.set_warn_always(True)  # else it speaks once a process, and another test may have heard it
    try:
        with pytest.raises(UserWarning, match="performance drop"):
            said_of_packed(capfd, monkeypatch)
    finally:
        torch.set_warn_always(False)


def _signs(operator, number):
    generator = torch.Generator().manual_seed(20_261_121)
    signs = torch.randint(0, 2, (number, operator.size), generator=generator) * 2 - 1
    return signs.to(operator.device, operator.dtype)


def _signs_again(patch):
    patch.setattr(differences, "NEGLIGIBLE", dict.fromkeys(differences.NEGLIGIBLE, 0.0))
    patch.setattr(planner, "trial_vectors", _signs)
    patch.setattr(selftest, "trial_vectors", _signs)


def _steps_of_the_weights(patch):
    patch.setattr(differences, "NEGLIGIBLE", dict.fromkeys(differences.NEGLIGIBLE, 0.0))
    patch.setattr(differences, "LEAST_WEIGHT", 0.0)


BROKEN = {
    "torch's own operations": (
        lambda patch: patch.setattr(substitutes, "SUBSTITUTES", ()),
        lambda: test_it_is_measured_rightly("bags, mean"),
    ),
    "a substitute of another slope": (
        lambda patch: patch.setattr(
            substitutes, "SUBSTITUTES", ((torch._C._nn, "hardsigmoid", lambda x: F.relu6(x + 3) / 5),)
        ),
        lambda: test_it_is_measured_rightly("hardsigmoid as a function"),
    ),
    "signs as trial vectors": (
        _signs_again,
        lambda: [test_logistic_regression_of_two_classes_is_measured(seed) for seed in range(8)],
    ),
    "steps as long as the weights only": (
        _steps_of_the_weights,
        lambda: test_weights_next_to_zero_are_measured(1e-13, torch.float64),
    ),
    "precision inside is not looked at": (
        lambda patch: patch.setattr(selftest, "narrowest", lambda function, piece: function.dtype),
        lambda: [test_what_rounds_to_single_precision_inside_has_its_floor()],
    ),
    "half precision is not looked at": (
        lambda patch: patch.setattr(selftest, "narrowest", lambda function, piece: function.dtype),
        lambda: test_what_cannot_be_measured_is_named("autocast"),
    ),
    "NaN is called noise": (
        lambda patch: patch.setattr(selftest, "_infinite", lambda operator, product: None),
        lambda: test_what_cannot_be_measured_is_named("an infinite second derivative"),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    spoil, test = BROKEN[name]
    spoil(monkeypatch)
    with pytest.raises((AssertionError, HessdiagError)):
        test()
