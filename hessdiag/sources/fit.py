"""Whether named tensors fit a model: all checks before anything is copied, and the likely cause if not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessdiag.errors import LoadError, MisfitError, NonFiniteError
from hessdiag.sources.adapters import ADVICE, is_adapter
from hessdiag.sources.extra import carried, is_extra
from hessdiag.sources.spelling import COUNTER, Speller, is_counter, is_scalar

SHOWN = 10  # differing names in one message


@dataclass(frozen=True)
class Fit:
    """Tensors ready for ``load_state_dict``, in the model's names and dtypes."""

    state: dict[str, Tensor]
    notes: tuple[str, ...]


def fit(
    model: nn.Module,
    state: Mapping[str, Tensor],
    stripped: tuple[str, ...] = (),
    file: str = "",
    spec: str = "",
) -> Fit:
    """Match a checkpoint's tensors to a model's, strictly.

    Tensors beside the one prefix that holds every name of the model are left out, and so are those that the model
    makes by itself. An adapter file is matched to the model's adapter alone.

    Args:
        model: the target; only looked at.
        state: name to tensor.
        stripped: prefixes already removed from the names, outermost first; put back if the model has them.
        file: for messages.
        spec: the checkpoint as ``-c`` takes it, by default the file.

    Raises:
        LoadError: anything missing, unexpected, of another shape or kind; or several prefixes that fit.
        NonFiniteError: a value overflows in the model's smaller dtype.
    """
    held = model.state_dict(keep_vars=True)
    target = {name: carried(item) if is_extra(name) else item for name, item in held.items()}
    if any(tensor.is_meta for tensor in target.values() if isinstance(tensor, Tensor)):
        msg = "the model is on the meta device and can hold no weights: build it on the CPU"
        raise LoadError(msg)
    speller = Speller(model, target)
    spelling = speller.find(state, stripped, spec or file)
    names, notes = spelling.names, list(spelling.notes)
    missing = [] if spelling.partial else _missing(target, names, speller, notes)
    unexpected, shapes = [name for name in names if name not in target], speller.misshapen(names)
    if missing or unexpected or shapes:
        cause = _cause(target, names, missing, shapes, unexpected, speller)
        raise MisfitError(_mismatch(file, target, names, missing, unexpected, shapes, cause))
    prepared = {name: _cast(name, tensor, target[name], file) for name, tensor in names.items()}
    _refuse_untied(target, prepared, file)
    casts = [name for name in names if prepared[name].dtype != names[name].dtype]
    if casts:
        first = casts[0]
        change = f"{_dtype(names[first].dtype)} to {_dtype(prepared[first].dtype)}"
        notes.append(f"cast {len(casts)} tensors to the model's dtype, {first} from {change}")
    return Fit(prepared, tuple(notes))


def _missing(
    target: Mapping[str, Tensor], names: Mapping[str, Tensor], speller: Speller, notes: list[str]
) -> list[str]:
    missing = speller.missing(names)
    counters = [name for name in target if name not in names and is_counter(name)]
    if counters:
        notes.append(f"the checkpoint has no {COUNTER} ({len(counters)} of them): not used in evaluation")
    known = {*names, *missing, *counters, *(name for name in target if is_extra(name))}
    tied = [name for name in target if name not in known]
    if tied:
        notes.append(f"tied, so loaded under another name: {', '.join(tied[:3])}")
    return missing


def _refuse_untied(target: Mapping[str, Tensor], prepared: Mapping[str, Tensor], file: str) -> None:
    """Of two values for one tensor, the last would stay: another function than either model's."""
    first: dict[int, str] = {}
    for name, tensor in prepared.items():
        other = first.setdefault(id(target[name]), name)
        if other != name and not torch.equal(prepared[other], tensor):
            msg = (
                f"{file}: {other} and {name} are one tensor in the model, and two of different values in the "
                "checkpoint: build the model without tying them"
            )
            raise LoadError(msg)


def _cast(name: str, tensor: Tensor, wanted: Tensor, file: str) -> Tensor:
    if is_extra(name):
        return tensor
    if tensor.is_floating_point() != wanted.is_floating_point() or tensor.is_complex() != wanted.is_complex():
        kinds = f"{_dtype(tensor.dtype)} in the checkpoint, {_dtype(wanted.dtype)} in the model"
        msg = f"{file}: {name} is {kinds}: a quantized or converted checkpoint? give the original weights"
        raise LoadError(msg)
    cast = tensor.reshape(()).to(wanted.dtype) if is_scalar(tensor, wanted) else tensor.to(wanted.dtype)
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
    cause: str,
) -> str:
    matched = len(names) - len(unexpected) - len(shapes)
    parts = [f"{file} does not fit the model: {matched} of {len(target)} tensors matched"]
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
    target: Mapping[str, Tensor],
    names: Mapping[str, Tensor],
    missing: list[str],
    shapes: list[str],
    unexpected: list[str],
    speller: Speller,
) -> str:
    if is_adapter(unexpected) and len(unexpected) == len(names):
        return ADVICE
    if missing and all(map(is_extra, missing)) and not shapes and not unexpected:
        return (
            "its modules keep more than tensors (get_extra_state), which torch.save(model.state_dict(), ...) "
            "writes: save it so, or load the file yourself in the factory, def problem(checkpoint)"
        )
    inside = speller.prefixes(names)
    if inside:
        return f"its names begin with {inside[0]!r}, but more or other tensors lie there than in the model"
    outside = _common_prefix(names, target)
    if outside:
        return f"the model's names begin with {outside!r}: hand over that part of the model"
    if len(unexpected) == len(names):
        return "the checkpoint belongs to another architecture"
    own = next((name for name in unexpected if speller.differs(name)), "")
    if own:
        return f"the model makes {own} by itself, of other values than the checkpoint's: another configuration?"
    if not missing and not shapes:
        return (
            "the model lacks what it has: build the larger model; if you know it plays no part, load it yourself "
            "in the factory, def problem(checkpoint)"
        )
    classes = {(names[n].shape[0], target[n].shape[0]) for n in shapes if names[n].dim() and target[n].dim()}
    alike = all(names[n].shape[1:] == target[n].shape[1:] for n in shapes)
    if len(classes) == 1 and alike and not missing:
        theirs, ours = classes.pop()
        return f"another number of classes? build the model with {theirs} in place of {ours} (factory option, -P)"
    return ""


def _common_prefix(short: Mapping[str, Tensor], long: Mapping[str, Tensor]) -> str:
    """The prefix under which ``long`` has every name of ``short`` (counters aside), or ''."""
    wanted = [name for name in short if not is_counter(name)]
    for name in long:
        prefix = name.removesuffix(wanted[0]) if wanted else ""
        if prefix and prefix != name and prefix.endswith(".") and all(prefix + n in long for n in wanted):
            return prefix
    return ""
