"""Promise: the examples measured are those that the user's loader visits, or a line says what differs.

Right values: trace and lambda_max of softmax regression by its closed form in float64, over the examples named.
"""

from __future__ import annotations

import itertools
import random
import re
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import hessdiag
from hessdiag.engine.checks.preflight import preflight
from hessdiag.errors import ProblemError, Refused
from hessdiag.gap.examine import About, Examination, examine
from hessdiag.samples import divide, draw, examples, randomness, reading, streams, visited
from hessdiag.samples.randomness import Generators
from hessdiag.shift.report import ShiftSettings, shift_curves

N = 30
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 3, N)[:, None]
Y = torch.arange(N) % 3
ROWS = TensorDataset(X, Y)
EVEN = list(range(0, N, 2))


def model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(4, 3)


def truth(indices):
    """Trace and λ_max of softmax regression over these examples, each as often as it is named."""
    net = model().double()
    x = torch.cat([X[indices].double(), torch.ones(len(indices), 1, dtype=torch.float64)], dim=1)
    p = torch.softmax(net(X[indices].double()).detach(), dim=1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("nij,na,nb->iajb", S, x, x).reshape(15, 15) / len(indices)
    return float(H.trace()), float(torch.linalg.eigvalsh(H)[-1])


def measured(source, **options):
    problem = hessdiag.Problem(model(), {"train": source}, criterion="cross_entropy")
    return hessdiag.analyze(problem, quantities=["lambda_max", "trace"], dtype="float64", **options)


def check_measures(source, indices):
    found = measured(source)
    assert found.fingerprint["samples"] == len(indices)
    trace, largest = truth(indices)
    assert found.metrics["trace"].value == pytest.approx(trace, rel=1e-6)
    assert found.metrics["lambda_max"].value == pytest.approx(largest, rel=1e-6)
    return " ".join((*found.notes, *found.warnings))


class Mine(Sampler):
    """A sampler as users write them: whatever ``make`` gives, and a counter of its passes."""

    def __init__(self, make):
        self.make, self.epoch = make, 0

    def __iter__(self):
        self.epoch += 1
        return iter(self.make())


class Of(Dataset):
    """A map-style data set: whatever ``make`` gives for an index."""

    def __init__(self, make, size=N):
        self.make, self.size = make, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make(index)


class Stream(IterableDataset):
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def for_ever():
    while True:
        yield 1


def seen(source, **options):
    """The drawn inputs, one per row."""
    return torch.cat([batch[0] for batch in draw(source, **options).batches])


SAMPLERS = {
    "shuffled": ({"shuffle": True}, range(N), ""),
    "in order": ({"sampler": SequentialSampler(ROWS)}, range(N), ""),
    "a random subset": ({"sampler": SubsetRandomSampler(EVEN)}, EVEN, ""),
    "a list": ({"sampler": [5, 1, 7]}, [1, 5, 7], ""),
    "a sampler of the user's": ({"sampler": Mine(lambda: EVEN)}, EVEN, ""),
    "indices as tensors": ({"sampler": Mine(lambda: torch.tensor(EVEN))}, EVEN, ""),
    "indices of NumPy": ({"sampler": np.array(EVEN)}, EVEN, ""),
    "repetitions": ({"sampler": [1, 1, 1, 2]}, [1, 1, 1, 2], "2 of the 4 indices of its sampler are repetitions"),
    "drop_last in order": ({"drop_last": True}, range(28), "drop_last leaves out the last 2 of 30 examples"),
    "drop_last shuffled": (
        {"drop_last": True, "shuffle": True},
        range(N),
        "drop_last leaves out 2 of 30 .* in a pass",
    ),
    "with replacement": ({"sampler": RandomSampler(ROWS, replacement=True)}, range(N), "draws with replacement"),
    "k of n": ({"sampler": RandomSampler(ROWS, num_samples=7)}, range(N), "takes 7 of 30 examples in a pass"),
    "one rank's share": (
        {"sampler": DistributedSampler(ROWS, num_replicas=3, rank=1)},
        range(N),
        "DistributedSampler gives rank 1 one share of 3",
    ),
    "batches of the user's": ({"batch_sampler": [[0, 2], [4, 6, 8]]}, [0, 2, 4, 6, 8], "are not kept"),
    "a batch sampler of a subset": (
        {"batch_sampler": BatchSampler(SubsetRandomSampler(EVEN), 4, drop_last=False)},
        EVEN,
        "",
    ),
    "a batch sampler in order with drop_last": (
        {"batch_sampler": BatchSampler(EVEN, 4, drop_last=True)},
        EVEN[:12],
        "drop_last leaves out the last 3 of 15",
    ),
    "lists of indices": (
        {"batch_size": None, "sampler": BatchSampler(SubsetRandomSampler(EVEN), 4, drop_last=False)},
        EVEN,
        "",
    ),
    "workers": ({"num_workers": 2, "sampler": EVEN, "generator": torch.Generator()}, EVEN, ""),
}


def check_sampler(options, indices, said):
    standard = {} if {"batch_size", "batch_sampler"} & set(options) else {"batch_size": 4}
    text = check_measures(DataLoader(ROWS, **standard, **options), list(indices))
    if said:
        assert re.search(said, text), text
    else:
        assert "data[" not in text


@pytest.mark.parametrize(("options", "indices", "said"), SAMPLERS.values(), ids=SAMPLERS)
def test_what_the_sampler_visits_is_measured(options, indices, said):
    check_sampler(options, indices, said)


REFUSED = {
    "by weight": ({"sampler": WeightedRandomSampler(torch.ones(N), N)}, "WeightedRandomSampler .* plain mean"),
    "by chance": (
        {"sampler": Mine(lambda: torch.randint(N, (N,)).tolist())},
        "repeats and leaves out .* plain mean",
    ),
    "for ever": ({"sampler": Mine(for_ever)}, "no end.*DataLoader"),
    "batches for ever": ({"batch_sampler": Mine(lambda: itertools.repeat([1, 2]))}, "no end"),
    "empty batches for ever": ({"batch_sampler": Mine(lambda: itertools.repeat([]))}, "no end"),
    "an iterator": ({"sampler": iter([1, 2])}, "only once; give sampler=list"),
    "nothing": ({"sampler": []}, "gives no index"),
    "fails": ({"sampler": Mine(lambda: 1 / 0)}, "its sampler BatchSampler raised ZeroDivisionError"),
    "an index too many": ({"sampler": [1, 99]}, r"\[99\] raised IndexError"),
    "no batch": ({"batch_size": 40, "drop_last": True}, "no batch; give drop_last=False"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_samplers_that_make_another_mean_or_no_end_are_refused(options, said):
    with pytest.raises(ProblemError, match=said) as refusal:
        draw(DataLoader(ROWS, **options))
    assert "\n" not in str(refusal.value)


def check_splits():
    parts = {"train": SubsetRandomSampler(range(20)), "test": SubsetRandomSampler(range(20, 30))}
    drawn = {name: draw(DataLoader(ROWS, 5, sampler=one), split=name) for name, one in parts.items()}
    assert [one.examples for one in drawn.values()] == [20, 10]
    assert drawn["train"].digest != drawn["test"].digest
    assert drawn["train"].available == 20


def test_train_and_test_loaders_over_one_data_set_are_apart():
    check_splits()


def test_a_shuffled_loader_draws_what_it_always_drew():
    """The numbers of earlier versions stay: a permutation by the seed, its beginning sorted."""
    generator = torch.Generator().manual_seed(randomness.integer(3, "samples"))
    expected = X[torch.randperm(N, generator=generator)[:12].sort().values]
    for source in ((X, Y), ROWS, DataLoader(ROWS, 4, shuffle=True), DataLoader(ROWS, 4)):
        drawn = draw(source, samples=12, seed=3)
        assert torch.equal(torch.cat([batch[0] for batch in drawn.batches]), expected)
        assert drawn.notes == drawn.warnings == ()
        assert drawn.digest == draw((X, Y), samples=12, seed=3).digest


def test_a_smaller_draw_is_part_of_a_larger_one_and_batch_size_keeps_its_meaning():
    for options in (
        {"sampler": SubsetRandomSampler(EVEN)},
        {"batch_sampler": Mine(lambda: [EVEN[:9], EVEN[9:]])},
    ):
        loader = DataLoader(ROWS, **options)
        large, small = (seen(loader, samples=k, seed=2, batch_size=3) for k in (9, 4))
        assert {tuple(row) for row in small.tolist()} <= {tuple(row) for row in large.tolist()}
        assert [len(batch[1]) for batch in draw(loader, samples=8, batch_size=3).batches] == [3, 3, 2]
        assert draw(loader, samples=8, batch_size=3).digest == draw(loader, samples=8).digest


def test_subsets_of_subsets_and_joined_data_sets_are_what_they_name():
    nested = Subset(Subset(ROWS, EVEN), [1, 3, 5])
    check_measures(DataLoader(nested, 2, shuffle=True), [2, 6, 10])
    check_measures(ConcatDataset([nested, Subset(ROWS, [1])]), [2, 6, 10, 1])


def test_a_random_subset_in_every_pass_is_one_pass_and_says_so():
    sampler = Mine(lambda: torch.randperm(N)[:7])
    drawn = draw(DataLoader(ROWS, 3, sampler=sampler))
    assert drawn.examples == 7 and "takes other examples in every pass" in drawn.notes[0]
    assert drawn.digest == draw(DataLoader(ROWS, 3, sampler=sampler)).digest
    assert sampler.epoch == 0  # the passes read here are not the user's


HELD = np.random.default_rng(7)


def flipped(index):
    return (X[index].flip(0) if torch.rand(()) < 0.5 else X[index]), Y[index]


class Own(Of):
    """Augmentation by a generator that the data set holds."""

    def __init__(self, generator, noise):
        super().__init__(lambda i: (X[i] + noise(self.generator), Y[i]))
        self.generator = generator


RANDOM = {
    "torch": lambda: Of(flipped),
    "in a subset": lambda: Subset(Of(flipped), range(N)),
    "numpy": lambda: Of(lambda i: (X[i] + float(np.random.randn()), Y[i])),
    "python": lambda: Of(lambda i: (X[i] + random.random(), Y[i])),
    "its own of numpy": lambda: Own(np.random.default_rng(), lambda g: float(g.normal())),
    "its own of torch": lambda: Own(torch.Generator(), lambda g: torch.randn((), generator=g)),
    "its own of Python": lambda: Own(random.Random(), lambda g: g.random()),
    "its own, legacy": lambda: Own(np.random.RandomState(), lambda g: float(g.randn())),
    "a global's": lambda: Of(lambda i: (X[i] + float(HELD.normal()), Y[i])),
    "rare": lambda: Of(lambda i: (X[i] if torch.rand(()) < 0.8 else X[i] * 2, Y[i])),
    "a stream": lambda: Stream(lambda: ((torch.randn(5, 4), Y[:5]) for _ in range(4))),
    "collate": lambda: DataLoader(
        ROWS, 5, collate_fn=lambda b: (torch.stack([x for x, _ in b]) * torch.rand(()), Y)
    ),
}


def states():
    return str(
        (torch.get_rng_state().tolist(), np.random.get_state(), random.getstate(), HELD.bit_generator.state)
    )


def check_random(make):
    source = make()
    own = getattr(source, "generator", None)
    before, of_own = states(), str(vars_of(own))
    first = draw(source, samples=20)
    assert states() == before and str(vars_of(own)) == of_own
    torch.rand(3), np.random.rand(3), random.random()
    again = draw(make(), samples=20)
    assert first.digest == again.digest
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first.batches, again.batches, strict=True))
    assert first.digest != draw(source, samples=20, seed=1).digest
    assert len(first.notes) == 1
    note = first.notes[0]
    assert "random" in note and "`seed" in note and not first.warnings


def vars_of(generator):
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else None


@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM)
def test_random_examples_are_seeded_said_and_leave_no_trace(make):
    check_random(make)


