"""What must agree before two measurements may be compared: each field once, with what its difference means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

MISSING = "not recorded"
Role = Literal["subject", "how", "identity"]


def _subject(cause: str) -> Any:
    """A field of the subject: where it differs, another matrix was measured.

    Args:
        cause: the likely cause of a difference, and the way out.
    """
    return field(default=None, metadata={"role": "subject", "cause": cause})


def _how() -> Any:
    """A field of how it was measured; it may differ. None is a value of some: not recorded is a text."""
    return field(default=MISSING, metadata={"role": "how"})


def _identity() -> Any:
    """A field of what a check is about; it is expected to differ."""
    return field(default=None, metadata={"role": "identity"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fingerprint(Mapping[str, Any]):
    """Subject, manner and weights of one measurement.

    It is a mapping of the fields that were recorded too: ``dict(fingerprint)`` is what files hold. A field at its
    default was not recorded: an earlier hessdiag did not know it.

    Attributes:
        samples: examples measured.
        available: examples there are; None where a stream does not say.
        split: of the data.
        data_sha256: of the examples.
        params_sha256: of names and sizes of the tensors that count.
        weights_sha256: of the parameters that count, in the precision measured.
        fixed_sha256: of all else in the model.
        n_params: parameters that count.
        tensors: of them.
        loss: how it is called.
        operator: "hessian" or "ggn".
        mode: of the model; always "eval".
        dtype: of the products.
        seed: of samples and probes.
        probes: asked for; None where an accuracy decided.
        probe_law: how probes are drawn.
        density_probes: asked for.
        steps: of the density; None where an accuracy decided.
        rtol: of the extremes.
        failure: probability that a certificate is wrong.
        confidence: of the intervals.
        checkpoint_sha256: of the file of weights.
        optimizer_sha256: of the preconditioner and its threshold, where its quantity was asked for.
        more: fields of a later hessdiag.
    """

    samples: int | None = _subject(
        "the data set grew or shrank, or `samples` differs: set samples under [tool.hessdiag.run]"
    )
    available: int | str | None = _how()
    split: str | None = _subject(
        "another part of the data: set split under [tool.hessdiag.run], or write the budget as metric[split]"
    )
    data_sha256: str | None = _subject(
        "other examples or transforms: pin the data file, `samples`, `seed` and evaluation transforms"
    )
    params_sha256: str | None = _subject(
        "tensors renamed, reordered, resized or chosen otherwise: restore the model or its params"
    )
    weights_sha256: str | None = _identity()
    fixed_sha256: str | None = _identity()
    n_params: int | None = _subject(
        "another model size, or other params: restore -P options, the model and its params globs"
    )
    tensors: int | None = _subject("layers were added, removed or frozen: restore the model and its params globs")
    loss: str | None = _subject("another criterion or reduction: restore the problem's criterion")
    operator: str | None = _subject(
        "the Hessian is not the Gauss-Newton matrix: set operator under [tool.hessdiag.run]"
    )
    mode: str | None = _subject(
        "training and evaluation mode are different functions: measure in the mode recorded"
    )
    dtype: str | None = _subject(
        "another precision: set dtype under [tool.hessdiag.run], or load the checkpoint in the one recorded"
    )
    seed: int | None = _subject("another seed draws other samples and probes: set seed under [tool.hessdiag.run]")
    probes: int | str | None = _how()
    probe_law: str = _how()
    density_probes: int | str | None = _how()
    steps: int | str | None = _how()
    rtol: float | str | None = _how()
    failure: float | str | None = _how()
    confidence: float | str = _how()
    checkpoint_sha256: str | None = _identity()
    optimizer_sha256: str | None = _identity()
    more: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Fingerprint:
        """The inverse of ``dict(fingerprint)``, of any version of hessdiag; values are taken as they are."""
        more = {name: value for name, value in recorded.items() if name not in DEFAULTS}
        return cls(more=more, **{name: value for name, value in recorded.items() if name in DEFAULTS})

    def __getitem__(self, name: str) -> Any:
        """A field that was recorded.

        Raises:
            KeyError: it was not.
        """
        if name not in DEFAULTS:
            return self.more[name]
        if (value := getattr(self, name)) == DEFAULTS[name]:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """The names of the fields that were recorded."""
        yield from (name for name, default in DEFAULTS.items() if getattr(self, name) != default)
        yield from self.more

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """In files it is a JSON object of any fields."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls.of, handler(dict[str, Any]))


def _of_role(role: Role) -> frozenset[str]:
    return frozenset(f.name for f in fields(Fingerprint) if f.metadata.get("role") == role)


DEFAULTS: Mapping[str, Any] = {f.name: f.default for f in fields(Fingerprint) if "role" in f.metadata}
"""Every field a hessdiag of this version records, with what it holds where it was not recorded."""
SUBJECT: Mapping[str, str] = {f.name: f.metadata["cause"] for f in fields(Fingerprint) if "cause" in f.metadata}
"""What must agree, with the likely cause and the way out where it does not."""
HOW = _of_role("how")
"""How it was measured; may differ."""
IDENTITY = _of_role("identity")
"""What a check is about; expected to differ."""
