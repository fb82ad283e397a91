"""The schemes there are: hessdiag's own, and those of other packages by entry points. Needs no torch.

A package adds one in its pyproject.toml:

    [project.entry-points."hessdiag.models"]
    mylib = "mylib.hessdiag:model"    # model(place, checkpoint=None, **options) -> nn.Module or NamedModel

    [project.entry-points."hessdiag.data"]
    mylib = "mylib.hessdiag:data"     # data(place, **options) -> a data set, or several by split

    [project.entry-points."hessdiag.losses"]
    focal = "mylib.losses:focal"      # f(outputs, targets) -> mean loss
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from hessdiag.errors import UsageError, one_line

Kind = Literal["models", "data", "losses"]


@dataclass(frozen=True)
class Scheme:
    """A kind of models or data that has a name.

    Attributes:
        name: in front of the colon.
        example: as typed.
        about: one sentence.
        module: that builds or reads it; "" for one of another package.
        needs: the library it imports, "" where none.
        extra: of hessdiag that installs that library.
    """

    name: str
    example: str
    about: str
    module: str = ""
    needs: str = ""
    extra: str = ""
    entry: EntryPoint | None = None

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return not self.needs or find_spec(self.needs) is not None

    def load(self) -> ModuleType:
        """The scheme's module, once its library is there.

        Raises:
            UsageError: the library is not installed.
        """
        if self.needs:
            require(self.needs, self.extra, self.example)
        return import_module(self.module)


MODELS = (
    Scheme("hf", "hf:DIR", "A folder of Hugging Face.", "hessdiag.schemes.models.hf", "transformers", "hf"),
    Scheme("timm", "timm:NAME", "A model of timm.", "hessdiag.schemes.models.timm_models", "timm", "timm"),
    Scheme(
        "torchvision",
        "torchvision:NAME",
        "A model of torchvision.",
        "hessdiag.schemes.models.torchvision_models",
        "torchvision",
        "vision",
    ),
    Scheme(
        "lightning",
        "lightning:package.module:Class",
        "A LightningModule, with its hyper-parameters from the checkpoint.",
        "hessdiag.schemes.models.lightning_modules",
        "",
        "lightning",
    ),
)
DATA = (
    Scheme("digits", "digits:", "The embedded digits, 1 x 8 x 8.", "hessdiag.schemes.data.arrays"),
    Scheme("mnist", "mnist:DIR", "The four idx files of MNIST or its kin.", "hessdiag.schemes.data.arrays"),
    Scheme("npz", "npz:FILE?x=x&y=y", "Arrays of numpy.", "hessdiag.schemes.data.arrays"),
    Scheme("csv", "csv:FILE?target=y", "A table with a header.", "hessdiag.schemes.data.tables"),
    Scheme("jsonl", "jsonl:FILE?text=text&label=label", "A line of JSON each.", "hessdiag.schemes.data.tables"),
    Scheme("text", "text:FILE?block=128", "A text, in blocks of tokens.", "hessdiag.schemes.data.text"),
    Scheme("imagefolder", "imagefolder:DIR", "A folder of images per class.", "hessdiag.schemes.data.folders"),
    Scheme(
        "torchvision",
        "torchvision:CIFAR10?root=DIR",
        "A data set of torchvision.",
        "hessdiag.schemes.data.torchvision_data",
        "torchvision",
        "vision",
    ),
    Scheme("hf-disk", "hf-disk:DIR", "What datasets saved.", "hessdiag.schemes.data.disk", "datasets", "hf"),
)


def schemes(kind: Kind) -> Mapping[str, Scheme]:
    """Every scheme by name: hessdiag's own in their order, then those of other packages."""
    own = {"models": MODELS, "data": DATA, "losses": ()}[kind]
    found = {one.name: one for one in own}
    for entry in sorted(entry_points(group=f"hessdiag.{kind}"), key=lambda entry: (entry.name, entry.value)):
        if entry.name not in found:
            example = entry.name if kind == "losses" else f"{entry.name}:..."
            found[entry.name] = Scheme(entry.name, example, f"From {entry.value}.", entry=entry)
    return found


def examples(kind: Kind) -> dict[str, str]:
    """An example of each scheme, by name."""
    return {name: one.example for name, one in schemes(kind).items()}


def require(library: str, extra: str, asked: str) -> ModuleType:
    """A library that is not among hessdiag's own.

    Raises:
        UsageError: it is not installed, or does not import.
    """
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library.partition(".")[0]:
            raise _broken(library, asked, error) from error
        msg = f"{asked} needs {library}, which is not installed: pip install 'hessdiag[{extra}]'"
        raise UsageError(msg) from error
    except Exception as error:  # torchvision of another torch raises what it likes
        raise _broken(library, asked, error) from error


def _broken(library: str, asked: str, error: Exception) -> UsageError:
    why = f"{type(error).__name__}: {one_line(error, 120)}"
    msg = f"{asked} needs {library}, which does not import ({why}): install one that fits this torch"
    return UsageError(msg)


def plugin(scheme: Scheme) -> Any:
    """What another package registered.

    Raises:
        UsageError: it does not load.
    """
    assert scheme.entry is not None
    try:
        return scheme.entry.load()
    except Exception as error:  # a plugin's import can raise anything
        why = f"{type(error).__name__}: {one_line(error, 160)}"
        msg = f"{scheme.example} of {scheme.entry.value} does not load: {why}"
        raise UsageError(msg) from error