def test_a_larger_draw_reads_random_examples_alike():
    small, large = (seen(Of(flipped), samples=k, seed=4) for k in (6, 18))
    assert {tuple(row) for row in small.tolist()} <= {tuple(row) for row in large.tolist()}


def test_examples_that_cannot_be_seeded_are_a_warning():
    for make in (lambda: random.SystemRandom().random(), lambda: float(np.random.default_rng().normal())):
        drawn = draw(Of(lambda i, make=make: (X[i] + make(), Y[i])))
        assert "the same seed will not give the same numbers" in drawn.warnings[0]
        assert drawn.warnings[0] in measured(Of(lambda i, make=make: (X[i] + make(), Y[i]))).warnings


def test_the_random_state_is_put_back_after_a_failure():
    def fails(index):
        torch.rand(1), np.random.rand(), random.random()
        if index > 20:
            raise KeyboardInterrupt if index > 25 else ValueError
        return X[index], Y[index]

    for size in (23, N):
        before = states()
        with pytest.raises((ProblemError, KeyboardInterrupt)):
            draw(Subset(Of(fails), range(size - 3, size)))
        assert states() == before


def one_by_one(make):
    return [make(i) for i in range(N)]


EXAMPLES = {
    "labels as numbers": one_by_one(lambda i: (X[i], int(Y[i]))),
    "labels as tensors": one_by_one(lambda i: (X[i], Y[i])),
    "lists": one_by_one(lambda i: [X[i], Y[i]]),
    "arrays": one_by_one(lambda i: (X[i].numpy(), Y[i].numpy())),
    "a tuple of them": tuple(one_by_one(lambda i: (X[i], int(Y[i])))),
    "a stream of them": Stream(lambda: one_by_one(lambda i: (X[i], int(Y[i])))),
    "columns as arrays": (X.numpy(), Y.numpy()),
    "columns of another byte order": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "batches of arrays": [(X[a].numpy(), Y[a].numpy()) for a in torch.arange(N).split(7)],
    "batches without a list": Stream(lambda: zip(X.split(7), Y.split(7), strict=True)),
    "batches of a loader": DataLoader(
        Of(lambda i: (X[5 * i : 5 * i + 5], Y[5 * i : 5 * i + 5]), 6), batch_size=None
    ),
    "one by one of a loader": DataLoader(ROWS, batch_size=None, sampler=SubsetRandomSampler(range(N))),
    "a stream of batches in a loader": DataLoader(
        Stream(lambda: zip(X.split(7), Y.split(7), strict=True)), batch_size=None
    ),
}


