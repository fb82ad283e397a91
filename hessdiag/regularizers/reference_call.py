"""The call of the widely used reference implementation of SAM, understood beside our own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.optim import Optimizer

from hessdiag.errors import UsageError, one_line
from hessdiag.regularizers.wrapper import Regularizer

_OWN = {name for name, p in inspect.signature(Regularizer.__init__).parameters.items() if p.kind is p.KEYWORD_ONLY}


def two_calls(init: Callable[..., None]) -> Callable[..., None]:
    """Lets a constructor ``(self, optimizer, rho, ...)`` also take ``(params, SGD, rho, adaptive, lr=0.1, ...)``.

    Keywords that are neither the constructor's nor `Regularizer`'s go to the inner optimizer's class.
    """
    known = {"rho", "adaptive", *inspect.signature(init).parameters, *_OWN}

    @wraps(init)
    def either(self: Any, optimizer: Any = None, *settings: Any, **options: Any) -> None:
        kind = options.pop("base_optimizer", None)
        if kind is None and settings and isinstance(settings[0], type) and issubclass(settings[0], Optimizer):
            kind, *rest = settings
            settings = tuple(rest)
        params = options.pop("params", optimizer)
        if kind is None:
            init(self, params, *settings, **options)
            return
        if not isinstance(kind, type) or isinstance(optimizer, Optimizer | type):
            call = f"{type(self).__name__}(params, torch.optim.SGD, rho=0.05, lr=0.1)"
            msg = f"{call} takes parameters and a class; or wrap an optimizer: {self.example()}"
            raise UsageError(msg)
        options |= dict(zip(("rho", "adaptive"), settings, strict=False))
        inner = {name: options.pop(name) for name in list(options) if name not in known}
        try:
            made = kind(params, **inner)
        except (TypeError, ValueError) as error:
            msg = f"{type(self).__name__}: {kind.__name__} refuses its settings: {one_line(error, 160)}"
            raise UsageError(msg) from error
        init(self, made, **options)

    return either
