"""A problem by name, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hessdiag.problem import Problem
from hessdiag.schemes.assemble import build
from hessdiag.schemes.recipe import Recipe


def load(
    model: str,
    data: str | Sequence[str] | None = None,
    *,
    checkpoint: str | Path | None = None,
    loss: str | None = None,
    options: Mapping[str, Any] | None = None,
    adapter: str | Path | None = None,
    use_ema: bool = False,
    app_dir: str | Path | None = None,
    trust_pickle: bool = False,
    allow_download: bool = False,
    trust_remote_code: bool = False,
) -> Problem:
    """The `Problem` that names stand for, as the command line takes them.

    Args:
        model: ``hf:DIR``, ``timm:NAME``, ``torchvision:NAME``, ``lightning:package.module:Class``, or a factory:
            ``path/file.py:function``. ``hessdiag ls models`` lists them.
        data: ``text:FILE``, ``imagefolder:DIR``, ``csv:FILE`` ... (``hessdiag ls data``); or one of each split,
            ``["train=csv:a.csv", "test=csv:b.csv"]``. By default the model's own, where it has some.
        checkpoint: weights, as ``-c`` takes them: file, folder, ``file::entry``.
        loss: ``"cross_entropy"``, ``"HuberLoss(delta=2)"``, ``"package.module:function"``; by default the
            model's own.
        options: keyword arguments of the model or the factory.
        adapter: folder of an adapter of PEFT: the Hessian is over its parameters, on the frozen model.
        use_ema: take the averaged weights of a checkpoint.
        app_dir: folder to import modules from.
        trust_pickle: let the checkpoint run code. Only for files of one's own making.
        allow_download: let a library fetch what is not on this machine.
        trust_remote_code: let a folder of Hugging Face run its own Python files.

    Returns:
        The problem, ready for `hessdiag.analyze`. Nothing is measured: no products.

    Raises:
        UsageError: a name that is none, or a library that is not installed.
        LoadError: files are missing or damaged, or weights do not fit.
        ProblemError: the library or the user's code raised.

    >>> import hessdiag
    >>> hessdiag.load("hessdiag.sources.digits:problem")
    <Problem of Sequential, 3,466 parameters: cross_entropy/mean on train, test>
    """
    recipe = Recipe.of(
        model,
        data=data,
        loss=loss,
        options=options,
        adapter=None if adapter is None else str(adapter),
        use_ema=use_ema,
        app_dir=None if app_dir is None else str(app_dir),
        trust_pickle=trust_pickle,
        allow_download=allow_download,
        trust_remote_code=trust_remote_code,
    )
    return build(recipe, None if checkpoint is None else str(checkpoint)).problem
