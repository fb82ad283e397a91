"""States without names -> the model's parameters, where their order and shapes leave one way only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from hessdiag.errors import ProblemError

Shape = tuple[int, ...]

MOST_STATES = 20_000
"""Ways begun that are followed at a time. Groups with and without weight decay begin one; groups per layer of a
deep network begin more than can be counted, and are ambiguous anyway."""
WAY_OUT = (
    "give the optimizer itself, `optimizer=optimizer`, or make it of model.named_parameters(), whose names torch "
    "saves from version 2.6 on"
)


def by_order(groups: Sequence[Sequence[Shape | None]], named: Mapping[str, Tensor]) -> list[list[str]]:
    """Names for the entries of each group.

    Within a group parameters come in the model's order: so do ``model.parameters()``, and the lists with and
    without weight decay that Hugging Face's Trainer and timm make. Shapes alone tell which group one is in.

    Args:
        groups: shapes of each group's entries; None where nothing shows it.
        named: the model's parameters, frozen ones included.

    Raises:
        ProblemError: another number of parameters, or shapes that fit in no way, or in several.
    """
    count = sum(map(len, groups))
    trainable = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
    pool = named if count == len(named) else trainable
    if count != len(pool):
        msg = f"the optimizer's state is of {count} parameters, the model has {len(named)}, {len(trainable)} of "
        raise ProblemError(msg + "them trainable: it belongs to another model")
    names = list(pool)
    if len(groups) == 1:
        _require_same(groups[0], pool)
        return [names]
    ways, chosen = _interleaved(groups, [tuple(tensor.shape) for tensor in pool.values()])
    if ways != 1:
        why = "fit in no way" if ways == 0 else "fit in more than one way"
        msg = f"the optimizer's state has {len(groups)} groups without names, whose shapes {why}: {WAY_OUT}"
        raise ProblemError(msg)
    return [[name for name, of in zip(names, chosen, strict=True) if of == index] for index in range(len(groups))]


def _require_same(shapes: Sequence[Shape | None], pool: Mapping[str, Tensor]) -> None:
    for number, (shape, (name, tensor)) in enumerate(zip(shapes, pool.items(), strict=True)):
        if shape is not None and shape != tuple(tensor.shape):
            msg = f"entry {number} of the optimizer's state has shape {shape}, {name}, which comes there in the "
            raise ProblemError(msg + f"model, {tuple(tensor.shape)}: another model or another order; {WAY_OUT}")


def _interleaved(groups: Sequence[Sequence[Shape | None]], shapes: Sequence[Shape]) -> tuple[int, list[int]]:
    """In how many ways the groups interleave to these shapes (2 for more), and one: the group of each."""
    start = (0,) * len(groups)
    ways: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {start: (1, ())}
    for shape in shapes:
        after: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        for taken, (count, path) in ways.items():
            for index, group in enumerate(groups):
                if taken[index] == len(group) or group[taken[index]] not in (None, shape):
                    continue
                place = (*taken[:index], taken[index] + 1, *taken[index + 1 :])
                known = after.get(place, (0, ()))[0]
                after[place] = (min(count + known, 2), (*path, index))
        if len(after) > MOST_STATES:
            return 2, []
        ways = after
    count, path = ways.get(tuple(map(len, groups)), (0, ()))
    return count, [*path]
