"""What a model of Hugging Face is for, by its architecture: which inputs, which loss, over how many terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.known import require
from hessdiag.schemes.models.hf.place import CONFIG, read_json

ELEMENTWISE = ("regression", "multi_label_classification")
Name = Literal["causal_lm", "masked_lm", "classification", "tokens", "images"]


@dataclass(frozen=True)
class Task:
    """One kind of model.

    Attributes:
        name: short.
        title: in a sentence.
        auto: the library's class that builds them.
        names: the library's table of their classes by ``model_type``.
    """

    name: Name
    title: str
    auto: str
    names: str

    @property
    def per_token(self) -> bool:
        """Whether every token has a target of its own, at its own place."""
        return self.name in ("masked_lm", "tokens")

    @property
    def of_text(self) -> bool:
        """Whether its inputs come from a tokenizer."""
        return self.name != "images"

    def criterion(self, problem_type: str | None) -> Any:
        """The loss as the library defines it for this task, with its denominator.

        Args:
            problem_type: of a classifier, as config.json spells it.
        """
        if self.name == "causal_lm":
            return "causal_lm"
        if self.per_token:
            return nn.CrossEntropyLoss()  # classes second: as many tokens as classes could be read two ways
        if problem_type not in ELEMENTWISE:
            return "cross_entropy"
        return "mse" if problem_type == "regression" else nn.BCEWithLogitsLoss()

    def terms(self, problem_type: str | None) -> str:
        """What the mean of that loss is over, in words."""
        if self.name == "causal_lm":
            return "the tokens but the first of every text, padding aside"
        if self.name == "masked_lm":
            return "the masked tokens"
        if self.name == "tokens":
            return "the first tokens of all words"
        return "all outputs of all examples" if problem_type in ELEMENTWISE else "the examples"


TASKS = (
    Task("causal_lm", "causal language model", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    Task("masked_lm", "masked language model", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    Task(
        "classification",
        "sequence classification",
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "tokens",
        "token classification",
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    Task(
        "images",
        "image classification",
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    ),
)
WAY_OUT = "write a FACTORY for it, path/file.py:function"


def read_config(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Task, str]:
    """The configuration of a folder, the task of its architecture, and that architecture.

    Raises:
        LoadError: it wants to run code, is quantized, names no architecture or one that is not known, or the
            library does not read it.
    """
    file = folder / CONFIG
    plain = read_json(file)
    if "auto_map" in plain and not trust_remote_code:
        msg = f"{file} asks to run Python files of its folder (auto_map): read them, then `trust_remote_code=True`"
        raise LoadError(msg)
    if plain.get("quantization_config"):
        msg = f"{file}: quantized weights have no Hessian: give the folder of the model before quantization"
        raise LoadError(msg)
    named = plain.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(one, str) for one in named):
        msg = f'{file} names no architectures: add the class that wrote it, "architectures": ["GPT2LMHeadModel"]'
        raise LoadError(msg)
    if "model_type" not in plain and "auto_map" not in plain:
        msg = f'{file} has no model_type: add it, "model_type": "gpt2" for example'
        raise LoadError(msg)
    task = _task(plain, named[0], file)
    library = require("transformers", "hf", "hf:DIR")
    try:
        config = library.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        msg = f"{file} is not read by transformers ({type(error).__name__}: {one_line(error, 120)}): {WAY_OUT}"
        raise LoadError(msg) from error
    return config, task, named[0]


def _task(plain: Mapping[str, Any], architecture: str, file: Path) -> Task:
    tables = require("transformers.models.auto.modeling_auto", "hf", "hf:DIR")
    kind, own, elsewhere = plain.get("model_type"), plain.get("auto_map"), False
    for task in TASKS:
        if isinstance(own, Mapping) and str(own.get(task.auto)).rpartition(".")[2] == architecture:
            return task
        for model_type, names in getattr(tables, task.names).items():
            if architecture in ((names,) if isinstance(names, str) else names):
                if model_type == kind:
                    return task
                elsewhere = True
    if elsewhere:
        msg = f"{file}: model_type {kind!r} has no class {architecture}: the file of another model?"
        raise LoadError(msg)
    titles = ", ".join(task.title for task in TASKS)
    msg = f"{file}: {architecture} is not among the models with a name; allowed: {titles}; {WAY_OUT}"
    raise LoadError(msg)
