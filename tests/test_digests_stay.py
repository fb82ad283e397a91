"""Promise: a digest is the sha256 of a stated content, in every version alike: files are compared by it. (2 s)"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hessdiag import hashing
from hessdiag.samples import draw
from hessdiag.shift.inputs import digest


def test_tensors_are_their_elements_however_stored():
    """Against numpy's bytes of the same numbers."""
    x = torch.arange(12.0).reshape(3, 4)
    truth = hashlib.sha256(x.numpy().tobytes()).hexdigest()
    for same in (x, x.clone().requires_grad_(), x.t().contiguous().t(), x.to_sparse(), x[None][:, :, ::1][0]):
        assert hashing.of_tensors([same]) == truth
    turned = torch.tensor([1 + 2j, 3 - 4j])
    assert hashing.of_tensors([turned.conj()]) == hashlib.sha256(np.conj(turned.numpy()).tobytes()).hexdigest()
    assert hashing.of_tensors([x[0], x[1:]]) == truth
    assert hashing.of_tensors([torch.tensor(1.0)]) == hashlib.sha256(np.float32(1.0).tobytes()).hexdigest()
    assert hashing.of_tensors([]) == hashlib.sha256().hexdigest()


def test_a_key_is_the_hash_of_sorted_json():
    text = json.dumps([{"a": 1, "b": None}, "x", str(Path("p"))])
    assert hashing.key({"b": None, "a": 1}, "x", Path("p")) == hashlib.sha256(text.encode()).hexdigest()[:20]
    assert hashing.key("x", "y") != hashing.key("y", "x")


def test_a_file_and_a_folder_are_what_is_in_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "w").write_bytes(b"1")
    (tmp_path / "v").write_bytes(b"2")
    one, two = (hashlib.sha256(content).digest() for content in (b"1", b"2"))
    assert hashing.of_path(tmp_path / "v") == two.hex()
    assert hashing.of_path(tmp_path) == hashlib.sha256(b"a/w\0" + one + b"v\0" + two).hexdigest()


def test_samples_are_leaf_by_leaf():
    """Each leaf's kind, then its content; the whole is the hash of these hashes."""
    x, y = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    leaves = [b"torch.float32 (2,)" + x.numpy().tobytes(), b"torch.int64 ()" + y.numpy().tobytes()]
    truth = hashlib.sha256(b"".join(hashlib.sha256(leaf).digest() for leaf in leaves)).hexdigest()
    assert draw((x, y), samples=5).digest == truth
    assert draw((x, y), samples=5, batch_size=2).digest == truth


def test_inputs_of_a_shift_are_shape_and_doubles():
    rows = np.arange(6.0).reshape(3, 2)
    assert digest(torch.tensor(rows).float()) == hashlib.sha256(b"(3, 2)" + rows.tobytes()).hexdigest()


BROKEN = {
    "order of memory": ("content", lambda t: t.detach().t().contiguous().numpy().tobytes(), "tensors"),
    "keys as they came": ("json", type("J", (), {"dumps": staticmethod(lambda x, **_: str(x))}), "key"),
    "a longer key": ("KEY_DIGITS", 21, "key"),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(monkeypatch, breakage):
    name, instead, of = breakage
    promise = {
        "tensors": test_tensors_are_their_elements_however_stored,
        "key": test_a_key_is_the_hash_of_sorted_json,
    }[of]
    promise()
    monkeypatch.setattr(hashing, name, instead)
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        promise()