@pytest.mark.parametrize("source", EXAMPLES.values(), ids=EXAMPLES)
def test_lists_arrays_and_streams_are_read_as_they_are_meant(source):
    check_measures(source, list(range(N)))


class ByName(nn.Module):
    """Takes its inputs by keyword, as transformers do."""

    def __init__(self):
        super().__init__()
        self.net = model()

    def forward(self, x):
        return self.net(x)


class Pair(ByName):
    def forward(self, x1, x2):
        return self.net(torch.cat([x1, x2], dim=1))


class PairInOne(Pair):
    def forward(self, x):
        return self.net(torch.cat(list(x), dim=1))


ROWS_BY_NAME = {
    "list of dicts": one_by_one(lambda i: {"x": X[i], "labels": int(Y[i])}),
    "rows of lists": one_by_one(lambda i: {"x": X[i].tolist(), "labels": int(Y[i])}),
    "a data set of lists": Of(lambda i: {"x": X[i].tolist(), "labels": int(Y[i])}),
    "columns by name": {"x": X, "labels": Y},
    "another mapping": UserDict(x=X, labels=Y),
    "batches of lists": [{"x": X[a].tolist(), "labels": Y[a].tolist()} for a in torch.arange(N).split(7)],
}
PAIRS = {
    "columns": ((X[:, :2], X[:, 2:]), Y),
    "a data set": Of(lambda i: ((X[i, :2], X[i, 2:]), Y[i])),
    "examples": one_by_one(lambda i: ((X[i, :2], X[i, 2:]), int(Y[i]))),
}


