"""Promise: a copy of a regularizer trains the copied model as the original trains its own, nothing else. (18 s)

Complex weights train as their real pairs do, and calls that other packages know are refused with the way out.
"""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import hessdiag.regularizers
from hessdiag.closed_form import flattest_factors
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.training import batch_loss, training
from hessdiag.errors import HessdiagError, UsageError
from hessdiag.regularizers import (
    ASAM,
    GSAM,
    HSR,
    MSAM,
    NSO,
    SAM,
    USAM,
    FriendlySAM,
    LabelNoise,
    LookSAM,
    SpectralRadius,
    TracePenalty,
    nso,
    schedules,
    wrapper,
)
from tests.models import generator, randn, same
from tests.training_runs import X, Y, near, net, state

KINDS = {
    "SAM": lambda model, opt: SAM(opt, rho=nso.linear(0.1, 5), model=model),
    "ASAM": lambda model, opt: ASAM(opt, rho=nso.exponential(0.1, 5)),
    "USAM": lambda model, opt: USAM(opt, rho=schedules.cosine(0.1, 5)),
    "MSAM": lambda model, opt: MSAM(opt, rho=schedules.by_epoch(schedules.linear(0.1, 5), 2)),
    "GSAM": lambda model, opt: GSAM(opt, rho=schedules.proportional_to_lr(0.1, lr_max=0.1)),
    "LookSAM": lambda model, opt: LookSAM(opt, every=2, model=model),
    "FriendlySAM": lambda model, opt: FriendlySAM(opt),
    "SAM, every second": lambda model, opt: SAM(opt, every=2, clip_norm=0.5),
    "NSO": lambda model, opt: NSO(opt, sigma=0.05),
    "LabelNoise": lambda model, opt: LabelNoise(opt, sigma=0.5),
    "SpectralRadius": lambda model, opt: SpectralRadius(opt, mu=0.1),
    "HSR by formula": lambda model, opt: HSR(opt, model, mu=0.01),
    "HSR by probes": lambda model, opt: HSR(opt, mu=0.01, rule="alternating"),
    "TracePenalty": lambda model, opt: TracePenalty(opt, mu=0.01),
}
SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, nso.linear(1.0, 9)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, nso.linear(0.9, 2)),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3]),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.9),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 9),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 9),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.1, 3),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.05, 3),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)], opt
    ),
}


def through_pickle(pair):
    """A maker is a function of this file, which pickle does not take."""
    made = pair[1].__dict__.pop("made")
    try:
        return pickle.loads(pickle.dumps(pair))
    finally:
        pair[1].made = made


def through_a_file(pair):
    """A new process's run: the weights and the state through torch.load(weights_only=True), settings from code."""
    model, optimizer = pair
    file, twin = io.BytesIO(), net()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved["model"])
    kind = next(k for k, made in KINDS.items() if made is optimizer.made)
    own = KINDS[kind](twin, torch.optim.SGD(twin.parameters(), lr=0.7, momentum=0.9))
    own.load_state_dict(saved["optimizer"])
    return twin, own


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "state_dict": through_a_file,
}


def advance(model: nn.Module, optimizer: wrapper.Regularizer) -> None:
    def loss():
        noisy = optimizer.targets(Y, classes=3) if isinstance(optimizer, LabelNoise) else Y
        return F.cross_entropy(model(X), noisy)

    optimizer.step(loss)


