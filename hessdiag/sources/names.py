"""The names that a checkpoint's pickle may ask for, and the plain data each stands for here.

Nothing here is what the name says elsewhere: `numpy.dtype` is a text, `argparse.Namespace` a dict, a path a text.
A name that is not listed is `Foreign`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.shown import single_spaced
from hessdiag.sources.stand_ins import Array, Attributes, Dtype, Foreign, Name
from hessdiag.sources.storages import TYPES, Odd, Storage, rebuild

MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
    "torch.cuda": "torch",
    "pathlib._local": "pathlib",
}
"""Other names of the same modules: Python 2, older numpy, tensors on a GPU, Python 3.13."""
NUMPY_TYPES = (
    *("bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
PLAIN = (str, bytes, int, float, type(None))


def find(module: str, name: str) -> Name | Foreign:
    """What a name of a pickle stands for."""
    module = MODULES.get(module, module)
    full = f"{module}.{name}"
    return BUILDERS.get(full) or Foreign(single_spaced(full)[:120])


def _mapping(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    items = list(pairs.items()) if isinstance(pairs, dict) else list(pairs)
    if not all(isinstance(key, PLAIN) and _is_short(key) for key, _ in items):
        msg = "keys"
        raise UnpicklingError(msg)
    return dict(items)


def _is_short(key: Any) -> bool:
    return not isinstance(key, int) or key.bit_length() <= 64  # printing a longer one can raise


def _empty(*_: Any) -> dict[Any, Any]:
    return {}


def _attributes(*_: Any) -> Attributes:
    return Attributes()


def _reconstructed(kind: Any, *_: Any) -> Any:
    return kind.build() if isinstance(kind, Name) else kind


def _members(items: Any = ()) -> set[Any]:
    if not all(isinstance(item, PLAIN) and _is_short(item) for item in items):
        msg = "members"
        raise UnpicklingError(msg)
    return set(items)


def _sequence(items: Any = (), *_: Any) -> list[Any]:
    return list(items)


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding not in ("utf-8", "utf8") else "utf-8")


def _bytes(content: Any = b"", *_: Any) -> bytes:
    if not isinstance(content, bytes | bytearray | str):
        return bytes(bytearray(_small(content)))
    return content.encode("latin1") if isinstance(content, str) else bytes(content)


def _small(items: Any) -> list[int]:
    if not isinstance(items, list | tuple):  # bytearray(n) is n bytes of memory
        raise TypeError
    return list(items)


def _scalar(dtype: Any, content: Any = b"") -> Any:
    if not isinstance(dtype, Dtype) or not dtype.text or not isinstance(content, bytes | str):
        return Odd("a numpy object")
    raw = content.encode("latin1") if isinstance(content, str) else content
    kind = np.dtype(dtype.text)
    if kind.itemsize != len(raw):
        raise ValueError
    return np.frombuffer(raw, kind)[0].item() if raw else ""


def _path(*parts: str) -> str:
    return "/".join(parts).replace("//", "/")


def _time(kind: type[datetime.date]) -> Callable[..., Any]:
    def build(state: Any = b"", *_: Any) -> Any:
        raw = state.encode("latin1") if isinstance(state, str) else state
        return str(kind(raw)) if isinstance(raw, bytes) else Odd("a time")  # type: ignore[arg-type, call-arg]

    return build


def _tensor_of_type(function: Any, _kind: Any, arguments: Any, _state: Any = None) -> Any:
    if not isinstance(function, Name) or function.build not in TENSORS or not isinstance(arguments, tuple):
        return Odd("a tensor of its own kind")
    return function.build(*arguments)


def _parameter(data: Any = None, *_: Any) -> Any:
    if not isinstance(data, Tensor | Odd):
        raise TypeError
    return data


def _with_dtype(storage: Storage, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> Any:
    found = getattr(torch, dtype.name.rpartition(".")[2], None) if isinstance(dtype, Name) else None
    if not isinstance(found, torch.dtype) or not isinstance(storage, Storage):
        return Odd("a tensor of an unknown type")
    return rebuild(storage.as_type(found), offset, size, stride)


def _tensor(storage: Storage | Odd, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
    if isinstance(storage, Odd):
        return storage
    if len(rest) > 2 and rest[2]:  # a lazy conjugate or sign
        return Odd("a tensor with a view's bits")
    return rebuild(storage, offset, size, stride)


def _odd(what: str) -> Callable[..., Odd]:
    return lambda *_: Odd(what)


TENSORS = (_tensor, _with_dtype, _parameter)
TORCH: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": lambda *given: _with_dtype(*given[:7]),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    **dict.fromkeys(
        (
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_sparse_tensor",
            "torch._utils._rebuild_sparse_csr_tensor",
            "torch._utils._rebuild_meta_tensor_no_storage",
            "torch._utils._rebuild_nested_tensor",
            "torch._utils._rebuild_wrapper_subclass",
            "torch._utils._rebuild_device_tensor_from_numpy",
            "torch._utils._rebuild_device_tensor_from_cpu_tensor",
        ),
        _odd("a tensor"),
    ),
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Buffer"), _odd("a tensor")),
    "torch.Size": _sequence,
    "torch.device": _odd("a device"),
    "torch.serialization._get_layout": _odd("a layout"),
    **{f"torch.{name}": _odd("a storage") for name in TYPES},
    **{f"torch.{name}": _odd("a dtype") for name, found in vars(torch).items() if isinstance(found, torch.dtype)},
    **{str(scheme): _odd("a quantization") for scheme in (torch.per_tensor_affine, torch.per_channel_affine)},
    "torch.storage.UntypedStorage": _odd("a storage"),
}
NUMPY: dict[str, Callable[..., Any]] = {
    "numpy.dtype": Dtype,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy._core.multiarray._reconstruct": Array,
    "numpy._core.numeric._frombuffer": Array,
    "numpy.ndarray": Array,
    "numpy.random._pickle.__randomstate_ctor": Array,
    "numpy.random._pickle.__generator_ctor": Array,
    "numpy.random._pickle.__bit_generator_ctor": Array,
    **{f"numpy.{name}": _odd("a numpy type") for name in NUMPY_TYPES},
}
PYTHON: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _mapping,
    "collections.Counter": _mapping,
    "collections.defaultdict": _empty,
    "collections.deque": _sequence,
    "copyreg._reconstructor": _reconstructed,
    "argparse.Namespace": _attributes,
    "types.SimpleNamespace": _attributes,
    **{
        f"{module}.AttributeDict": _mapping
        for module in (
            "pytorch_lightning.utilities.parsing",
            "lightning.pytorch.utilities.parsing",
            "lightning_fabric.utilities.data",
            "lightning.fabric.utilities.data",
        )
    },
    "builtins.set": _members,
    "builtins.frozenset": _members,
    "builtins.complex": complex,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.dict": _mapping,
    "builtins.list": _sequence,
    "builtins.tuple": _sequence,
    **{f"builtins.{name}": _odd("a range") for name in ("slice", "range", "xrange")},
    **{f"builtins.{name}": _odd("a type") for name in ("int", "float", "bool", "str", "object")},
    "_codecs.encode": _encoded,
    **{
        f"pathlib.{name}": _path
        for name in ["Path", "PurePath", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"]
    },
    "datetime.datetime": _time(datetime.datetime),
    "datetime.date": _time(datetime.date),
    "datetime.timedelta": _odd("a duration"),
    "datetime.timezone": _odd("a time zone"),
}
BUILDERS = {name: Name(name, build) for name, build in (TORCH | NUMPY | PYTHON).items()}
