"""``trust_pickle=True``: Python's own unpickler, for files of one's own making. Nothing else uses it."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import IO, Any

import torch

SCRIPTS = ("__main__", "__mp_main__")


def load(stream: IO[bytes], *, of_torch: bool, main: ModuleType | None) -> Any:
    """Unpickle with everything the pickle asks for.

    Args:
        stream: the file.
        of_torch: whether torch.save wrote it.
        main: where classes of the script that saved the file are looked for; there they belonged to ``__main__``.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            script = sys.modules["__main__"]
            if module in SCRIPTS and main is not None and not hasattr(script, name.partition(".")[0]):
                found: Any = main
                for part in name.split("."):
                    found = getattr(found, part, None)
                if found is not None:
                    return found
            return super().find_class(module, name)

    if not of_torch:
        return Unpickler(stream).load()
    source = ModuleType("hessdiag_trusted_pickle")
    vars(source).update(Unpickler=Unpickler, load=lambda file, **given: Unpickler(file, **given).load())
    return torch.load(stream, map_location="cpu", weights_only=False, mmap=False, pickle_module=source)
