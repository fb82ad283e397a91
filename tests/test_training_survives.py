"""Promise: a step survives what training brings, and what goes wrong leaves the weights as they were. (5 s)"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hessdiag.engine.products import restoring
from hessdiag.engine.training import batch_loss
from hessdiag.errors import HessdiagError, NonFiniteError
from hessdiag.regularizers import NSO, SAM, TracePenalty
from tests.models import randn, same
from tests.training_runs import KINDS, PASSES, Net, X, Y, close, flat, loss_of, near, net, sgd, state

# ------------------------------------------------------------------------------------------------- what it does


def test_micro_batches_are_one_batch():
    for name, make in KINDS.items():
        if name == "MSAM":
            continue  # a move for each: see test_variants_are_their_definitions
        whole, parts = net(), net()
        one, two = make(sgd(whole)), make(sgd(parts))
        for _ in range(3):
            loss = one.step(loss_of(whole))
            mean = two.step([loss_of(parts, slice(0, 6)), loss_of(parts, slice(6, 12))])
            assert float(loss) == pytest.approx(float(mean), rel=1e-12)
        near(state(whole), state(parts))


def test_scaled_steps_are_unscaled_steps():
    """In float32 a scale of 2^12 is exact; float16 and bfloat16 autocast are within their precision."""
    for make in KINDS.values():
        plain, scaled = net(dtype=torch.float32), net(dtype=torch.float32)
        make(sgd(plain)).step(loss_of(plain))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        make(sgd(scaled), scaler=scaler).step(loss_of(scaled))
        near(state(scaled), state(plain), 1e-7)
        for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2)):
            half = net(dtype=torch.float32)

            def closure(half=half, dtype=dtype):
                with torch.autocast("cpu", dtype):
                    outputs = half(X.float())
                return F.cross_entropy(outputs.float(), Y)

            make(sgd(half), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8)).step(closure)
            near(state(half), state(plain), tolerance)


def test_overflow_skips_the_step():
    """Infinity in any pass: weights and momentum stay, the scale is halved, training goes on."""
    for name, make in KINDS.items():
        for bad in range(1, PASSES[name] + 1):
            model, calls = net(nn.BatchNorm1d(6), dtype=torch.float32), []
            inner = sgd(model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            own = make(inner, scaler=scaler)
            own.step(loss_of(model))
            model.zero_grad()
            before = state(model, inner)

            def closure(model=model, calls=calls, bad=bad):
                calls.append(1)
                return loss_of(model)() * (3e38 if len(calls) == bad else 1.0)

            own.step(closure)
            model.zero_grad()
            assert same(state(model, inner), before)
            assert (scaler.get_scale(), own.steps) == (2.0**9, 2)
            own.step(loss_of(model))
            assert not same(state(model), before)


def test_autocast_around_the_step_sees_each_pass():
    """Autocast keeps half-precision copies of the weights; a pass must not see those of the pass before."""
    inside, around = net(dtype=torch.float32), net(dtype=torch.float32)

    def closure():
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(inside(X.float()).float(), Y)

    SAM(sgd(inside), rho=2.0).step(closure)
    with torch.autocast("cpu", torch.bfloat16):
        SAM(sgd(around), rho=2.0).step(lambda: F.cross_entropy(around(X.float()).float(), Y))
    near(state(around), state(inside), 1e-7)


class Doubled(nn.Module):
    """A parametrization whose graph keeps nothing: torch would not notice that it is used a second time."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight


def parametrized_layers() -> list[nn.Module]:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 6), parametrizations.weight_norm(nn.Linear(6, 6))]
    parametrize.register_parametrization(layers[0], "weight", Doubled())
    return layers


def test_parametrized_weights_follow_each_pass():
    """Against the definitions by torch.func, with parametrize.cached() around the step too."""
    for index in range(len(parametrized_layers())):
        for around in (contextlib.nullcontext, parametrize.cached):
            nets = [Net(parametrized_layers()[index]) for _ in range(3)]
            gradient, theta = torch.func.grad(nets[0].loss), nets[0].theta
            g = gradient(theta)
            expected = [gradient(theta + 0.3 * g / g.norm())]
            noisy = NSO(nets[1].sgd(), sigma=0.2)
            u = flat(noisy.perturbation(tuple(nets[1].params), (0.2,) * len(nets[1].params), 0))
            expected.append((gradient(theta + u) + gradient(theta - u)) / 2)
            trace = TracePenalty(nets[2].sgd(), mu=0.5)
            v = flat(trace.signs(tuple(nets[2].params), 0))
            product = torch.func.grad(lambda t, v=v, f=gradient: v @ f(t))
            form = torch.func.grad(lambda t, v=v, f=product: v @ f(t))
            expected.append(g + 0.5 * form(theta))
            kinds = (SAM(nets[0].sgd(), rho=0.3), noisy, trace)
            for one, own, right in zip(nets, kinds, expected, strict=True):
                with around():
                    close(one.stepped(own), right, 1e-10)


