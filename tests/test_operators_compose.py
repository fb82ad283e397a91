"""Promise: an operator behaves as its matrix wherever it can, and says the way out where it cannot. (3 s)"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import scipy.sparse.linalg as linalg
import torch

import hessdiag
from hessdiag.errors import UsageError
from hessdiag.operator import ClosureOperator, Combination, SymmetricOperator, as_operator

SIZE = 7
DRAWN = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
A = DRAWN + DRAWN.T
a, eye = A.numpy(), torch.eye(SIZE, dtype=torch.float64)
v, V = DRAWN[0], DRAWN[:3]


def operator() -> ClosureOperator:
    """Known by its products alone."""
    return ClosureOperator(lambda block: A @ block, SIZE)


PRODUCTS = {
    "H @ v": (lambda H: H @ v, A @ v),
    "H @ V": (lambda H: H @ V.T, A @ V.T),
    "v @ H": (lambda H: v @ H, v @ A),
    "V @ H": (lambda H: V @ H, V @ A),
    "H @ array": (lambda H: H @ v.numpy(), a @ v.numpy()),
    "H @ block of arrays": (lambda H: H @ V.T.numpy(), a @ V.T.numpy()),
    "array @ H": (lambda H: V.numpy() @ H, V.numpy() @ a),
    "H @ integers": (lambda H: H @ np.arange(SIZE), a @ np.arange(SIZE)),
    "H.T @ v": (lambda H: H.T @ v, A @ v),
    "SciPy, L @ v": (lambda H: H.to_scipy() @ v.numpy(), a @ v.numpy()),
    "SciPy, L.H @ V": (lambda H: H.to_scipy().H @ V.T.numpy(), a @ V.T.numpy()),
    "SciPy, L.T @ v": (lambda H: H.to_scipy().T @ v.numpy(), a @ v.numpy()),
    "SciPy, v @ L": (lambda H: v.numpy() @ H.to_scipy(), a @ v.numpy()),
    "SciPy, lsqr": (lambda H: linalg.lsqr(H.to_scipy(), a @ v.numpy(), atol=1e-15, btol=1e-15)[0], v),
    "SciPy, svds": (
        lambda H: np.sort(linalg.svds(H.to_scipy(), k=2, random_state=0)[1]),
        np.sort(np.linalg.svd(a)[1])[-2:],
    ),
    "SciPy, expm_multiply": (
        lambda H: linalg.expm_multiply(H.to_scipy(), v.numpy(), traceA=np.trace(a)),
        torch.linalg.matrix_exp(A) @ v,
    ),
}
COMBINATIONS = {
    "2 * H": (lambda H: 2 * H, 2 * A),
    "H * 0.5": (lambda H: H * 0.5, A / 2),
    "H / 2": (lambda H: H / 2, A / 2),
    "a NumPy number": (lambda H: np.float64(3) * H, 3 * A),
    "a tensor of one number": (lambda H: torch.tensor(3.0) * H, 3 * A),
    "-H": (lambda H: -H, -A),
    "H + H": (lambda H: H + H, 2 * A),
    "H - c I": (lambda H: H - 3 * eye, A - 3 * eye),
    "array - H": (lambda H: np.eye(SIZE) - H, eye - A),
    "sparse": (lambda H: H + sparse.eye(SIZE), A + eye),
    "nested": (lambda H: 2 * (H - eye) + H / 2, 2.5 * A - 2 * eye),
    "H + c I": (lambda H: H + 0.3 * H.identity, A + 0.3 * eye),
    "H @ H": (lambda H: H @ H, A @ A),
    "2 H @ H / 4": (lambda H: (2 * H) @ (H / 4), A @ A / 2),
    "H ** 3": (lambda H: H**3, A @ A @ A),
    "(2 H) ** 2 @ H": (lambda H: (2 * H) ** 2 @ H, 4 * A @ A @ A),
    "H ** 0": (lambda H: H**0, eye),
    "H ** 1": (lambda H: H**1, A),
    "(2 I) ** 3": (lambda H: (2 * H.identity) ** 3, 8 * eye),
    "I @ H": (lambda H: (2 * H.identity) @ H, 2 * A),
    "a shifted operator's square": (lambda H: (H + H.identity) ** 2, (A + eye) @ (A + eye)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_matrix(name):
    product, expected = PRODUCTS[name]
    np.testing.assert_allclose(product(operator()), expected, rtol=1e-6 if "SciPy" in name else 1e-13, atol=1e-9)


def right(found: SymmetricOperator, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found.dense(), expected, rtol=1e-13, atol=1e-13))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combinations_are_those_of_the_matrix(name):
    combine, expected = COMBINATIONS[name]
    found = combine(operator())
    assert torch.allclose(found.dense(), expected, rtol=1e-13, atol=1e-12)
    values = torch.linalg.eigvalsh(expected)
    found = hessdiag.extremes(combine(operator()))
    assert found.lambda_max.lo <= values[-1] <= found.lambda_max.hi
    assert found.lambda_min.lo <= values[0] <= found.lambda_min.hi


def test_a_difference_knows_what_its_terms_have_lost():
    """Float32 products of 1 + 1e-5 less 1: what rounding is left is a percent of what remains."""
    values = 1 + 1e-5 * torch.linspace(0, 1, 300)
    H = as_operator(torch.diag(values)) - torch.eye(300)
    found = hessdiag.extremes(H).lambda_max
    assert 0.01 < H.floor < 1
    assert found.lo <= float(values.double()[-1]) - 1 <= found.hi
    assert as_operator(torch.diag(values)).floor == (3 * as_operator(torch.diag(values))).floor


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda H: H + 1, "for the diagonal H"),
        (lambda H: 1.0 - H, "for the diagonal H"),
        (lambda H: H * H, "multiplied by a real number"),
        (lambda H: 2j * H, "multiplied by a real number"),
        (lambda H: H / 0, "not zero"),
        (lambda H: H @ operator(), "two operators is not symmetric"),
        (lambda H: H**-1, "whole exponents from 0"),
        (lambda H: H**0.5, "whole exponents from 0"),
        (lambda H: H @ as_operator(torch.eye(3)), "of one size"),
        (lambda H: H @ "v", "products are with tensors or arrays"),
        (lambda H: H + torch.eye(3), "of one size"),
        (lambda H: H @ np.ones(3), "shape"),
    ],
)
def test_what_is_no_product_is_refused_in_one_line(asked, text):
    with pytest.raises(UsageError, match=text) as refusal:
        asked(operator())
    assert "\n" not in str(refusal.value)


HERMITIAN = torch.tensor([[1, 5j], [-5j, 1]])
COMPLEX = {
    "tensor": HERMITIAN,
    "array": HERMITIAN.numpy(),
    "sparse": sparse.csr_matrix(HERMITIAN.numpy()),
    "LinearOperator": linalg.aslinearoperator(HERMITIAN.numpy()),
    "LinearOperator that calls itself real": linalg.LinearOperator(
        (2, 2), matvec=lambda x: HERMITIAN.numpy() @ x, dtype=np.float64
    ),
    "closure": ClosureOperator(lambda block: HERMITIAN @ block.to(HERMITIAN.dtype), 2),
}


@pytest.mark.parametrize("name", COMPLEX)
@pytest.mark.parametrize("measure", [hessdiag.extremes, lambda H: hessdiag.trace(H, probes=2)])
def test_complex_numbers_are_refused(name, measure):
    with pytest.raises(UsageError, match="real ones are needed") as refusal:
        measure(COMPLEX[name])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("vector", [v * 1j, v.numpy() * 1j], ids=["tensor", "array"])
def test_complex_vectors_are_refused(vector):
    for product in (lambda: operator() @ vector, lambda: operator().to_scipy() @ vector):
        with pytest.raises(UsageError, match="real ones are needed"):
            product()


def test_the_real_form_that_the_refusal_names_has_the_eigenvalues():
    real, imaginary = HERMITIAN.real.double(), HERMITIAN.imag.double()
    form = torch.cat([torch.cat([real, -imaginary], 1), torch.cat([imaginary, real], 1)])
    assert hessdiag.extremes(form).lambda_max.value == pytest.approx(6.0)


BROKEN = {
    "a term is left out": lambda terms: terms[:1],
    "a sign is lost": lambda terms: tuple((abs(factor), op) for factor, op in terms),
    "factors are dropped": lambda terms: tuple((1.0, op) for _, op in terms),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    found = Combination(((2.0, operator()), (-3.0, as_operator(eye))))
    assert right(found, 2 * A - 3 * eye)
    assert not right(Combination(breakage(found.terms)), 2 * A - 3 * eye)
