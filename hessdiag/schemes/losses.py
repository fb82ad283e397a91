"""A loss by name: hessdiag's criteria, torch's losses with their options, or a function."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from hessdiag.criteria import CRITERIA, how_called, recognized
from hessdiag.errors import UsageError, one_line
from hessdiag.schemes.known import plugin, schemes

TORCH = tuple(f"{name}Loss" for name in ("CrossEntropy", "NLL", "MSE", "BCEWithLogits", "Huber", "SmoothL1", "L1"))


def loss_of(text: str, app_dir: str | None = None) -> Any:
    """The loss that a name stands for, as `Problem.criterion` takes it.

    Args:
        text: ``cross_entropy``, ``CrossEntropyLoss(label_smoothing=0.1)``, the name of another package's, or
            ``package.module:function`` with ``f(outputs, targets)``.
        app_dir: folder to import from.

    Raises:
        UsageError: it is none of these.
    """
    if text in CRITERIA:
        return text
    registered = schemes("losses")
    if text in registered:
        return plugin(registered[text])
    name = text.partition("(")[0].removeprefix("torch.").removeprefix("nn.")
    if name in TORCH:
        return _of_torch(name, text)
    if ":" in text:
        return _function(text, app_dir)
    names = ", ".join((*CRITERIA, *TORCH, *registered))
    msg = f"`loss={text!r}`: allowed: {names}, and package.module:function"
    raise UsageError(msg)


def _of_torch(name: str, text: str) -> nn.Module:
    """One of torch's losses; its options are literals, so that nothing of the text is run."""
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        given = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        found: nn.Module = getattr(nn, name)(**given)
    except Exception as error:
        example = "CrossEntropyLoss(label_smoothing=0.1)"
        msg = f"`loss={text!r}`: {one_line(error, 120)}; write its options by name, {example} for example"
        raise UsageError(msg) from error
    recognized(found)  # refuses what gives no scalar
    return found


def _function(text: str, app_dir: str | None) -> Any:
    from hessdiag.sources.factory import find_function

    found = find_function(text, app_dir)
    how_called(found)  # refuses what does not take two arguments
    return found
