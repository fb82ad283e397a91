"""What ``torch.save`` writes, in its two formats: a zip archive of records, and before torch 1.6 a stream.

Both are a pickle, in which tensors are views of storages, and the bytes of those storages. All that the file says
of its own sizes and checksums is checked.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.sources.pickled import Reader
from hessdiag.sources.stand_ins import Foreign
from hessdiag.sources.storages import persistent

LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
LEGACY_HEAD = 3  # pickles before the content: magic number, protocol, system
CHUNK = 1 << 24
INFLATION = 100  # times the size of the file; what torch writes is not compressed


class ForeignNamesError(Exception):
    """The pickle asks for names that are in no table; ``names`` are these, ``content`` what it is without them."""

    def __init__(self, names: tuple[str, ...], content: Any = None) -> None:
        super().__init__(", ".join(names))
        self.names = names
        self.content = content


def read_zip(path: Path) -> Any:
    """The content of a zip archive of ``torch.save``, each of its records held against its checksum.

    Raises:
        ForeignNamesError: it could run code.
        Exception: it is damaged; `zipfile` raises of many kinds.
    """
    with zipfile.ZipFile(path) as archive:
        records = _records(archive, path.stat().st_size)
        top = next(name for name in records if name.rpartition("/")[2] == "data.pkl").removesuffix("data.pkl")
        order = _bytes(archive, records.get(f"{top}byteorder"))
        storages: dict[str, Tensor] = {}

        def content(key: str, size: int, dtype: torch.dtype) -> Tensor:
            record = records.get(f"{top}data/{key}")
            if record is None or record.file_size != size:
                msg = "a storage of another size than its record"
                raise UnpicklingError(msg)
            if key not in storages:
                storages[key] = _storage(
                    archive, record, dtype, swapped=order not in (b"", sys.byteorder.encode())
                )
            return storages[key]

        found = _load(io.BytesIO(_bytes(archive, records[f"{top}data.pkl"])), content)
        read = {f"{top}data/{key}" for key in storages}
        _read_through(archive, [record for name, record in records.items() if name not in read])
    return found


def check_zip(path: Path) -> None:
    """Hold every record of a zip archive against its checksum.

    Raises:
        Exception: it is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        _read_through(archive, list(_records(archive, path.stat().st_size).values()))


def read_legacy(path: Path) -> Any:
    """The content of a file of ``torch.save`` before 1.6.

    Raises:
        ForeignNamesError: it could run code.
        Exception: it is damaged.
    """
    with path.open("rb") as stream:
        for _ in range(LEGACY_HEAD):
            Reader(stream, _no_storage).load()
        begin = stream.tell()
        sizes: dict[str, tuple[int, torch.dtype]] = {}

        def empty(key: str, size: int, dtype: torch.dtype) -> Tensor:
            if sizes.setdefault(key, (size, dtype))[0] != size:
                msg = "a storage of two sizes"
                raise UnpicklingError(msg)
            return torch.empty(size, dtype=torch.uint8, device="meta")

        # the storages come behind the pickle that says what they are: it is read twice
        _load(stream, empty)
        keys = Reader(stream, _no_storage).load()
        if not isinstance(keys, list) or len(keys) != len(set(keys)) or set(map(str, keys)) != set(sizes):
            msg = "other storages than its tensors need"
            raise UnpicklingError(msg)
        left = path.stat().st_size - stream.tell()
        storages = {}
        for key in map(str, keys):
            size, dtype = sizes[key]
            head = stream.read(8)
            left -= 8 + size
            if left < 0 or struct.unpack("<q", head)[0] * dtype.itemsize != size:
                msg = "a storage of another size than its tensors need"
                raise UnpicklingError(msg)
            storages[key] = _filled(stream, size)
        stream.seek(begin)
        return _load(stream, lambda key, _size, _dtype: storages[key])


def _load(stream: IO[bytes], content: Callable[[str, int, torch.dtype], Tensor]) -> Any:
    reader = Reader(stream, lambda identity: persistent(identity, content))
    try:
        found = reader.load()
    except UnpicklingError:
        if reader.foreign:
            raise ForeignNamesError(tuple(reader.foreign)) from None
        raise
    if reader.foreign:
        raise ForeignNamesError(tuple(reader.foreign), found)
    return found


def _no_storage(_: Any) -> Foreign:
    msg = "a storage before the content"
    raise UnpicklingError(msg)


def _records(archive: zipfile.ZipFile, size: int) -> Mapping[str, zipfile.ZipInfo]:
    records = {record.filename: record for record in archive.infolist()}
    names = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    whole = sum(record.file_size for record in archive.infolist())
    packed = sum(record.compress_size for record in archive.infolist())
    if len(records) != len(archive.infolist()) or len(names) != 1 or packed > size or whole > INFLATION * size:
        msg = "its list of records is not one that torch writes"
        raise UnpicklingError(msg)
    if not any(record.CRC for record in records.values()):  # torch.serialization.set_crc32_options(False)
        for record in records.values():
            record.CRC = None  # type: ignore[assignment]  # zipfile's own way of not comparing
    return records


def _bytes(archive: zipfile.ZipFile, record: zipfile.ZipInfo | None) -> bytes:
    return b"" if record is None else archive.read(record)


def _storage(archive: zipfile.ZipFile, record: zipfile.ZipInfo, dtype: torch.dtype, *, swapped: bool) -> Tensor:
    with archive.open(record) as stream:
        content = _filled(stream, record.file_size)
    part = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    return content.view(-1, part).flip(1).reshape(-1) if swapped else content


def _filled(stream: IO[bytes], size: int) -> Tensor:
    content = torch.empty(size, dtype=torch.uint8)
    view, done = content.numpy(), 0
    while done < size:
        chunk = stream.read(min(CHUNK, size - done))
        if not chunk:
            msg = "fewer bytes than it says"
            raise UnpicklingError(msg)
        view[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
        done += len(chunk)
    return content


def _read_through(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo]) -> None:
    for record in records:
        with archive.open(record) as stream:
            while stream.read(CHUNK):
                pass
