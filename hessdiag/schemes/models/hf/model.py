"""``hf:DIR`` -> `NamedModel`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.criteria import target_of
from hessdiag.errors import UsageError
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows
from hessdiag.schemes.models.hf.images import processed
from hessdiag.schemes.models.hf.labels import MULTI, Labels
from hessdiag.schemes.models.hf.loss import differs, forward_of, own_loss, terms_of
from hessdiag.schemes.models.hf.place import CONFIG, Place, find, run_facts
from hessdiag.schemes.models.hf.quiet import quiet
from hessdiag.schemes.models.hf.tasks import Task, read_config
from hessdiag.schemes.models.hf.texts import Texts
from hessdiag.schemes.models.hf.tokenized import is_tokenized, padded
from hessdiag.schemes.models.hf.tokenizer import require_known, require_short
from hessdiag.schemes.models.hf.weights import ATTENTION, loaded, model_of
from hessdiag.schemes.recipe import Recipe

OPTIONS: Mapping[str, Any] = {"mask": 0.15, "seed": None}
"""Of a masked language model: the share of tokens to predict (Devlin et al. 2019), and the seed of their draw."""


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The model of a folder, with its weights, its preparation of data and its loss.

    Args:
        address: ``hf:DIR``, or ``hf:`` where the checkpoint is the folder.
        recipe: an adapter, and what is allowed.
        checkpoint: weights from elsewhere.

    Raises:
        HessdiagError: the folder is none, is damaged, or asks for what is not allowed; one line.
    """
    options = _options(address, recipe)
    place, trust = find(address, recipe, checkpoint), recipe.trust_remote_code
    with quiet():
        config, task, architecture = read_config(place.folder, trust_remote_code=trust)
        stored = getattr(config, "dtype", None)
        model = model_of(config, task, architecture=architecture, trust_remote_code=trust)
        model, weights, notes = loaded(model, config, place.weights, trust_pickle=recipe.trust_pickle)
        if place.adapter is not None:
            from hessdiag.schemes.models.hf.adapter import with_adapter

            resolved_base = [Resolved("base weights", weights.file, "as asked")]
            notes = [*weights.notes, *notes]
            model, weights, said = with_adapter(
                model, place.adapter, place.folder, trust_pickle=recipe.trust_pickle
            )
            notes += said
        else:
            resolved_base = []
    ready = _Ready(task, model, place, config, options, trust=trust)
    main = str(getattr(model, "main_input_name", "input_ids"))
    named = NamedModel(
        model=model,
        loaded=True,
        weights=weights,
        forward=forward_of(main, second=task.per_token),
        prepare=ready.prepare,
        notes=(*place.notes, *notes),
        resolved=(
            Resolved("architecture", f"{architecture}, {task.title}", str(place.folder / CONFIG)),
            *resolved_base,
            Resolved("dtype", _dtypes(model, stored), "float32 is measured"),
            Resolved("attention", ATTENTION, "default"),
        ),
        meta=run_facts(place.run),
    )
    return replace(named, settle=partial(_settled, named, ready, main, asked=recipe.loss is not None))