def test_clipping_bounds_the_gradient():
    for make in KINDS.values():
        free, clipped = net(), net()
        make(sgd(free)).step(loss_of(free))
        make(sgd(clipped), clip_norm=0.01).step(loss_of(clipped))
        g = torch.cat([p.grad.reshape(-1) for p in free.parameters()])
        c = torch.cat([p.grad.reshape(-1) for p in clipped.parameters()])
        assert float(c.norm()) == pytest.approx(0.01, rel=1e-4)  # torch divides by the norm + 1e-6
        assert torch.allclose(c / c.norm(), g / g.norm(), rtol=1e-9)


def test_frozen_weights_stay():
    for make in KINDS.values():
        model = net()
        own = make(sgd(model, weight_decay=0.1))
        model[0].weight.requires_grad_(False)
        kept = model[0].weight.clone()
        own.step(loss_of(model))
        assert torch.equal(model[0].weight, kept)
        assert model[0].weight.grad is None
        model[0].weight.requires_grad_(True)
        own.step(loss_of(model))
        assert not torch.equal(model[0].weight, kept)


def test_a_weight_without_gradient_in_a_pass_is_put_back():
    """Pass 1 uses the first tensor, pass 2 the other: the first moved and has no gradient at the end."""
    first, second, calls = nn.Parameter(randn(3)), nn.Parameter(randn(3, seed=2)), []
    kept = first.detach().clone()

    def closure():
        calls.append(1)
        return ((first if len(calls) == 1 else second) ** 2).sum()

    SAM(torch.optim.SGD([first, second], lr=0.1, weight_decay=0.1), rho=0.3).step(closure)
    assert torch.equal(first, kept)
    assert first.grad is None
    near([second.detach()], [randn(3, seed=2) * (1 - 0.2 - 0.01)])


def norm_layers() -> list[nn.Module]:
    return [nn.BatchNorm1d(6), nn.BatchNorm1d(6, momentum=None), nn.BatchNorm1d(6, track_running_stats=False)]


def test_statistics_move_once():
    """As after one ordinary forward pass, for any momentum; for SAM at the weights themselves."""
    for make in KINDS.values():
        for layer in norm_layers():
            model = net(layer)
            own = make(sgd(model))
            for _ in range(2):
                if make is KINDS["SAM"]:
                    once = copy.deepcopy(model)
                    once(X)
                own.step(loss_of(model))
            if layer.num_batches_tracked is not None:
                assert int(layer.num_batches_tracked) == 2
            if make is KINDS["SAM"]:
                assert same([*model.buffers()], [*once.buffers()])


def test_compiled_models_compile_once():
    """Given the model, no hook makes torch.compile start over; BatchNorm still moves once per step."""
    model, graphs = net(nn.BatchNorm1d(6)), []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(1) or graph.forward)
    own = SAM(sgd(model), model=model)
    for step in range(3):
        own.step(loss_of(compiled))
        assert int(model[1].num_batches_tracked) == step + 1
    assert len(graphs) == 1


def test_dropout_masks_agree():
    """Every pass draws the same mask, and the random state afterwards is as after one pass; if asked, not."""
    for name, make in KINDS.items():
        for shared in (True, False):
            model, masks = net(nn.Dropout(0.5)), []
            model[1].register_forward_hook(lambda m, i, o, masks=masks: masks.append(o == 0))
            torch.manual_seed(5)
            model(X)
            after_one = torch.get_rng_state()
            masks.clear()
            torch.manual_seed(5)
            make(sgd(model), same_randomness=shared).step(loss_of(model))
            assert len(masks) == PASSES[name]
            assert all(torch.equal(a, b) for a, b in pairwise(masks)) == shared
            assert torch.equal(torch.get_rng_state(), after_one) == shared


def test_interrupted_training_continues_alike():
    """Three steps, a checkpoint through torch.save, two more: the same bits as five steps."""
    for make in KINDS.values():
        runs = []
        for cut in (None, 3):
            model = net()
            own = make(torch.optim.Adam(model.parameters(), lr=0.1))
            for step in range(5):
                if step == cut:
                    file = io.BytesIO()
                    torch.save(own.state_dict(), file)
                    file.seek(0)
                    own = make(torch.optim.Adam(model.parameters(), lr=0.7))
                    own.load_state_dict(torch.load(file, weights_only=True))
                    assert own.param_groups is own.inner.param_groups
                    assert own.state is own.inner.state
                own.step(loss_of(model))
            runs.append(state(model, own.inner))
        assert same(*runs)
        assert copy.deepcopy(own).steps == 5


