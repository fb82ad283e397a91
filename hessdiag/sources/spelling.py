"""How a checkpoint writes the names of a model: wrappers, prefixes, adapters, and tensors that are no weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hessdiag.errors import LoadError
from hessdiag.sources.adapters import onto_adapter
from hessdiag.sources.extra import is_nothing
from hessdiag.sources.renamed import renamed

COUNTER = "num_batches_tracked"  # plays no part in evaluation
LIGHTNING = "model."  # where a LightningModule usually keeps its network
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Components that torch.compile, FSDP and activation checkpointing put into names, also in their middle."""
LEFTOVERS = ("total_ops", "total_params", "masked_bias")
"""What counting operations left in a state dict; the constant of a mask in older files of Hugging Face."""
SHOWN = 5


@dataclass(frozen=True)
class Spelling:
    """One way of writing a checkpoint's names.

    Attributes:
        names: the tensors under these names.
        notes: what was changed or left out.
        partial: whether the model keeps the tensors that are not among them.
    """

    names: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    partial: bool = False


class Speller:
    """Finds the way of writing a checkpoint's names under which it is the model's, whole."""

    def __init__(self, model: nn.Module, target: Mapping[str, Tensor]) -> None:
        self._model = model
        self._target = target
        self._own = dict(model.named_buffers(remove_duplicate=False))
        self._ignored = _declared(model)

    def find(self, state: Mapping[str, Tensor], stripped: tuple[str, ...], spec: str) -> Spelling:
        """The first spelling that fits; the names as they are if none does.

        Args:
            state: name to tensor.
            stripped: prefixes already removed from the names, outermost first.
            spec: the checkpoint as ``-c`` takes it.

        Raises:
            LoadError: several prefixes hold every name of the model.
        """
        found = self._as_written(state, stripped, spec)
        if found is None:
            for names, note in renamed(self._model, self._target, state):
                found = self._as_written(names, stripped, spec)
                if found is not None:
                    return replace(found, notes=(note, *found.notes))
        return found or self._without_spare(Spelling(dict(state)))

    def _as_written(self, state: Mapping[str, Tensor], stripped: tuple[str, ...], spec: str) -> Spelling | None:
        for spelling in self._whole(state, stripped):
            if self._holds_all(spelling.names):
                return spelling
        found = onto_adapter(self._model, self._target, state)
        if found is not None:
            return Spelling(found[0], (found[1],), partial=True)
        return self._under_prefix(state, stripped, spec)

    def missing(self, names: Mapping[str, Tensor]) -> list[str]:
        """Names of the model that are neither there, nor counters, nor nothing, nor tied to one that is there."""
        held = {id(self._target[name]) for name in names if name in self._target}
        return [
            name
            for name, tensor in self._target.items()
            if not (name in names or is_counter(name) or is_nothing(tensor) or id(tensor) in held)
        ]

    def differs(self, name: str) -> bool:
        """Whether the model has a tensor of this name that it makes by itself."""
        return name in self._own and name not in self._target

    def prefixes(self, state: Mapping[str, Tensor]) -> list[str]:
        """The prefixes, not empty, under which a checkpoint has every name of the model."""
        wanted = [name for name in self._target if not is_counter(name)]
        times = Counter(id(self._target[name]) for name in wanted)
        anchors = [name for name in wanted if times[id(self._target[name])] == 1][:1] or wanted
        found = dict.fromkeys(
            name.removesuffix(anchor) for anchor in anchors for name in state if name.endswith("." + anchor)
        )
        return [prefix for prefix in found if not self.missing(_under(prefix, state))]

    def _whole(self, state: Mapping[str, Tensor], stripped: tuple[str, ...]) -> Iterator[Spelling]:
        yield self._without_spare(Spelling(dict(state)))
        for count in range(1, len(stripped) + 1):
            prefix = "".join(stripped[-count:])
            names = {prefix + name: tensor for name, tensor in state.items()}
            yield self._without_spare(Spelling(names, (f"put back {prefix!r}: the model has it",)))
        bare = {_bare(name): name for name in self._target}
        names = {bare.get(_bare(name), _bare(name)): tensor for name, tensor in state.items()}
        if len(bare) == len(self._target) and len(names) == len(state):
            yield self._without_spare(Spelling(names, ("left _orig_mod and the like out of the names",)))
        if all(name.startswith(LIGHTNING) for name in state):
            shorter = {_bare(name.removeprefix(LIGHTNING)): tensor for name, tensor in state.items()}
            if len(shorter) == len(state):
                note = f"stripped Lightning's {LIGHTNING!r} from {len(state)} names"
                yield self._without_spare(Spelling(shorter, (note,)))

    def _under_prefix(self, state: Mapping[str, Tensor], stripped: tuple[str, ...], spec: str) -> Spelling | None:
        fitting: dict[str, Spelling] = {}
        for prefix in self.prefixes(state):
            inside = _under(prefix, state)
            left = [name for name in state if not name.startswith(prefix)]
            outside = f"; left out {_some(left)}" if left else ""
            note = f"took the {len(inside)} names that begin with {prefix!r}{outside}"
            spelling = self._without_spare(Spelling(inside, (note,)))
            if self._holds_all(spelling.names) and not self.misshapen(spelling.names):
                fitting[prefix] = spelling
        if len(fitting) < 2:
            return next(iter(fitting.values()), None)
        whole = [f"{''.join(stripped)}{prefix}" for prefix in fitting]
        msg = f"{spec}: which weights? names that begin with {_some(whole)} fit: choose with -c {spec}::{whole[0]}"
        raise LoadError(msg)

    def misshapen(self, names: Mapping[str, Tensor]) -> list[str]:
        """Names whose tensors have other shapes than the model's."""
        wanted = self._target
        return [
            n
            for n, t in names.items()
            if n in wanted
            and not is_lazy(wanted[n])
            and t.shape != wanted[n].shape
            and not is_scalar(t, wanted[n])
        ]

    def _holds_all(self, names: Mapping[str, Tensor]) -> bool:
        return all(name in self._target for name in names) and not self.missing(names)

    def _without_spare(self, spelling: Spelling) -> Spelling:
        """Without tensors that the model makes by itself, and those it declares to ignore."""
        names = spelling.names
        spare = dict.fromkeys(
            name for name in names if name not in self._target and self._is_spare(name, spelling)
        )
        if not spare:
            return spelling
        names = {name: tensor for name, tensor in names.items() if name not in spare}
        note = f"left out what the model makes by itself or does not use: {_some(list(spare))}"
        return Spelling(names, (*spelling.notes, note))

    def _is_spare(self, name: str, spelling: Spelling) -> bool:
        if name.rpartition(".")[2] in LEFTOVERS or is_nothing(spelling.names[name]):
            return True
        if any(name.startswith(prefix) and p.search(name.removeprefix(prefix)) for prefix, p in self._ignored):
            return True
        return name in self._own and _equal(spelling.names[name], self._own[name])


def is_scalar(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether it is one number in a list, as torch before 0.4 wrote what is a number without dimensions today."""
    return tensor.shape == (1,) and wanted.dim() == 0


def is_counter(name: str) -> bool:
    """Whether it counts the batches a BatchNorm has seen."""
    return name.rpartition(".")[2] == COUNTER


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _declared(model: nn.Module) -> list[tuple[str, re.Pattern[str]]]:
    """The names that a model of Hugging Face declares to ignore: where it hangs, and a pattern."""
    found = []
    for where, module in model.named_modules():
        patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None)
        if isinstance(patterns, list | tuple | set):
            texts = [pattern for pattern in patterns if isinstance(pattern, str)]
            found += [(f"{where}." if where else "", re.compile(text)) for text in texts]
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal to the rounding of the coarser."""
    if one.shape != other.shape or other.is_meta:
        return False
    rounding = max((torch.finfo(t.dtype).eps for t in (one, other) if t.is_floating_point()), default=0.0)
    return bool(torch.allclose(one.double().cpu(), other.detach().double().cpu(), rtol=2 * rounding, atol=0.0))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
