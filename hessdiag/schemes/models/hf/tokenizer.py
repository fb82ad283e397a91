"""The tokenizer of a folder, and how long a text the model takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.known import require
from hessdiag.schemes.models.hf.place import read_json

FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tekken.json",
)
"""One of these holds the vocabulary."""
UNSET = 10**9  # a tokenizer without a longest length says 1e30


def read_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder.

    Raises:
        LoadError: there is none, it is damaged, or wants to run code.
    """
    there = [name for name in FILES if (folder / name).is_file()]
    if not there:
        msg = f"{folder} has no tokenizer ({FILES[0]}): save it there, tokenizer.save_pretrained('{folder}')"
        raise LoadError(msg)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings) and not trust_remote_code:
        msg = f"{settings} asks to run Python files of its folder (auto_map): read them, then "
        raise LoadError(msg + "`trust_remote_code=True`")
    auto = require("transformers", "hf", "hf:DIR").AutoTokenizer
    try:
        found = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library and its parsers raise what they like
        why = f"{type(error).__name__}: {one_line(error, 120)}"
        msg = f"{folder / there[0]} is not read as a tokenizer ({why}): save it again with save_pretrained"
        raise LoadError(msg) from error
    return found


def require_known(most: int, model: nn.Module, folder: Path) -> None:
    """Refuse tokens that the model has no embedding of.

    Args:
        most: the highest token there is.
        model: with the embedding.
        folder: for the message.

    Raises:
        LoadError: the tokenizer is of another model.
    """
    get: Any = getattr(model, "get_input_embeddings", None)
    rows = getattr(get() if get is not None else None, "num_embeddings", None)
    if rows is not None and most >= rows:
        msg = f"{folder}: its tokenizer gives token {most}, the model's embedding has {rows} rows: of another "
        raise LoadError(msg + "model? or save the model after resize_token_embeddings")


def longest(model: nn.Module, told: Any = None) -> int | None:
    """How many tokens the model takes; None where neither it nor its tokenizer (``told``) says so."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    places = getattr(text, "max_position_embeddings", None)
    known = [places] if isinstance(places, int) and places > 0 else []
    for name, module in model.named_modules():
        padded = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and padded is not None:
            known.append(module.num_embeddings - padded - 1)  # RoBERTa counts from behind its padding
    known += [told] if isinstance(told, int) and told < UNSET else []
    return min(known, default=None)


def require_short(length: int, model: nn.Module, text: str) -> None:
    """Refuse rows that are longer than the model takes.

    Raises:
        LoadError: they are; no tokenizer is there to cut them.
    """
    most = longest(model)
    if most is not None and length > most:
        msg = f"{text}: {length} tokens in a row, and the model takes {most} at most: cut them, truncation=True"
        raise LoadError(msg)
