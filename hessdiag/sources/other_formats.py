"""Files that are no checkpoints of torch: what they are, and how their weights become one."""

from __future__ import annotations

from collections.abc import Iterable

ALLOWED = "allowed: .safetensors files and what torch.save writes"
PACKED = "compressed: unpack it first"
ELSEWHERE = "load it with the library it belongs to, and save model.state_dict() of the torch model"
NUMPY = (
    "an archive of numpy: safetensors.torch.save_file({k: torch.tensor(v) for k, v in numpy.load(FILE).items()}, "
    '"weights.safetensors")'
)
HEADS = (
    ((b"version https://",), "a Git LFS pointer, not the checkpoint itself: git lfs pull"),
    ((b"\x1f\x8b", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!"), PACKED),
    ((b"\x89HDF",), f"an HDF5 file, as Keras writes: {ELSEWHERE}"),
    ((b"GGUF",), f"a GGUF file of llama.cpp: {ELSEWHERE}"),
    ((b"\x93NUMPY",), f"one array of numpy, without names: {ELSEWHERE}"),
    ((b"<!DOCTYPE", b"<!doctype", b"<html", b"<HTML"), "a web page, not the checkpoint itself: download the file"),
    ((b"\xef\xbb\xbf",), "not a checkpoint: it begins with the mark of a text file; copy it again, as binary"),
)


def is_known(head: bytes) -> bool:
    """Whether a file with these first bytes is of a format that has a name here."""
    return any(head.startswith(heads) for heads, _ in HEADS)


def other_format(head: bytes) -> str:
    """What a file with these first bytes is, and the way out."""
    return next((words for heads, words in HEADS if head.startswith(heads)), f"not a checkpoint: {ALLOWED}")


def other_archive(names: Iterable[str]) -> str:
    """What a zip archive of these files is, and the way out."""
    names = list(names)
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    inside = _some(names)
    return f"a zip archive but not a checkpoint: it must be what torch.save writes; unpack one in it ({inside})"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "") or "it is empty"
