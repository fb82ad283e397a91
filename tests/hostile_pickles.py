"""Pickles that run code where Python's own unpickler reads them, and mutants of good checkpoints."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import save

OPEN = 'open("{0}", "w").close()'
NESTED = b"cos\nsystem\n(Vtouch {0}\ntR."
CALLS: dict[str, tuple[str, str, tuple[object, ...]]] = {
    "os.system": ("os", "system", ("touch {0}",)),
    "posix.system": ("posix", "system", ("touch {0}",)),
    "os.popen": ("os", "popen", ("touch {0}; echo",)),
    "os.mkdir": ("os", "mkdir", ("{0}",)),
    "subprocess.call": ("subprocess", "call", (["touch", "{0}"],)),
    "subprocess.check_output": ("subprocess", "check_output", (["touch", "{0}"],)),
    "subprocess.getoutput": ("subprocess", "getoutput", ("touch {0}",)),
    "eval": ("builtins", "eval", (OPEN,)),
    "exec": ("builtins", "exec", (OPEN,)),
    "python 2": ("__builtin__", "eval", (OPEN,)),
    "open": ("builtins", "open", ("{0}", "w")),
    "io.open": ("io", "open", ("{0}", "w")),
    "shutil.copy": ("shutil", "copy", ("/dev/null", "{0}")),
    "cProfile": ("cProfile", "run", (OPEN,)),
    "torch.save": ("torch", "save", ([], "{0}")),
    "pickle.loads": ("pickle", "loads", (NESTED,)),
    "_pickle.loads": ("_pickle", "loads", (NESTED,)),
    "storage from bytes": ("torch.storage", "_load_from_bytes", (NESTED,)),
    "timeit": ("timeit", "timeit", (OPEN,)),
    "subprocess.Popen": ("subprocess", "Popen", (["touch", "{0}"],)),
    "os.execvp": ("os", "execvp", ("touch", ["touch", "{0}"])),
    "os.posix_spawn": ("os", "posix_spawn", ("/usr/bin/touch", ["touch", "{0}"], {})),
    "pty": ("pty", "spawn", (["touch", "{0}"],)),
    "torch.load": ("torch.serialization", "load", ("{0}",)),
    "torch hub": ("torch.hub", "load_state_dict_from_url", ("file://{0}",)),
    "torch jit": ("torch.jit", "load", ("{0}",)),
    "getattr": ("builtins", "getattr", ("a", "__class__")),
    "import": ("builtins", "__import__", ("antigravity",)),
    "importlib": ("importlib", "import_module", ("antigravity",)),
    "attrgetter": ("operator", "attrgetter", ("system",)),
    "methodcaller": ("operator", "methodcaller", ("system", "touch {0}")),
    "ctypes": ("ctypes", "CDLL", ("libc.so.6",)),
    "allowed torch._utils": ("torch._utils", "_import_dotted_name", ("os.system",)),
    "allowed torch": ("torch", "os.system", ("touch {0}",)),
    "allowed tensor": ("torch", "Tensor.__reduce_ex__.__globals__", ("a",)),
    "allowed numpy": ("numpy._core.multiarray", "fromfile", ("{0}",)),
    "allowed numpy, dotted": ("numpy", "load", ("{0}",)),
    "allowed collections": ("collections", "namedtuple", ("A", "b")),
    "allowed codecs": ("_codecs", "lookup", ("latin1",)),
    "allowed argparse": ("argparse", "FileType", ("w",)),
    "allowed pathlib": ("pathlib", "os.system", ("touch {0}",)),
    "allowed datetime": ("datetime", "sys.modules.get", ("os",)),
}
"""Name: module, attribute, arguments; {0} is a file that must not come to be."""
RUNS = tuple(CALLS)[:17]
"""Of these Python's own unpickler makes the file, which shows that the pickles are what they are meant to be."""
SHAPES = ("reduce", "stack", "new", "inst", "build", "chain")
PLACES = ("alone", "entry", "key", "dropped", "nested")


def _with(marker: str, value: object) -> object:
    if isinstance(value, list):
        return [_with(marker, item) for item in value]
    if isinstance(value, bytes):
        return value.replace(b"{0}", marker.encode())
    return value.replace("{0}", marker) if isinstance(value, str) else value


def _operands(value: object) -> bytes:
    return pickle.dumps(value, protocol=2)[2:-1]


def call(name: str, marker: str, shape: str = "reduce") -> bytes:
    """The instructions that call a name."""
    module, attribute, arguments = CALLS[name]
    given = tuple(_with(marker, value) for value in arguments)
    found, operands = f"c{module}\n{attribute}\n".encode(), _operands(given)
    texts = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute))
    return {
        "reduce": found + operands + b"R",
        "stack": b"\x80\x04" + texts + b"\x93" + operands + b"R",
        "new": found + operands + b"\x81",
        "inst": b"(" + b"".join(map(_operands, given)) + f"i{module}\n{attribute}\n".encode(),
        "build": b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00items" + found + b"sb" + operands + b"0",
        "chain": b"cbuiltins\ngetattr\n" + found + b"X\x08\x00\x00\x00__call__\x86R" + operands + b"R",
    }[shape]


