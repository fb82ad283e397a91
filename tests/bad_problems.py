"""Factories as users write them, most of them with one thing wrong; copied beside bad files by the tests."""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hessdiag import Problem
from tests import models

number = 3


def inputs(n=12):
    return torch.linspace(-1, 1, 4 * n).sin().view(n, 4)


def network(width=5):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def good(width=5):
    return with_model(network(width))


def relu():
    model = network()
    model[1] = nn.ReLU()
    return with_model(model)


def with_model(model, **changes):
    return Problem(model, {"train": (inputs(), torch.arange(12) % 3)}, criterion="cross_entropy", **changes)


class Then(nn.Module):
    """The network, and something after its first layer."""

    def __init__(self, step):
        super().__init__()
        self.net, self.step = network(), step

    def forward(self, x):
        return self.net[2](self.step(self.net[:2](x)))


def with_step(step):
    return with_model(Then(step))


def with_loss(loss):
    return Problem(network(), {"train": (inputs(), torch.arange(12) % 3)}, loss=loss)


def with_labels(labels):
    return Problem(network(), {"train": (inputs(len(labels)), labels)}, criterion="cross_entropy")


def nan_weights():
    model = network()
    model[0].weight.data[0, 0] = float("nan")
    return with_model(model)


def nan_loss():
    return with_loss(lambda model, batch: (model(batch[0]) * 0).sum().log() * 0)


def inf_loss():
    return with_loss(lambda model, batch: model(batch[0]).square().mean() * 1e30 * 1e30)


def vector_loss():
    return with_loss(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none"))


def float_loss():
    return with_loss(lambda model, batch: 0.5)


def loss_of_another_model():
    other = network()
    return with_loss(lambda model, batch: F.cross_entropy(other(batch[0]), batch[1]))


def empty():
    return with_labels(torch.arange(0))


def no_batches():
    return Problem(network(), {"train": []}, criterion="cross_entropy")


def uneven():
    return Problem(network(), {"train": (inputs(), torch.arange(5))}, criterion="cross_entropy")


def ragged():
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.zeros(index + 1), 0

    return Problem(network(), {"train": Data()}, criterion="cross_entropy")


def data_is_a_number():
    return Problem(network(), {"train": 5}, criterion="cross_entropy")


def label_too_large():
    return with_labels(torch.arange(12) % 4)


def label_too_large_later():
    return with_labels(torch.tensor([0, 1, 2, 3]))


def data_raises():
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            raise OSError("image 3 cannot be read")

    return Problem(network(), {"train": Data()}, criterion="cross_entropy")


def forward_leaves():
    return with_step(lambda x: sys.exit("no GPU"))


def label_negative():
    return with_labels(torch.arange(12) % 3 - 1)


def all_ignored():
    return with_labels(torch.full((12,), -100))


def other_width():
    return Problem(network(), {"train": (inputs().view(16, 3), torch.arange(16) % 3)}, criterion="cross_entropy")


def no_targets():
    return Problem(network(), {"train": [inputs()]}, criterion="cross_entropy")


def frozen():
    return with_model(network().requires_grad_(False))


def integers():
    model = nn.Module()
    model.table = nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False)
    return with_model(model)


def no_parameters():
    return with_model(nn.Tanh())


def meta():
    return with_model(nn.Linear(4, 3, device="meta"))


def differentiable_once():
    return with_step(models.differentiable_once()[1])


class Detached(torch.autograd.Function):
    """A backward that forgets to be differentiable itself."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, slope):
        return slope * 3 * ctx.saved_tensors[0].detach() ** 2


class Once(Detached):
    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return slope * 3 * ctx.saved_tensors[0] ** 2


def detached_backward():
    return with_step(Detached.apply)


def once():
    return with_step(Once.apply)


def padding():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3))
    model[0].weight.data[0] = 0.5
    tokens = torch.arange(36).view(12, 3) % 6
    return Problem(model, {"train": (tokens, torch.arange(12) % 3)}, criterion="cross_entropy")


def functional_dropout():
    return with_step(F.dropout)


def augmentation():
    return with_step(lambda x: x + 0.1 * torch.randn_like(x))


def returns_tuple():
    return with_step(lambda x: (x, x))


def model_raises():
    def broken(x):
        raise ValueError("two\nlines from forward")

    return with_step(broken)


def raises():
    raise RuntimeError("the data disk\nis not mounted")


def leaves():
    sys.exit("usage: train.py --data DIR")


def interrupted():
    raise KeyboardInterrupt


def prints():
    print("Files already downloaded and verified")
    return good()


def needs_option(root):
    return good()


def needs_checkpoint(checkpoint):
    return good()


def nothing():
    return None


def two_losses():
    return Problem(network(), {"train": ()}, criterion="mse", loss=lambda model, batch: 0)


def unknown_criterion():
    return Problem(network(), {"train": (inputs(), inputs())}, criterion="hinge")


def module_criterion():
    return Problem(network(), {"train": (inputs(), torch.arange(12) % 3)}, criterion=nn.MSELoss())


def misnamed_field():
    return {"model": network(), "data": {}, "dataset": 1}


def pair():
    return network(), inputs()


def class_for_model():
    return {"model": nn.Linear, "data": {"train": inputs()}, "criterion": "mse"}