@pytest.mark.parametrize("source", ROWS_BY_NAME.values(), ids=ROWS_BY_NAME)
def test_rows_by_name(source):
    problem = hessdiag.Problem(ByName(), {"train": source}, criterion="cross_entropy")
    found = hessdiag.analyze(problem, quantities=["trace"], dtype="float64")
    assert found.metrics["trace"].value == pytest.approx(truth(list(range(N)))[0], rel=1e-5)


@pytest.mark.parametrize("net", [Pair, PairInOne])
@pytest.mark.parametrize("source", PAIRS.values(), ids=PAIRS)
def test_nested_inputs(source, net):
    problem = hessdiag.Problem(net(), {"train": source}, criterion="cross_entropy")
    found = hessdiag.analyze(problem, quantities=["trace"], dtype="float64")
    assert found.metrics["trace"].value == pytest.approx(truth(list(range(N)))[0], rel=1e-6)


def test_texts_are_divided_with_their_rows_and_named_when_the_model_does_not_take_them():
    rows = Of(lambda i: {"x": X[i].tolist(), "labels": int(Y[i]), "name": f"row {i}"})
    drawn = draw(rows, samples=9, batch_size=9)
    pieces = list(divide(drawn.batches[0], 4))
    assert [len(piece["name"]) for piece in pieces] == [4, 4, 1]
    assert [name for piece in pieces for name in piece["name"]] == drawn.batches[0]["name"]
    problem = hessdiag.Problem(ByName(), {"train": rows}, criterion="cross_entropy")
    with pytest.raises(ProblemError, match=r"text in name.*remove_columns"):
        preflight(problem, drawn)