def test_learning_rate_schedulers_take_either():
    for pick in (lambda own: own, lambda own: own.inner):
        model = net()
        own = SAM(sgd(model))
        scheduler = torch.optim.lr_scheduler.StepLR(pick(own), step_size=1, gamma=0.1)
        before = state(model)
        own.step(loss_of(model))
        scheduler.step()
        assert own.param_groups[0]["lr"] == own.inner.param_groups[0]["lr"] == pytest.approx(0.05)
        assert not same(state(model), before)
        own.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        assert len(own.inner.param_groups) == 2
        own.zero_grad()
        assert all(p.grad is None for p in model.parameters())


# ---------------------------------------------------------------------------------------------- what goes wrong


class Stop(Exception):
    pass


def raising(error: BaseException):
    def fail(loss: Tensor) -> Tensor:
        raise error

    return fail


FAULTS = {
    "exception": (raising(Stop()), Stop),
    "interrupt": (raising(KeyboardInterrupt()), KeyboardInterrupt),
    "nan loss": (lambda loss: loss * math.nan, NonFiniteError),
    "infinite loss": (lambda loss: loss + math.inf, NonFiniteError),
    "infinite gradient": (lambda loss: loss + (loss - loss.detach()).sqrt(), NonFiniteError),
}


def test_faults_leave_everything(faults=None):
    """In any pass: weights, gradients, momentum and BatchNorm statistics have the bits they had."""
    for name, make in KINDS.items():
        for spoil, error in (faults or FAULTS).values():
            for bad in range(1, PASSES[name] + 1):
                model, calls = net(nn.BatchNorm1d(6)), []
                inner = sgd(model)
                own = make(inner)
                own.step(loss_of(model))
                before = state(model, inner)

                def closure(model=model, calls=calls, bad=bad, spoil=spoil):
                    calls.append(1)
                    loss = loss_of(model)()
                    return spoil(loss) if len(calls) == bad else loss

                with pytest.raises(error) as caught:
                    own.step(closure)
                assert same(state(model, inner), before)
                assert len(calls) == bad
                assert own.steps == 1
                if isinstance(caught.value, HessdiagError):
                    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- breakages


def forgetful(own) -> tuple[float, ...]:
    """A schedule by the calls of this object, which a checkpoint does not hold."""
    own.calls = getattr(own, "calls", 0) + 1
    return (0.1 * own.calls,) * len(own.trained())


def leaving_statistics(self, *error) -> None:
    self.weights.restore()
    self._statistics.commit()


BROKEN = {
    "weights not put back": (test_faults_leave_everything, restoring.Weights, "restore", lambda self: None),
    "put back by subtraction": (
        test_faults_leave_everything,
        restoring.Weights,
        "restore",
        lambda self: [p.data.mul_(1 + 1e-16 * p.numel()).add_(1e-15) for p in self.params],
    ),
    "statistics in every pass": (
        test_statistics_move_once,
        restoring.Statistics,
        "held",
        lambda self: torch.enable_grad(),
    ),
    "statistics never, compiled": (
        test_compiled_models_compile_once,
        restoring.Statistics,
        "commit",
        lambda self: None,
    ),
    "statistics never": (test_statistics_move_once, restoring.Statistics, "commit", lambda self: None),
    "statistics kept after a fault": (
        test_faults_leave_everything,
        batch_loss.BatchLoss,
        "__exit__",
        leaving_statistics,
    ),
    "no replay": (test_dropout_masks_agree, restoring.Randomness, "replay", lambda self: None),
    "casts kept": (test_autocast_around_the_step_sees_each_pass, restoring, "forget_copies", lambda: None),
    "parametrized weights kept": (
        test_parametrized_weights_follow_each_pass,
        restoring,
        "forget_copies",
        torch.clear_autocast_cache,
    ),
    "no finite check": (
        test_faults_leave_everything,
        batch_loss.BatchLoss,
        "checked",
        lambda self, loss, pieces: pieces,
    ),
    "overflow not skipped": (
        test_overflow_skips_the_step,
        batch_loss.BatchLoss,
        "checked",
        lambda self, loss, pieces: tuple(p.nan_to_num() for p in pieces),
    ),
    "steps not restored": (
        test_interrupted_training_continues_alike,
        NSO,
        "scheduled",
        lambda self, n, s: forgetful(self),
    ),
    "clipping per tensor": (
        test_clipping_bounds_the_gradient,
        torch.nn.utils,
        "clip_grad_norm_",
        lambda params, most: [p.grad.mul_(most / p.grad.norm()) for p in params],
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    promise, where, name, broken = breakage
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):  # the latter from pytest.raises in a promise
        promise()
