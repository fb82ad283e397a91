"""The device "pretend": host memory and the CPU's kernels behind PyTorch's device checks, with counters.

    pretend.start()                      # builds once per version of torch (g++), registers the device
    with pretend.counting() as seen:     # everywhere, autograd threads too
        hessdiag.analyze(problem, device="pretend")
    seen.times("item"), seen.amount("h2d"), seen.places("hessdiag")

Kinds: "item" (a number to the host), "d2h" and "h2d" (copies; amount in bytes), "implicit" (operations after which
the host waits on CUDA: nonzero, masks as indices, equal, eigh), "launch" (operations that would be kernels),
"float64" (of those, the ones that read or write float64; amount: elements), "fused attention".
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

NAME = "pretend"
SOURCES = (Path(__file__).with_name("pretend.cpp"), Path(__file__).with_name("parts.h"))
WAITS = ("item", "d2h", "h2d", "implicit", "synchronize")  # a blocking copy to CUDA waits for its stream too
_Listener = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)
_library: list[ctypes.CDLL] = []


class Unavailable(RuntimeError):
    """No compiler here, or no headers: the reason, for a skip."""


class Failed(Unavailable):
    """There is a compiler, and it failed: what it said."""


def start() -> None:
    """Build if need be, load, register; once per process.

    Raises:
        Unavailable: no C++ compiler here, or no headers in this torch.
        Failed: the compiler refused.
    """
    if _library:
        return
    path = _built()
    torch.utils.rename_privateuse1_backend(NAME)
    library = ctypes.CDLL(str(path))
    library.pretend_counts.restype = ctypes.c_char_p
    library.pretend_seed.argtypes = [ctypes.c_uint64]
    library.pretend_random.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.pretend_memory.argtypes = [ctypes.c_int64]
    for name in ("random", "memory", "used", "limit"):
        getattr(library, f"pretend_{name}").restype = ctypes.c_int64
    library.pretend_start()
    _library.append(library)
    torch._register_device_module(NAME, _module(library))
    torch.utils.generate_methods_for_privateuse1_backend()
    # The autograd thread of a device lets go of its last graph after `backward` has returned, which aborts
    # the process if Python is being taken down by then (torch 2.13; seen in 6 of 8 scripts of one backward pass).
    atexit.register(time.sleep, 0.1)


class Seen:
    """What was counted: a dictionary (kind, name) -> (times, amount), and where in Python it was asked for."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}
        self.stacks: list[tuple[str, str, int, tuple[str, ...]]] = []  # kind, name, amount, lines from inside out

    def times(self, *kinds: str) -> int:
        """How often any of the kinds was met."""
        return sum(times for (kind, _), (times, _) in self.counts.items() if kind in kinds)

    def amount(self, *kinds: str) -> int:
        """Bytes or elements, summed over the kinds."""
        return sum(amount for (kind, _), (_, amount) in self.counts.items() if kind in kinds)

    def places(self, kinds: tuple[str, ...] = WAITS, depth: int = 1, least: int = 0) -> Counter[tuple[str, ...]]:
        """How often each of the innermost ``depth`` lines of hessdiag asked for ``least`` bytes of a kind."""
        found: Counter[tuple[str, ...]] = Counter()
        for kind, name, amount, stack in self.stacks:
            if kind in kinds and amount >= least:
                inside = [line for line in stack if "hessdiag/" in line and "/tests/" not in line]
                found[(kind, name, *(inside[:depth] or ["elsewhere"]))] += 1
        return found


@contextmanager
def counting(*, stacks: bool = True) -> Iterator[Seen]:
    """Count inside; with ``stacks`` the lines of Python too."""
    library, seen, main = _library[0], Seen(), threading.get_ident()

    def listen(kind: bytes, name: bytes, amount: int) -> None:
        frame = sys._getframe(1) if threading.get_ident() == main else sys._current_frames()[main]
        lines = []
        while frame is not None:
            code = frame.f_code
            lines.append(f"{code.co_filename}:{frame.f_lineno} {code.co_name}")
            frame = frame.f_back
        seen.stacks.append((kind.decode(), name.decode(), amount, tuple(lines)))

    callback = _Listener(listen)
    library.pretend_reset()
    if stacks:
        library.pretend_listen(callback, 0)
    try:
        yield seen
    finally:
        library.pretend_listen(_Listener(), 0)
        for line in library.pretend_counts().decode().splitlines():
            kind, name, times, amount = line.split("\t")
            seen.counts[kind, name] = (int(times), int(amount))


@contextmanager
def memory(limit: int) -> Iterator[None]:
    """A device of so many bytes beyond those in use."""
    library = _library[0]
    library.pretend_memory(library.pretend_used() + limit)
    try:
        yield
    finally:
        library.pretend_memory(0)


def _module(library: ctypes.CDLL) -> types.ModuleType:
    module = types.ModuleType(f"torch.{NAME}")

    def get_rng_state(device: object = NAME) -> torch.Tensor:
        size = library.pretend_random(None, 0, 0)
        state = torch.empty(size, dtype=torch.uint8)
        library.pretend_random(state.data_ptr(), size, 0)
        return state

    def set_rng_state(state: torch.Tensor, device: object = NAME) -> None:
        library.pretend_random(state.contiguous().data_ptr(), state.numel(), 1)

    def mem_get_info(device: object = None) -> tuple[int, int]:
        page, free, total = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PHYS_PAGES")
        limit, used = library.pretend_limit(), library.pretend_used()
        return min(page * free, limit - used), min(page * total, limit)

    class device:
        """A context in which this device is the current one: it always is."""

        def __init__(self, index: object = None) -> None:
            self.idx = 0

        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            return None

    vars(module).update(
        device=device,
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
        mem_get_info=mem_get_info,
        memory_allocated=lambda device=None: library.pretend_used(),
        memory_reserved=lambda device=None: library.pretend_used(),
        max_memory_allocated=lambda device=None: library.pretend_memory(-1),
        reset_peak_memory_stats=lambda device=None: library.pretend_memory(library.pretend_limit()),
        get_device_name=lambda device=None: "pretend accelerator (host memory)",
        get_rng_state=get_rng_state,
        set_rng_state=set_rng_state,
        manual_seed=library.pretend_seed,
        manual_seed_all=library.pretend_seed,
        _is_in_bad_fork=lambda: False,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    return module


def _built() -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None or not sys.platform.startswith("linux"):
        raise Unavailable("the pretend accelerator needs Linux and a C++ compiler (g++): none found")
    root = Path(torch.__file__).parent
    if not (root / "include" / "torch" / "library.h").exists():
        raise Unavailable("this torch comes without its C++ headers")
    flags = ["-std=c++20", "-O0", "-g0", "-fPIC", "-shared", "-w"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    source = b"".join(file.read_bytes() for file in SOURCES)
    key = hashlib.sha256(source + repr((torch.__version__, flags, sys.platform)).encode())
    place = Path(tempfile.gettempdir()) / f"hessdiag-pretend-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    if place.stat().st_uid != os.getuid():
        raise Unavailable(f"{place} belongs to somebody else")
    target = place / f"pretend-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=place) as folder:
        made = Path(folder) / "made.so"
        command = [compiler, *flags, str(SOURCES[0]), "-o", str(made), f"-I{root / 'include'}"]
        command += [f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}"]
        command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"the pretend accelerator did not compile: {done.stderr[:2000]}")
        made.replace(target)  # whole or not at all, whichever process is first
    return target