UNCLEAR = {
    "vectors and vectors": (one_by_one(lambda i: (X[i], X[i])), r"examples or batches: give DataLoader\(data, "),
    "vectors alone": (one_by_one(lambda i: X[i]), "examples or batches"),
    "tensors of no common rows": ([(torch.ones(9, 2), torch.ones(4, 2))] * 3, "examples or batches"),
    "two tuples of columns": (((X, Y), (X, Y)), "columns or batches"),
    "columns in a list": ([X, Y], r"give a tuple \(inputs, targets\)"),
    "columns in a list, alike": ([X, X[:, :1]], r"give a tuple \(inputs, targets\)"),
    "a generator": ((b for b in zip(X.split(7), Y.split(7), strict=True)), "generator.*only once.*list"),
    "zip": (zip(X.split(7), Y.split(7), strict=True), "zip.*only once"),
    "rows of different lengths": (Of(lambda i: {"x": [1] * (i + 1), "labels": 1}), "collate_fn that pads"),
    "texts": (["a", "b"], "holds str: give a Dataset"),
    "a dict of other things": ({"x": 3}, "not all tensors: give a Dataset"),
    "no length": (type("NoLength", (Dataset,), {"__getitem__": lambda s, i: 1})(), "NoLength.*define __len__"),
    "a stream that fails": (Stream(lambda: (1 / 0 for _ in "a")), "raised ZeroDivisionError while it was read"),
}


@pytest.mark.parametrize(("source", "said"), UNCLEAR.values(), ids=UNCLEAR)
def test_what_could_mean_two_things_is_refused_with_the_line_to_type(source, said):
    with pytest.raises(ProblemError, match=said) as refusal:
        draw(source)
    assert "\n" not in str(refusal.value)


def test_what_is_read_only_once_behind_an_iterable_is_refused():
    batches = iter([(X, Y)])
    with pytest.raises(ProblemError, match="second reading"):
        draw(Stream(lambda: batches))


def test_workers_that_all_give_the_whole_stream_are_noted():
    stream = Stream(lambda: one_by_one(lambda i: (X[i], int(Y[i]))))
    assert "its workers give the same batches" in draw(DataLoader(stream, 4, num_workers=2)).notes[0]


def test_what_was_found_reaches_every_report():
    loader = DataLoader(Of(lambda i: flipped(i % N), 10 * N), 7, drop_last=True)
    splits = dict.fromkeys(("train", "test", "other"), loader)
    problem = hessdiag.Problem(model(), splits, criterion="cross_entropy")
    notes = draw(loader).notes
    assert len(notes) == 2
    assert set(notes) <= set(hessdiag.analyze(problem, quantities=["lambda_max"]).notes)
    assert set(notes) <= set(hessdiag.hessian(problem).notes)
    findings = preflight(problem, draw(loader)).findings  # the doctor's
    assert set(notes) <= {finding.text for finding in findings if finding.level == "note"}

    record = examine(problem, Examination(measures=("*norm*",), guard=False), About())
    assert {n.replace("train", split) for n in notes for split in splits} <= set(record.notes)
    curve = dict(shift_curves(problem, ShiftSettings(tests=("other",), other="other")))["other"]
    assert not isinstance(curve, Refused), curve
    assert set(notes) <= set(curve.notes)


BROKEN = {
    "the sampler is ignored": (
        (visited, "_of", lambda sampler, *_: visited.Visited(range(N), False)),
        lambda: check_sampler(*SAMPLERS["a random subset"]),
    ),
    "splits of one data set become one": (
        (visited, "_of", lambda sampler, *_: visited.Visited(range(N), False)),
        check_splits,
    ),
    "repetitions count once": (
        (visited, "_of_passes", lambda sampler, *_: visited.Visited(sorted(set(sampler)), True)),
        lambda: check_sampler(*SAMPLERS["repetitions"]),
    ),
    "drop_last is not seen": (
        (visited, "_without_last", lambda inner, *_: inner),
        lambda: check_sampler(*SAMPLERS["drop_last in order"]),
    ),
    "reading is not seeded": (
        (Generators, "seed", lambda *_: None),
        lambda: check_random(RANDOM["torch"]),
    ),
    "own generators are not found": (
        (randomness, "_held", lambda roots: []),
        lambda: check_random(RANDOM["its own of numpy"]),
    ),
    "random states are not put back": (
        (randomness, "_set", lambda *_: None),
        lambda: check_random(RANDOM["torch"]),
    ),
    "random examples are not said": (
        (examples.Reader, "findings", lambda *_: ((), ())),
        lambda: check_random(RANDOM["rare"]),
    ),
    "examples are taken as batches": (
        (streams, "reading_of", lambda *_: ("batches", "")),
        lambda: check_measures(one_by_one(lambda i: (X[i], int(Y[i]))), list(range(N))),
    ),
    "arrays stay arrays": (
        (reading, "map_leaves", lambda value, function, **_: value),
        lambda: check_measures(EXAMPLES["batches of arrays"], list(range(N))),
    ),
}


@pytest.mark.parametrize(("breakage", "check"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, check, monkeypatch):
    check()
    monkeypatch.setattr(*breakage)
    with pytest.raises((AssertionError, ProblemError)):
        check()
