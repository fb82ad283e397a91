"""Texts and records as tensors: blocks of tokens, or one example per record."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessdiag.criteria import IGNORE_INDEX
from hessdiag.errors import LoadError, UsageError
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.models.hf.labels import Labels, of_words
from hessdiag.schemes.models.hf.tasks import Task
from hessdiag.schemes.models.hf.tokenizer import longest, read_tokenizer, require_known

BLOCK = 128  # tokens
KEPT, RANDOM = 0.1, 0.1  # of the chosen tokens, as BERT was trained (Devlin et al. 2019, section 3.1)


class Texts:
    """Makes the tensors of a split, and remembers what is to be told.

    Attributes:
        notes: one-line facts for the user.
        labels: of a classifier.
        tokenizer: of the folder.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        folder: Path,
        labels: Labels,
        *,
        mask: float,
        seed: int,
        trust_remote_code: bool,
    ) -> None:
        self.task, self.model, self.folder, self.labels = task, model, folder, labels
        self.mask, self.seed = mask, seed
        self.notes: dict[str, None] = {}
        self.tokenizer = read_tokenizer(folder, trust_remote_code=trust_remote_code)
        self.most = longest(model, self.tokenizer.model_max_length)
        self._set_padding()

    def prepared(self, rows: Rows) -> dict[str, Tensor]:
        """The columns of a split.

        Raises:
            LoadError: too little text, or labels that are none of the model's.
            UsageError: rows of another kind, or lengths that the model does not take.
        """
        found = self._blocks(rows) if rows.kind == "text" else self._records(rows)
        require_known(int(found["input_ids"].max()), self.model, self.folder)
        if self.task.name == "masked_lm":
            self._mask(found)
        return found

    def _blocks(self, rows: Rows) -> dict[str, Tensor]:
        if self.task.name not in ("causal_lm", "masked_lm"):
            msg = f"{rows.text}: {self.task.title} needs labels: give jsonl:FILE?text=...&label=..., or csv:FILE"
            raise UsageError(msg)
        before, after = self._around() if self.task.name == "masked_lm" else ([], [])
        block = self._length(rows, "block", BLOCK)
        inner = block - len(before) - len(after)
        if inner < 1:
            msg = f"{rows.text}: a block of {block} has no room beside {len(before) + len(after)} special tokens"
            raise UsageError(msg)
        tokens = [self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in rows.rows]
        joined = np.concatenate([np.asarray(one, np.int64) for one in tokens])
        count = len(joined) // inner
        if count == 0:
            most = block - inner + len(joined)
            msg = f"{rows.text} has {len(joined)} tokens; a block needs {inner}: give a longer text, "
            raise LoadError(msg + f"or ?block={most}")
        left = len(joined) - count * inner
        self.notes[f"{rows.text}: {count:,} blocks of {block} tokens; the last {left} tokens are left out"] = None
        ids = torch.from_numpy(joined[: count * inner].reshape(count, inner))
        edges = [torch.tensor(edge, dtype=torch.int64).expand(count, -1) for edge in (before, after)]
        ids = torch.cat([edges[0], ids, edges[1]], 1)
        found = {"input_ids": ids, "labels": ids.clone()}
        if self.task.name == "masked_lm":
            found["special"] = torch.zeros_like(ids, dtype=torch.bool)
            found["special"][:, : len(before)] = True
            found["special"][:, ids.shape[1] - len(after) :] = True
        return found

    def _records(self, rows: Rows) -> dict[str, Tensor]:
        records = [rows.rows[place] for place in range(len(rows.rows))]
        if not records:
            msg = f"{rows.text} has no rows"
            raise LoadError(msg)
        words = isinstance(records[0]["text"], list)
        if self.task.name == "tokens" and not words:
            msg = f"{rows.text}: token classification needs a list of words and a list of labels in every record"
            raise UsageError(msg)
        if words and not self.tokenizer.is_fast:
            msg = f"{self.folder}: lists of words need its tokenizer.json: save it with save_pretrained"
            raise LoadError(msg)
        encoded = self._encoded(records, rows, words=words)
        kept = ("input_ids", "attention_mask", "token_type_ids")
        found = {name: torch.tensor(encoded[name]) for name in kept if name in encoded}
        if self.task.name == "causal_lm":
            found["labels"] = found["input_ids"].masked_fill(found["attention_mask"] == 0, IGNORE_INDEX)
        elif self.task.name == "masked_lm":
            found["special"] = torch.tensor(encoded["special_tokens_mask"]) > 0
        elif self.task.name == "tokens":
            found["labels"] = self._tags(records, encoded, rows)
        else:
            found["labels"] = self.labels.targets(_labels(records, rows), rows.classes, rows.text)
        return found

    def _encoded(self, records: Sequence[Any], rows: Rows, *, words: bool) -> Any:
        texts, pairs = [one["text"] for one in records], [one.get("text_pair") for one in records]
        if not all(texts):
            place = next(place for place, one in enumerate(texts) if not one)
            msg = f"{rows.text}: row {place + 1} has no text: leave it out"
            raise LoadError(msg)
        most = self._length(rows, "max_length", self.most)
        how: dict[str, Any] = {"is_split_into_words": words, "return_special_tokens_mask": True, "verbose": False}
        how["return_attention_mask"] = True
        given = (texts, pairs) if pairs[0] is not None else (texts,)
        whole = self.tokenizer(*given, **how)
        lengths = [len(one) for one in whole["input_ids"]]
        if self.tokenizer.pad_token_id is None and len(set(lengths)) > 1:
            msg = f"{self.folder}: its tokenizer has no padding token, and texts have several lengths: set it, "
            raise LoadError(msg + "tokenizer.pad_token = tokenizer.eos_token say, and save it again")
        cut = 0 if most is None else sum(length > most for length in lengths)
        if cut:
            self.notes[f"{rows.text}: {cut} of {len(lengths)} texts are cut to {most} tokens"] = None
        longest_one = min(max(lengths), most or max(lengths))
        if len(set(lengths)) > 1:
            self.notes[f"{rows.text}: padded to {longest_one} tokens; padding does not count"] = None
        padding = "longest" if self.tokenizer.pad_token_id is not None else False
        how |= {"padding": padding, "truncation": bool(cut), "max_length": most if cut else None}
        return self.tokenizer(*given, **how)

    def _tags(self, records: Sequence[Any], encoded: Any, rows: Rows) -> Tensor:
        index = self.labels.lookup(rows.classes, rows.text)
        found = []
        for place, (record, tags) in enumerate(zip(records, _labels(records, rows), strict=True)):
            if not isinstance(tags, list) or len(tags) != len(record["text"]):
                msg = f"{rows.text}: row {place + 1} has {len(record['text'])} words: as many labels are needed"
                raise LoadError(msg)
            found.append(of_words(encoded.word_ids(place), [index(tag) for tag in tags]))
        self.notes["of each word its first token counts"] = None
        return torch.tensor(found)

    def _mask(self, found: dict[str, Tensor]) -> None:
        """Choose tokens to be predicted, replace most of them, and let the others not count."""
        ids, special = found["input_ids"].clone(), found.pop("special")
        if "attention_mask" in found:
            special = special | (found["attention_mask"] == 0)
        own = self.tokenizer.mask_token_id
        if own is None:
            msg = f"{self.folder}: its tokenizer has no mask token: it is not of a masked language model"
            raise LoadError(msg)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, (tokens, out) in enumerate(zip(ids.numpy(), special.numpy(), strict=True)):
            places = np.flatnonzero(~out)
            if not len(places):
                continue
            # by the content: the same text is masked alike wherever it stands
            rng = np.random.default_rng([self.seed, zlib.crc32(tokens.tobytes())])
            chosen = places[rng.random(len(places)) < self.mask]
            chosen = chosen if len(chosen) else places[rng.integers(len(places), size=1)]
            labels[row, chosen] = ids[row, chosen]
            draw = rng.random(len(chosen))
            others = rng.integers(len(self.tokenizer), size=len(chosen))
            kept = np.where(draw < KEPT, tokens[chosen], own)
            tokens[chosen] = np.where(draw > 1 - RANDOM, others, kept)  # writes into ids
        found["input_ids"], found["labels"] = ids, labels
        self.notes[f"{self.mask:.0%} of the tokens are masked, by seed {self.seed} and the text"] = None

    def _around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        one = self.tokenizer("a", return_special_tokens_mask=True)
        ids, special = one["input_ids"], one["special_tokens_mask"]
        inside = [place for place, flag in enumerate(special) if not flag]
        return ids[: inside[0]], ids[inside[-1] + 1 :]

    def _length(self, rows: Rows, name: str, default: int | None) -> Any:
        asked = rows.options.get(name)
        if asked is not None and self.most is not None and asked > self.most:
            msg = f"{rows.text}: {name}={asked}, and the model takes {self.most} tokens at most"
            raise UsageError(msg)
        if asked is not None:
            return asked
        return default if default is None or self.most is None else min(default, self.most)

    def _set_padding(self) -> None:
        """A model that looks for the last token of a text must know the padding."""
        config: Any = self.model.config
        padding = self.tokenizer.pad_token_id
        if self.task.name != "classification" or getattr(config, "pad_token_id", None) is not None:
            return
        if padding is not None:
            config.pad_token_id = padding
            self.notes["config.json names no padding token: the tokenizer's"] = None


def _labels(records: Sequence[Any], rows: Rows) -> list[Any]:
    lacking = next((place for place, one in enumerate(records) if one.get("label") is None), None)
    if lacking is not None:
        msg = f"{rows.text}: row {lacking + 1} has no label: name its column, label=NAME"
        raise LoadError(msg)
    return [one["label"] for one in records]
