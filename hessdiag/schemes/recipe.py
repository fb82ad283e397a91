"""How a problem is made: by a factory, or of a model, data and a loss by name. Needs no torch to check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError, UsageError
from hessdiag.hashing import of_file
from hessdiag.schemes.address import Address, parse_address, split_of
from hessdiag.schemes.known import examples
from hessdiag.sources.spec import exists, pathless, split_key, split_spec

BY_NAME = ("data", "loss", "adapter", "use_ema", "allow_download", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but the checkpoint that decides which problem is measured; picklable, so that processes share it.

    Attributes:
        factory: ``path/file.py:function`` or ``package.module:function``; None where ``model`` is given.
        model: ``hf:DIR``, ``timm:NAME`` ... instead of a factory.
        data: ``csv:FILE``, or ``train=csv:FILE`` and ``test=csv:FILE``; of a named model only.
        loss: a criterion's name, one of torch's losses with its options, or
            ``package.module:function``; by default the model's own.
        options: keyword arguments of the factory, or of the model.
        adapter: folder of an adapter (PEFT); the Hessian is over its parameters, on the frozen base.
        use_ema: take the averaged weights of a checkpoint that has them.
        root: folder that relative places are looked for in first; by default the current one alone.
        app_dir: folder to import from, by default the current one.
        trust_pickle: let the checkpoint run code.
        allow_download: let a library fetch what is not on this machine.
        trust_remote_code: let a folder of Hugging Face run its own Python files.
    """

    factory: str | None = None
    model: str | None = None
    data: tuple[str, ...] = ()
    loss: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    use_ema: bool = False
    root: str | None = None
    app_dir: str | None = None
    trust_pickle: bool = False
    allow_download: bool = False
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str, *, data: str | Sequence[str] | None = None, **fields: Any) -> Recipe:
        """The recipe of a factory or a model, whichever the name is.

        Args:
            name: ``path/file.py:function``, ``package.module:function``, or ``hf:DIR`` and its kin.
            data: one address, or one of each split.
            **fields: the other fields; None is not given.
        """
        scheme, colon, _ = name.partition(":")
        which = "model" if (colon or data) and scheme in examples("models") else "factory"
        several = (data,) if isinstance(data, str) else tuple(data or ())
        given = {key: value for key, value in fields.items() if value is not None}
        given[which] = name
        return cls(data=several, **given)

    def __str__(self) -> str:
        """The factory, or the model and its data."""
        if self.factory is not None:
            return self.factory
        return f"{self.model} on {', '.join(self.data)}" if self.data else str(self.model)

    @property
    def name(self) -> str:
        """What a result without a checkpoint is called."""
        return self.factory or str(self.model)

    @property
    def names_nothing(self) -> bool:
        """Whether neither a factory nor a model is given."""
        return self.factory is None and self.model is None

    def keys(self) -> dict[str, Any]:
        """What a configuration says of it: the fields that are not at their defaults, the factory as "problem"."""
        values = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "root"}
        given = {name: list(value) if name == "data" else value for name, value in values.items() if value}
        return {"problem" if name == "factory" else name: value for name, value in given.items()}

    def identity(self) -> str:
        """What a kept result depends on besides the checkpoint, the samples and the model's code: JSON text.

        Files and folders stand there by their own names: the way to them, as the current folder, is another on
        every machine. What is in them shows in the samples and in the code.
        """
        from hessdiag.sources.code import source_of

        named = {name: pathless(value) for name, value in self.keys().items() if name != "app_dir"}
        if self.model is not None:
            named["model"] = _named(self.model_address)
            named["data"] = {str(split): _named(one) for split, one in self.data_addresses.items()}
        where = (self.factory or self.model_address.place).rpartition(":")[0]
        file = source_of(where, self.app_dir) if where else None
        return json.dumps([named, of_file(file) if file else ""], sort_keys=True, default=str)

    @property
    def model_address(self) -> Address:
        """The parts of the model's name.

        Raises:
            UsageError: it is none.
        """
        address = parse_address(self.model or "", "model", examples("models"))
        return replace(address, place=self.found(address.place))

    @property
    def data_addresses(self) -> dict[str | None, Address]:
        """The parts of the data's names, by split; None where none is named.

        Raises:
            UsageError: one is none, or two are of one split.
        """
        known, found = examples("data"), dict[str | None, Address]()
        for text in self.data:
            split, address = split_of(text)
            if split in found:
                which = f"two are for {split!r}" if split else "two name no split"
                msg = f"`data={text!r}`: {which}; write train={address} and test=..."
                raise UsageError(msg)
            parsed = parse_address(address, "data", known)
            found[split] = replace(parsed, place=self.found(parsed.place))
        return found

    def found(self, place: str) -> str:
        """A relative file or folder under ``root`` where it lies there, ``file.py:Class`` too; else as it is."""
        file, colon, name = place.rpartition(":")
        if colon and file.endswith(".py"):
            return f"{self.found(file)}:{name}"
        under = str(Path(self.root or "", place))
        return under if self.root and place and exists(under) else place

    def check(self, checkpoint: str | None = None) -> None:
        """Refuse what can be refused without torch.

        Raises:
            UsageError: neither or both of factory and model, options of the other, or names that are none.
            LoadError: no such checkpoint.
        """
        self.check_names()
        if self.app_dir is not None and not Path(self.app_dir).is_dir():
            msg = f"`app_dir={self.app_dir!r}`: no such folder; give the one your module lies in"
            raise UsageError(msg)
        where = split_spec(self.factory)[0] if self.factory else ""
        if where.endswith(".py") and not Path(where).is_file():
            msg = f"no such file {where}: FACTORY is path/file.py:function or package.module:function"
            raise UsageError(msg)
        if self.adapter is not None and not exists(self.found(self.adapter)):
            msg = f"`adapter={self.adapter!r}`: no such folder; give what PEFT saved"
            raise LoadError(msg)
        if checkpoint is not None and not exists(split_key(checkpoint)[0]):
            msg = f"no such checkpoint {checkpoint}: give an existing file with -c"
            raise LoadError(msg)

    def check_names(self) -> None:
        """Refuse names that are none, wherever they lie.

        Raises:
            UsageError: neither or both of factory and model, or options of the other.
        """
        if (self.factory is None) == (self.model is None):
            given = f"both FACTORY {self.factory} and `model={self.model!r}`" if self.factory else "no problem"
            msg = f"{given}: give FACTORY, path/file.py:function; or a model's name, `model='hf:DIR'`, with `data`"
            raise UsageError(msg)
        if self.factory is not None:
            self._check_factory(self.factory)
        else:
            _ = self.model_address, self.data_addresses

    def _check_factory(self, factory: str) -> None:
        scheme = factory.partition(":")[0]
        if scheme in examples("models") and not exists(f"{scheme}.py") and not exists(scheme):
            msg = f"FACTORY {factory} names a model: give it as `model={factory!r}`, with `data`"
            raise UsageError(msg)
        for name in BY_NAME:
            if value := getattr(self, name):
                value = value[0] if name == "data" else value
                msg = f"`{name}={value!r}` goes with `model`; the factory {factory} says it itself"
                raise UsageError(msg)
        if ":" not in factory and factory.isidentifier():
            msg = f"FACTORY {factory}: allowed: path/file.py:function, package.module:function; or name a model, "
            raise UsageError(
                msg + f"`model={'timm:' + factory!r}`: allowed: {', '.join(examples('models').values())}"
            )
        split_spec(factory)


def _named(address: Address) -> list[Any]:
    return [address.scheme, pathless(address.place), pathless(address.options)]