class _Ready:
    """Prepares the rows of every split alike."""

    def __init__(
        self, task: Task, model: nn.Module, place: Place, config: Any, options: Mapping[str, Any], *, trust: bool
    ) -> None:
        self.task, self.model, self.place, self.config = task, model, place, config
        self.options, self.trust = options, trust
        self.labels = Labels(config)
        self.notes: dict[str, None] = {}
        self._texts: Texts | None = None

    def prepare(self, rows: Rows) -> Any:
        """What `Problem.data` takes.

        Raises:
            HessdiagError: rows that are none of this model's.
        """
        if self.task.of_text and is_tokenized(rows):
            self.notes[f"{rows.text}: tokens as they lie there; padding does not count"] = None
            found = padded(rows, self.task, self.config, self.labels)
            require_known(int(found["input_ids"].max()), self.model, self.place.folder)
            require_short(found["input_ids"].shape[1], self.model, rows.text)
            return found
        if rows.kind in ("tensors", "ready"):
            return rows.rows
        if self.task.of_text != (rows.kind != "images"):
            kinds = "text:FILE, jsonl:FILE, csv:FILE, hf-disk:DIR" if self.task.of_text else "imagefolder:DIR"
            msg = f"{rows.text} holds {rows.kind}; {self.task.title} takes {kinds}"
            raise UsageError(msg)
        with quiet():
            if rows.kind == "images":
                data, note = processed(
                    rows, self.place.folder, self.config, self.labels, trust_remote_code=self.trust
                )
                self.notes[note] = None
                return data
            return self.texts.prepared(rows)

    @property
    def texts(self) -> Texts:
        """Reads the tokenizer once there is text."""
        if self._texts is None:
            self._texts = Texts(
                self.task,
                self.model,
                self.place.folder,
                self.labels,
                mask=self.options["mask"],
                seed=self.options["seed"],
                trust_remote_code=self.trust,
            )
        return self._texts

    def said(self) -> list[str]:
        """What is to know of the data."""
        return [*self.notes, *(self._texts.notes if self._texts else ()), *self.labels.notes]

    def resolved(self) -> list[Resolved]:
        """What was found out of the data."""
        if self._texts is None:
            return []
        one, most = self._texts.tokenizer, self._texts.most
        words = f"{type(one).__name__}, {len(one):,} tokens" + (f", at most {most} a text" if most else "")
        return [Resolved("tokenizer", words, str(self.place.folder))]


def _settled(named: NamedModel, ready: _Ready, main: str, data: Mapping[str, Any], *, asked: bool) -> NamedModel:
    """The model with the loss that is its own, once there are data; not looked at where another is asked for."""
    task, labels = ready.task, ready.labels
    kind = labels.kind
    if kind is None and not task.per_token and task.name != "causal_lm":
        kind = labels.kind = "single_label_classification"
    if hasattr(ready.config, "problem_type") and task.name in ("classification", "images"):
        ready.model.config.problem_type = kind  # type: ignore[union-attr]
    criterion, own = task.criterion(kind), own_loss(main, type(named.model).__name__)
    found = None if asked else differs(named.model, data, criterion, named.forward, own)
    notes = [*named.notes, *ready.said()]
    over = Resolved("mean over", task.terms(kind), type(named.model).__name__)
    resolved = (*named.resolved, *ready.resolved(), over)
    metric = _share_right if kind == MULTI else None
    if found is None:
        return replace(named, criterion=criterion, notes=tuple(notes), resolved=resolved, metric=metric)
    why = found if isinstance(found, str) else f"{found[0]:.6g} on the first examples, not {found[1]:.6g}"
    notes.append(
        f"the model's own loss is no plain {task.title} loss ({why}): it is taken as a function, weighted by its "
        "terms; there is no Gauss-Newton matrix"
    )
    return replace(named, loss=own, weight=terms_of(criterion), notes=tuple(notes), resolved=resolved)


def _share_right(outputs: Any, batch: Any) -> Tensor:
    """The share of labels that are right, of several per example."""
    right: Tensor = (outputs > 0) == (target_of(batch) > 0.5)
    return right.double().mean()


def _options(address: Address, recipe: Recipe) -> dict[str, Any]:
    found = replace(address, options={**address.options, **recipe.options}).take(OPTIONS)
    mask, seed = found["mask"], found["seed"]
    if not 0 < mask < 1 or not math.isfinite(mask):
        msg = f"{address.text}: mask={mask} must be a share of the tokens, mask=0.15 for example"
        raise UsageError(msg)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        msg = f"{address.text}: seed={seed} must be a whole number of at least 0"
        raise UsageError(msg)
    return {"mask": float(mask), "seed": seed or 0}


def _dtypes(model: nn.Module, stored: Any) -> str:
    own = next((p.dtype for p in model.parameters()), torch.float32)
    name = str(own).removeprefix("torch.")
    before = str(stored).removeprefix("torch.") if stored is not None else name
    return name if before == name else f"{name}, of weights in {before}"
