"""Promise: two processes training together keep the same weights, those of one process. (25 s, mostly imports)"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.engine.training import batch_loss
from hessdiag.regularizers import LabelNoise
from hessdiag.regularizers.two_steps import TwoSteps
from tests.models import randn, same
from tests.training_runs import KINDS, X, Y, loss_of, near, net, sgd, state


class Branched(nn.Module):
    """A branch that only rank 0 takes, and one that nobody takes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.branch, self.idle = net(), nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor, *, branch: bool) -> Tensor:
        out = self.body(x)
        return self.branch(out) if branch else out


def branched_loss(model: nn.Module, rank: int):
    rows = slice(6 * rank, 6 * rank + 6)
    return lambda: F.cross_entropy(model(X[rows], branch=rank == 0), Y[rows])


def in_two(own: TwoSteps, model: nn.Module, rank: int) -> None:
    loss = loss_of(model, slice(6 * rank, 6 * rank + 6))
    loss().backward()
    own.first_step()
    loss().backward()
    own.second_step(zero_grad=True)


def on_rank(rank: int, folder: str) -> None:
    """Trains with each regularizer under DistributedDataParallel, soundly and with each breakage."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own_mean, found = batch_loss.mean_over_ranks, {}
    for case in ("sound", "gradients of its own", "noise of its own"):
        batch_loss.mean_over_ranks = own_mean
        if case == "gradients of its own":
            batch_loss.mean_over_ranks = lambda loss, pieces, params: (loss, pieces)
        for name, make in KINDS.items():
            bare = Branched()
            model = nn.parallel.DistributedDataParallel(bare, find_unused_parameters=True)
            own = make(sgd(bare, weight_decay=0.01))
            if case == "noise of its own" and name == "NSO":
                own.seed = rank
            losses = [float(own.step(branched_loss(model, rank))) for _ in range(3)]
            found[case, name] = (state(bare), losses)
    batch_loss.mean_over_ranks = own_mean
    for name, make in KINDS.items():
        if issubclass(type(make(sgd(net()))), TwoSteps) and name not in ("MSAM", "LookSAM"):
            for wrapped in (True, False):
                bare = net()
                model = nn.parallel.DistributedDataParallel(bare) if wrapped else bare
                own = make(sgd(bare, weight_decay=0.01))
                for _ in range(3):
                    in_two(own, model, rank)
                found["two calls", name, wrapped] = state(bare)
    bare = net()
    loss = loss_of(nn.parallel.DistributedDataParallel(bare), slice(6 * rank, 6 * rank + 6))
    v = [randn(*p.shape, seed=3) for p in bare.parameters()]
    with batch_loss.BatchLoss(loss, list(bare.parameters())) as batch:
        curved = batch.curved()
        found["curved"] = (list(curved.product(v)), list(batch.third(curved, v)), float(curved.loss))
    noisy = LabelNoise(sgd(net()), sigma=1.0)
    found["labels"] = noisy.targets(torch.zeros(50))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    mp.spawn(on_rank, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


def ranks_agree(found: list[dict], case: str = "sound") -> None:
    """Weights equal bit for bit on both ranks, and near those of one process with the ranks as micro-batches."""
    for name, make in KINDS.items():
        (left, losses), (right, others) = found[0][case, name], found[1][case, name]
        assert same(left, right)
        assert losses == others
        model = Branched()
        own = make(sgd(model, weight_decay=0.01))
        closures = [branched_loss(model, rank) for rank in range(2)]
        alone = [float(own.step(closures)) for _ in range(3)]
        assert losses == pytest.approx(alone, rel=1e-12)
        near(left, state(model), 1e-10)


def test_both_ranks_train_as_one_process(two_ranks):
    ranks_agree(two_ranks)


def two_calls_agree(found: list[dict]) -> None:
    """first_step and second_step, with DDP's own averages and without: the weights of one process."""
    names = {key[1] for key in found[0] if key[0] == "two calls"}
    assert {"SAM", "ASAM", "USAM", "GSAM", "FriendlySAM"} == names
    for name in names:
        model = net()
        own = KINDS[name](sgd(model, weight_decay=0.01))
        for _ in range(3):
            own.step([loss_of(model, slice(6 * rank, 6 * rank + 6)) for rank in range(2)])
        own.zero_grad()
        for wrapped in (True, False):
            left, right = (ranks["two calls", name, wrapped] for ranks in found)
            assert same(left, right)
            near(left, state(model), 1e-10)


def test_two_calls_train_as_one_process(two_ranks):
    two_calls_agree(two_ranks)


def test_two_calls_that_disagree_would_be_noticed(two_ranks):
    keys = [key for key in two_ranks[0] if key[0] == "two calls"]
    moved = {key: [2 * tensor for tensor in two_ranks[0][key]] for key in keys}
    with pytest.raises(AssertionError):
        two_calls_agree([moved, two_ranks[1]])


def test_products_are_means_over_ranks(two_ranks):
    model = net()
    v = [randn(*p.shape, seed=3) for p in model.parameters()]
    with batch_loss.BatchLoss(loss_of(model), list(model.parameters())) as batch:
        curved = batch.curved()
        alone = (list(curved.product(v)), list(batch.third(curved, v)))
    for found in two_ranks:
        near(found["curved"][0], alone[0])
        near(found["curved"][1], alone[1], 1e-10)


def test_label_noise_differs_between_ranks(two_ranks):
    assert not torch.equal(two_ranks[0]["labels"], two_ranks[1]["labels"])


@pytest.mark.parametrize("case", ["gradients of its own", "noise of its own"])
def test_disagreeing_ranks_would_be_noticed(two_ranks, case):
    with pytest.raises(AssertionError):
        ranks_agree(two_ranks, case)
