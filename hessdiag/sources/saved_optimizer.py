"""The optimizer's state that a checkpoint holds beside the weights, read when somebody asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError
from hessdiag.shown import listed
from hessdiag.sources import archive
from hessdiag.sources.facts import OPTIMIZERS
from hessdiag.sources.shards import FOLDERS
from hessdiag.sources.spec import readable, split_key

BESIDE = ("optimizer.pt", "optimizer.bin")
"""Files of the state beside a folder's weights: of transformers' Trainer, and of Accelerate."""
UNREAD = ("safetensors", "index")
"""Formats that hold tensors by name and nothing else."""


@dataclass(frozen=True)
class SavedOptimizer:
    """The state in a checkpoint; it takes the place of the optimizer itself, as ``Problem(optimizer=...)``.

    Attributes:
        checkpoint: file, folder, or ``file::entry``, as ``-c`` takes it.
        trust_pickle: let the file run code. Only for files of one's own making.
    """

    checkpoint: str
    trust_pickle: bool = False

    def state_dict(self) -> Mapping[str, Any]:
        """What ``optimizer.state_dict()`` gave.

        Looked for as an entry of the file called as in `OPTIMIZERS`; of a folder of Hugging Face in `BESIDE` it.

        Raises:
            LoadError: there is none, or several, or the file cannot be read.
        """
        path = Path(split_key(self.checkpoint)[0])
        file = archive.locate(path)
        if archive.sniff(file) not in UNREAD:
            content = self._read(file)
            if (found := _entry(content, file)) is not None:
                return found
        else:
            content = {}
        folder = path if path.is_dir() else file.parent if file.name in FOLDERS else None
        beside = [folder / name for name in BESIDE if (folder / name).is_file()] if folder else []
        if beside:
            content = self._read(beside[0])
            if _is_state(content):
                return dict(content)
        held = (
            listed(sorted(map(str, content)), 6) if isinstance(content, Mapping) and content else "weights alone"
        )
        msg = f"{file} holds no optimizer's state (it holds {held}): save it as the entry 'optimizer', "
        raise LoadError(
            msg + 'torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, ...)'
        )

    def _read(self, file: Path) -> Any:
        with readable(file):
            return archive.read_object(file, trust_pickle=self.trust_pickle)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _entry(content: Any, file: Path) -> Mapping[str, Any] | None:
    if not isinstance(content, Mapping):
        return None
    found = [(name, content[name]) for name in OPTIMIZERS if name in content]
    states = [(name, one) for name, value in found for one in (value if isinstance(value, list) else [value])]
    states = [(name, one) for name, one in states if _is_state(one)]
    if len(states) > 1:
        msg = f"{file} holds the states of {len(states)} optimizers ({listed([name for name, _ in states], 3)}): "
        raise LoadError(msg + "give the one of this model in the factory, Problem(optimizer=...)")
    return states[0][1] if states else None