def started(kind: str, schedule: str, *, inner: bool = False) -> tuple[nn.Module, wrapper.Regularizer]:
    """Two steps under a scheduler."""
    model = net()
    optimizer = KINDS[kind](model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    held = SCHEDULERS[schedule](optimizer.inner if inner else optimizer)
    for _ in range(2):
        advance(model, optimizer)
        held.step(*([1.0] if schedule == "ReduceLROnPlateau" else []))
    return model, optimizer


def move(kind: str, schedule: str, *, inner: bool = False) -> None:
    """Two steps, copies, two steps of each copy, the same steps of the original."""
    model, optimizer = started(kind, schedule, inner=inner)
    optimizer.made = KINDS[kind]
    before, ends = state(model, optimizer), []
    for copied in COPIES.values():
        twin, other = copied((model, optimizer))
        assert type(other) is type(optimizer)
        assert other.param_groups is other.inner.param_groups and other.state is other.inner.state
        assert not {id(p) for g in other.param_groups for p in g["params"]} & {id(p) for p in model.parameters()}
        for _ in range(2):
            advance(twin, other)
        assert same(state(model, optimizer), before), "the copy's step moved the original"
        assert not same(state(twin, other), before), "the copy's step moved nothing"
        assert other.steps == 4
        ends.append(state(twin, other))
    for _ in range(2):
        advance(model, optimizer)
    for end in ends:
        near(state(model, optimizer), end)


def test_every_regularizer_is_copied():
    for kind in KINDS:
        move(kind, "CosineAnnealingLR")


def test_with_every_scheduler():
    """All of torch.optim.lr_scheduler, on every regularizer and on its inner optimizer."""
    known = {name for name in dir(lr_scheduler) if isinstance(getattr(lr_scheduler, name), type)}
    ours = {n for n in known if issubclass(getattr(lr_scheduler, n), lr_scheduler.LRScheduler)}
    assert {name for name in ours if name[0] != "_"} - {"LRScheduler"} <= set(SCHEDULERS)
    for schedule in SCHEDULERS:
        for kind in KINDS:
            move(kind, schedule, inner=kind == "ASAM")


def in_a_process(folder: str) -> None:
    """Of a spawned process: every pickled pair takes a step."""
    torch.set_num_threads(1)
    pairs = pickle.loads((Path(folder) / "pairs").read_bytes())
    found = {}
    for name, (model, optimizer) in pairs.items():
        advance(model, optimizer)
        found[name] = state(model, optimizer)
    torch.save(found, Path(folder) / "found")


def test_a_spawned_process_goes_on(tmp_path):
    """Every regularizer with every scheduler, in one process: the step is that of the original. (6 s)"""
    pairs = {
        f"{kind}, {schedule}": started(kind, schedule)
        for kind in KINDS
        for schedule in (SCHEDULERS if kind == "SAM" else ["OneCycleLR", "LambdaLR"])
    }
    (tmp_path / "pairs").write_bytes(pickle.dumps(pairs))
    process = multiprocessing.get_context("spawn").Process(target=in_a_process, args=(str(tmp_path),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    found = torch.load(tmp_path / "found", weights_only=True)
    assert found.keys() == pairs.keys()
    for name, (model, optimizer) in pairs.items():
        advance(model, optimizer)
        near(found[name], state(model, optimizer))


def test_hooks_stay_with_the_original():
    """As with torch's own optimizers: a hook's closure knows the original's tensors."""
    model, calls = net(), []
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    twin, other = copy.deepcopy((model, optimizer))
    advance(twin, other)
    assert not calls
    advance(model, optimizer)
    assert calls == [1]


def test_a_whole_run_is_copied():
    """Scheduler and copy together: the copy's learning rate moves with its own scheduler."""
    model = net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
    held = lr_scheduler.ExponentialLR(optimizer, 0.5)
    advance(model, optimizer)
    twin, other, own = pickle.loads(pickle.dumps((model, optimizer, held)))
    advance(twin, other)
    with pytest.warns(UserWarning, match="optimizer.step"):  # torch says so of every copied optimizer
        own.step()
    assert (optimizer.param_groups[0]["lr"], other.param_groups[0]["lr"]) == (0.1, 0.05)


# ---------------------------------------------------------------------------------------------- complex weights


class Spectral(nn.Module):
    """Complex weights (or their real pairs), with a real layer behind them."""

    def __init__(self, dtype: torch.dtype, *, paired: bool) -> None:
        super().__init__()
        start = torch.randn(3, 2, dtype=dtype, generator=generator())
        self.c = nn.Parameter(torch.view_as_real(start).clone() if paired else start)
        self.unused = nn.Parameter(
            torch.zeros(2, 2, dtype=start.real.dtype) if paired else torch.zeros(2, dtype=dtype)
        )
        self.head = nn.Parameter(randn(2, 5, seed=3).to(start.real.dtype))

    def forward(self) -> torch.Tensor:
        c = self.c if self.c.is_complex() else torch.view_as_complex(self.c)
        signal = torch.fft.irfft(c.conj(), n=5, dim=0)
        return ((self.head @ signal).tanh() ** 2).sum() + (c.imag**2).sum() ** 2 + (c.abs() ** 2).sum()


def test_complex_weights_train_as_their_pairs(*, dtypes=(torch.cfloat, torch.cdouble)):
    """Every regularizer, three steps with momentum and with Adam, clipped."""
    makers = KINDS | {
        "by differences": lambda _, opt: TracePenalty(opt, mu=0.01, third="difference"),
        "direction": lambda _, opt: HSR(opt, mu=0.01, rule="direction", third="difference"),
        "clipped": lambda _, opt: SAM(opt, clip_norm=0.5),
    }
    for dtype in dtypes:
        for kind, make in makers.items():
            if kind in ("LabelNoise", "HSR by formula"):
                continue
            for inner in (torch.optim.SGD, torch.optim.Adam):
                ends = []
                for paired in (False, True):
                    model = Spectral(dtype, paired=paired)
                    optimizer = make(None, inner(model.parameters(), lr=0.01))
                    losses = [float(optimizer.step(model)) for _ in range(3)]
                    assert losses[2] != losses[0]
                    ends.append([real(p.detach()) for p in model.parameters()])
                near(*ends, tolerance=2e-3 if dtype is torch.cfloat else 1e-7)


def test_a_failed_step_leaves_complex_weights():
    model = Spectral(torch.cdouble, paired=False)
    before = state(model)
    with pytest.raises(HessdiagError):
        SAM(torch.optim.SGD(model.parameters(), lr=0.1)).step(lambda: model() / 0)
    assert same(state(model), before)


def test_complex_weights_take_no_scaler():
    model = Spectral(torch.cfloat, paired=False)
    scaled = SAM(torch.optim.SGD(model.parameters(), lr=0.1), scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(UsageError, match="cannot unscale complex gradients"):
        scaled.step(model)


# ------------------------------------------------------------------------------------------ calls known elsewhere


def test_other_call_styles_say_the_way_out():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = {SAM: (), ASAM: ()}  # these understand parameters and a class, see test_two_steps_are_one
    for kind in (SAM, ASAM, NSO, LabelNoise, SpectralRadius, HSR, TracePenalty):
        for call in (
            *calls.get(kind, [lambda kind=kind: kind(model.parameters(), torch.optim.SGD, lr=0.1)]),
            lambda kind=kind: kind(list(model.parameters()), 0.1, momentum=0.9),
            lambda kind=kind: kind(torch.optim.SGD, 0.1),
            lambda kind=kind: kind(inner, 0.1, lr=0.1),
        ):
            with pytest.raises(UsageError, match=r"\(torch.optim.SGD\(model.parameters\(\), lr=0.1\)\)"):
                call()


def test_a_scaler_that_calls_is_refused():
    """In one line whether there are gradients or not; afterwards the regularizer works as before."""
    for backward in (False, True):
        model = net(dtype=torch.float32)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1))
        scaler = torch.amp.GradScaler("cpu")
        loss = scaler.scale(F.cross_entropy(model(X.float()), Y))
        if backward:
            loss.backward()
        for closure in ((), (lambda m=model: F.cross_entropy(m(X.float()), Y),)):
            with pytest.raises(UsageError, match="calls its GradScaler by itself"):
                scaler.step(optimizer, *closure)
        optimizer.step(lambda m=model: F.cross_entropy(m(X.float()), Y))


def test_what_the_package_has_is_listed():
    assert set(dir(hessdiag.regularizers)) >= {"SAM", "ASAM", "NSO", "LabelNoise", "SpectralRadius", "HSR"}
    for shape in ((4, 3), (3, 4), (4, 4)):
        for depth in (2, 3):
            assert all(factor.is_contiguous() for factor in flattest_factors(randn(*shape), depth, 5))


def test_a_reason_names_what_it_was():
    model = net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    assert HSR(inner, model, traces="probes").reason == "probes were asked for"
    assert HSR(inner, model, scaler=torch.amp.GradScaler("cpu")).reason == "a GradScaler is used"
    assert HSR(inner, model).reason == ""


def everything(self):
    return self.__dict__.copy()


def as_it_is(tensor):
    return tensor


BROKEN = {
    "a copy keeps the scheduler's step": (
        wrapper.Regularizer,
        "__getstate__",
        everything,
        test_every_regularizer_is_copied,
    ),
    "a state without its own": (
        FriendlySAM,
        "own_state",
        lambda self: {"mean": None},
        test_every_regularizer_is_copied,
    ),
    "a copy keeps hooks": (wrapper.Regularizer, "__getstate__", everything, test_hooks_stay_with_the_original),
    "complex weights are not taken apart": (
        batch_loss,
        "real",
        as_it_is,
        test_complex_weights_train_as_their_pairs,
    ),
    "products of complex weights are not": (training, "real", as_it_is, test_complex_weights_train_as_their_pairs),
    "a scaler is not told": (
        wrapper.Regularizer,
        "_step_supports_amp_scaling",
        False,
        test_a_scaler_that_calls_is_refused,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_breakage_is_noticed(name, monkeypatch):
    owner, attribute, broken, promise = BROKEN[name]
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Exception):  # noqa: B017 - an assertion, or torch's own error
        promise()
