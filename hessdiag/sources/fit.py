"""Whether named tensors fit a model: all checks before anything is copied, and the likely cause if not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessdiag.errors import LoadError, NonFiniteError

SHOWN = 10  # differing names in one message
COUNTER = "num_batches_tracked"  # plays no part in evaluation
LIGHTNING = "model."  # where a LightningModule usually keeps its network
COMPILED = "_orig_mod."  # torch.compile, also around the network inside a LightningModule


@dataclass(frozen=True)
class Fit:
    """Tensors ready for ``load_state_dict``, in the model's names and dtypes."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]


def fit(model: nn.Module, state: Mapping[str, Tensor], stripped: tuple[str, ...] = (), file: str = "") -> Fit:
    """Match a checkpoint's tensors to a model's, strictly.

    Args:
        model: the target; only looked at.
        state: name to tensor.
        stripped: prefixes already removed from the names, outermost first; put back if the model has them.
        file: for messages.

    Raises:
        LoadError: anything missing, unexpected, of another shape or kind.
        NonFiniteError: a value overflows in the model's smaller dtype.
    """
    target = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in target.values() if isinstance(tensor, Tensor)):
        msg = "the model is on the meta device and can hold no weights: build it on the CPU"
        raise LoadError(msg)
    names, note = _renamed(target, state, stripped)
    notes = [note] if note else []
    missing, unexpected = _missing(target, names, notes), [name for name in names if name not in target]
    shapes = [name for name, tensor in names.items() if name in target and _misshapen(tensor, target[name])]
    if missing or unexpected or shapes:
        raise LoadError(_mismatch(file, target, names, missing, unexpected, shapes))
    prepared = {name: _cast(name, tensor, target[name], file) for name, tensor in names.items()}
    casts = [name for name in names if prepared[name].dtype != names[name].dtype]
    if casts:
        first = casts[0]
        change = f"{_dtype(names[first].dtype)} to {_dtype(prepared[first].dtype)}"
        notes.append(f"cast {len(casts)} tensors to the model's dtype, {first} from {change}")
    return Fit(prepared, tuple(notes))


def _renamed(
    target: Mapping[str, Tensor], state: Mapping[str, Tensor], stripped: tuple[str, ...]
) -> tuple[dict[str, Tensor], str]:
    """The first way of writing the names that fits the model; the names as they are if none does."""
    for names, note in _spellings(state, stripped):
        lacking = [n for n in target if n not in names and not _tolerated(n, target, names)]
        if not lacking and all(name in target for name in names):
            return names, note
    return dict(state), ""


def _spellings(state: Mapping[str, Tensor], stripped: tuple[str, ...]) -> Iterator[tuple[dict[str, Tensor], str]]:
    yield dict(state), ""
    for count in range(1, len(stripped) + 1):
        prefix = "".join(stripped[-count:])
        yield {prefix + name: tensor for name, tensor in state.items()}, f"put back {prefix!r}: the model has it"
    for prefix in (LIGHTNING, LIGHTNING + COMPILED):
        if all(name.startswith(prefix) for name in state):
            shorter = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
            yield shorter, f"stripped Lightning's {prefix!r} from {len(state)} names"


def _tolerated(name: str, target: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> bool:
    counter = name.rpartition(".")[2] == COUNTER
    return counter or any(target[other] is target[name] for other in names if other in target)


def _missing(target: Mapping[str, Tensor], names: Mapping[str, Tensor], notes: list[str]) -> list[str]:
    absent = [name for name in target if name not in names]
    missing = [name for name in absent if not _tolerated(name, target, names)]
    counters = [name for name in absent if name.rpartition(".")[2] == COUNTER]
    if counters:
        notes.append(f"the checkpoint has no {COUNTER} ({len(counters)} of them): not used in evaluation")
    tied = [name for name in absent if name not in missing and name not in counters]
    if tied:
        notes.append(f"tied, so loaded under another name: {', '.join(tied[:3])}")
    return missing


def _misshapen(tensor: Tensor, wanted: Tensor) -> bool:
    return not is_lazy(wanted) and tensor.shape != wanted.shape


def _cast(name: str, tensor: Tensor, wanted: Tensor, file: str) -> Tensor:
    if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex() != wanted.is_complex():
        kinds = f"{_dtype(tensor.dtype)} in the checkpoint, {_dtype(wanted.dtype)} in the model"
        msg = f"{file}: {name} is {kinds}: a quantized or converted checkpoint? give the original weights"
        raise LoadError(msg)
    cast = tensor.to(wanted.dtype)
    if cast.is_floating_point() and cast.element_size() < tensor.element_size() and not cast.isfinite().all():
        small, wide = _dtype(cast.dtype), _dtype(tensor.dtype)
        msg = f"{file}: {name} overflows in the model's {small}: build the model in {wide}"
        raise NonFiniteError(msg)
    return cast


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mismatch(
    file: str,
    target: Mapping[str, Tensor],
    names: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    matched = len(names) - len(unexpected) - len(shapes)
    parts = [f"{file} does not fit the model: {matched} of {len(target)} tensors matched"]
    cause = _cause(target, names, missing, shapes, matched)
    if cause:
        parts.append(cause)
    left = SHOWN
    for label, group in (("shapes differ", shapes), ("missing", missing), ("unexpected", unexpected)):
        shown = group[:left]
        left -= len(shown)
        if shown:
            words = [_shapes(n, target, names) if group is shapes else n for n in shown]
            more = f" and {len(group) - len(shown)} more" if len(group) > len(shown) else ""
            parts.append(f"{label}: {', '.join(words)}{more}")
    return "; ".join(parts)


def _shapes(name: str, target: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> str:
    return f"{name} {tuple(names[name].shape)} in the checkpoint, {tuple(target[name].shape)} in the model"


def _cause(
    target: Mapping[str, Tensor], names: Mapping[str, Tensor], missing: list[str], shapes: list[str], matched: int
) -> str:
    inside = _common_prefix(target, names)
    if inside:
        rest = len(names) - len(target)
        others = f", beside {rest} others" if rest else ""
        return f"its names begin with {inside!r}{others}: take the checkpoint in your factory and remove that"
    outside = _common_prefix(names, target)
    if outside:
        return f"the model's names begin with {outside!r}: hand over that part of the model"
    if matched == 0:
        return "the checkpoint belongs to another architecture"
    classes = {(names[n].shape[0], target[n].shape[0]) for n in shapes if names[n].dim() and target[n].dim()}
    alike = all(names[n].shape[1:] == target[n].shape[1:] for n in shapes)
    if len(classes) == 1 and alike and not missing:
        theirs, ours = classes.pop()
        return f"another number of classes? build the model with {theirs} in place of {ours} (factory option, -P)"
    return ""


def _common_prefix(short: Mapping[str, Tensor], long: Mapping[str, Tensor]) -> str:
    """The prefix under which ``long`` has every name of ``short`` (counters aside), or ''."""
    wanted = [name for name in short if name.rpartition(".")[2] != COUNTER]
    for name in long:
        prefix = name.removesuffix(wanted[0]) if wanted else ""
        if prefix and prefix != name and prefix.endswith(".") and all(prefix + n in long for n in wanted):
            return prefix
    return ""
