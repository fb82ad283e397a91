"""Rows that a tokenizer has been over already, padded to one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX
from hessdiag.errors import LoadError
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.models.hf.labels import Labels
from hessdiag.schemes.models.hf.tasks import Task

IDS, MASK, KINDS = "input_ids", "attention_mask", "token_type_ids"
TARGETS = ("labels", "label")


def is_tokenized(rows: Rows) -> bool:
    """Whether the rows are mappings with lists of tokens."""
    source = rows.rows
    if rows.kind != "ready" or isinstance(source, Mapping) or not hasattr(source, "__getitem__"):
        return False
    first = source[0] if len(source) else None
    return isinstance(first, Mapping) and isinstance(first.get(IDS), list)


def padded(rows: Rows, task: Task, config: Any, labels: Labels) -> dict[str, Tensor]:
    """The columns of a split. Padding has attention 0, and does not count.

    Args:
        rows: mappings with "input_ids" and, unless each token is its own target, "labels" or "label".
        task: what the model is for.
        config: of the model; its padding token.
        labels: of a classifier.

    Raises:
        LoadError: no labels, or labels that are none of the model's.
    """
    records = [rows.rows[place] for place in range(len(rows.rows))]
    most = max(len(one[IDS]) for one in records)

    def column(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[*one, *[fill] * (most - len(one))] for one in lists])

    padding = getattr(config, "pad_token_id", None)
    found = {IDS: column([one[IDS] for one in records], padding or 0)}
    found[MASK] = column([one.get(MASK) or [1] * len(one[IDS]) for one in records], 0)
    if KINDS in records[0]:
        found[KINDS] = column([one[KINDS] for one in records], 0)
    name = next((name for name in TARGETS if name in records[0]), None)
    if name is None and task.name == "causal_lm":
        found["labels"] = found[IDS].masked_fill(found[MASK] == 0, IGNORE_INDEX)
    elif name is None:
        msg = f"{rows.text}: {task.title} needs a column 'labels' beside {IDS!r}"
        raise LoadError(msg)
    elif task.per_token or task.name == "causal_lm":
        found["labels"] = column([one[name] for one in records], IGNORE_INDEX)
    else:
        found["labels"] = labels.targets([one[name] for one in records], rows.classes, rows.text)
    return found