def around(value: bytes, place: str = "alone") -> bytes:
    """A whole pickle with a value in it."""
    name = b"X\x01\x00\x00\x00a"
    held = {
        "alone": value,
        "entry": b"}" + name + value + b"s",
        "key": b"}" + value + name + b"s",
        "dropped": value + b"0}",
        "nested": b"}" + name + b"]" + value + b"as",
    }
    return b"\x80\x02" + held[place] + b"."


def hostile(marker: str) -> Iterator[tuple[str, bytes]]:
    """A title and a pickle, every name in every shape, places in turn."""
    for number, (name, shape) in enumerate((name, shape) for name in CALLS for shape in SHAPES):
        place = PLACES[number % len(PLACES)]
        yield f"{name}, {shape}, {place}", around(call(name, marker, shape), place)


def in_zip(pickled: bytes) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
    return held.getvalue()


def in_legacy(pickled: bytes) -> bytes:
    held = io.BytesIO()
    torch.save({}, held, _use_new_zipfile_serialization=False)
    whole = held.getvalue()
    begin = whole.index(b"\x80\x02}q\x00.", 100)
    return whole[:begin] + pickled + whole[begin + 6 :]


def good_files(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """One checkpoint in five formats."""
    nested = {"model": state, "optimizer": {"state": {0: {"exp_avg": state["0.weight"]}}}, "epoch": 3}
    lightning = {
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
        "hyper_parameters": {"lr": 0.1},
        "pytorch-lightning_version": "2.5.0",
        "callbacks": {},
        "loops": {"fit_loop": {"state_dict": {}}},
    }

    def saved(content: object, zipped: bool = True) -> bytes:
        held = io.BytesIO()
        torch.save(content, held, _use_new_zipfile_serialization=zipped)
        return held.getvalue()

    return {
        "safetensors": save(state),
        "zip": saved(state),
        "legacy": saved(state, zipped=False),
        "nested": saved(nested),
        "lightning": saved(lightning),
    }


def _flip(whole: bytes, dice: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


def _cut(whole: bytes, dice: random.Random) -> bytes:
    return whole[: dice.randrange(len(whole))]


def _spliced(whole: bytes, dice: random.Random) -> bytes:
    begin, end = sorted(dice.randrange(len(whole)) for _ in range(2))
    to = dice.randrange(len(whole))
    return whole[:to] + whole[begin:end] + whole[to + dice.choice((0, end - begin)) :]


def _numbers(whole: bytes, dice: random.Random) -> bytes:
    """Four or eight bytes become a number at the edge of what they can hold."""
    at = dice.randrange(len(whole) - 8)
    kind, value = dice.choice((("<I", 2**32 - 1), ("<I", 2**31), ("<Q", 2**64 - 1), ("<Q", 2**40), ("<I", 0)))
    number = struct.pack(kind, value)
    return whole[:at] + number + whole[at + len(number) :]


def _header(whole: bytes, dice: random.Random) -> bytes:
    """The pickle or header of a file changed, with checksums and lengths that are right again."""
    if whole[:2] == b"PK":
        held, changed = io.BytesIO(), random.Random(dice.random())
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(held, "w") as new:
            for record in old.infolist():
                content = old.read(record)
                if record.filename.endswith("data.pkl"):
                    content = changed.choice((_flip, _numbers, _spliced))(content, changed)
                new.writestr(record.filename, content)
        return held.getvalue()
    if whole[8:9] == b"{":
        (length,) = struct.unpack("<Q", whole[:8])
        header = json.loads(whole[8 : 8 + length])
        entry = header[dice.choice([name for name in header if name != "__metadata__"])]
        wild = [0, -1, 2**31, 2**62, 2**64, 1.5, None, [], "F64"]
        field = dice.choice(("shape", "data_offsets", "dtype"))
        entry[field] = dice.choice(
            (dice.choice(wild), [dice.choice(wild)], [dice.choice(wild), dice.choice(wild)])
        )
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]
    at = dice.randrange(40, min(len(whole), 1500))
    return whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :]


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _cut, _spliced, _numbers, _header)


def mutants(state: dict[str, torch.Tensor], each: int) -> Iterator[tuple[str, bytes]]:
    """Seeded mutants, ``each`` of every format and mutation."""
    for form, whole in good_files(state).items():
        for mutate in MUTATIONS:
            dice = random.Random(f"{form} {mutate.__name__}")
            for number in range(each):
                yield f"{form} {mutate.__name__} {number}", mutate(whole, dice)
