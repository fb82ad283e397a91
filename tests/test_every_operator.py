"""Promise: every operator passes one and the same test case, and goes through 53 uses by SciPy. (15 s)

Oracle: the dense matrix, by torch.func or in closed form, and NumPy's algebra on it.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import scipy.sparse.linalg as linalg
import torch
from scipy.linalg import expm
from scipy.linalg.interpolative import estimate_spectral_norm
from torch import nn

import hessdiag
from hessdiag.engine.training.training import Curved
from hessdiag.errors import UsageError
from hessdiag.operator import ClosureOperator, as_operator
from hessdiag.regularizers.curvature_penalty import BatchHessian
from tests import models

MATRIX = torch.diag(torch.arange(1.0, 10.0, dtype=torch.float64)) + models.randn(9, 9).mul(0.1)
MATRIX = (MATRIX + MATRIX.T) / 2


class EveryOperator:
    """What a subclass inherits: it gives ``make()``, the operator and its dense matrix."""

    rtol = 1e-11

    def make(self):
        raise NotImplementedError

    @pytest.fixture
    def pair(self):
        torch.manual_seed(0)
        H, A = self.make()
        return H, A.double()

    def close(self, found, expected):
        found, expected = (torch.as_tensor(x).double() for x in (found, expected))
        scale = float(expected.abs().max()) + 1e-300
        assert found.shape == expected.shape
        assert float((found - expected).abs().max()) <= self.rtol * scale

    def vectors(self, H, number=3):
        return models.randn(H.size, number, seed=5)

    def test_shape_type_and_device(self, pair):
        H, A = pair
        assert H.shape == A.shape == (H.size, H.size)
        assert H.dtype in (torch.float32, torch.float64) and H.device == torch.device("cpu")
        assert sum(size for _, size in H.layout) == H.size
        assert (H @ self.vectors(H)).dtype == H.dtype

    def test_products(self, pair):
        H, A = pair
        V = self.vectors(H)
        self.close(H.dense(), A)
        self.close(H @ V, A @ V)
        self.close(H @ V[:, 0], A @ V[:, 0])
        self.close(V.T @ H, V.T @ A)
        self.close(V[:, 0] @ H, V[:, 0] @ A)
        self.close(H.rows(V.T), V.T @ A)

    def test_arrays_give_arrays(self, pair):
        H, A = pair
        v = self.vectors(H).numpy()
        fixed, a = v[:, 0].copy(), A.numpy()
        fixed.flags.writeable = False
        pairs = [(H @ v, a @ v), (H @ v[:, 0], a @ v[:, 0]), (v.T @ H, v.T @ a), (H @ fixed, a @ fixed)]
        for found, expected in (*pairs, (H @ v[::-1, ::-1], a @ v[::-1, ::-1])):
            assert isinstance(found, np.ndarray) and found.dtype == np.float64
            self.close(found, expected)

    def test_tensors_in_parameter_shape_give_such_tensors(self, pair):
        H, A = pair
        v = self.vectors(H)[:, 0]
        named = H.named(v)
        image = H.named(A @ v)
        for found in (H @ named, dict(zip(named, H @ list(named.values()), strict=True))):
            assert list(found) == list(named)
            for name, piece in found.items():
                assert piece.shape == named[name].shape
                self.close(torch.cat([p.flatten() for p in found.values()]), A @ v)
                assert piece.shape == image[name].shape
        assert isinstance(H @ tuple(named.values()), tuple)
        backwards = dict(reversed(named.items()))
        assert list(H @ backwards) == list(backwards)
        self.close(torch.cat([(H @ backwards)[name].flatten() for name in named]), A @ v)

    def test_wrong_shapes_are_one_line(self, pair):
        H, _ = pair
        v = H.named(self.vectors(H)[:, 0])
        wrong = [
            torch.zeros(H.size + 1),
            torch.zeros(2, H.size + 1),
            [torch.zeros(H.size + 1)],
            {**v, "more": 0},
            {},
        ]
        for vector in wrong:
            with pytest.raises(UsageError) as refusal:
                H @ vector
            assert "\n" not in str(refusal.value)

    def test_algebra(self, pair):
        H, A = pair
        v, eye = self.vectors(H), torch.eye(H.size, dtype=torch.float64)
        for B, dense in (
            (2 * H, 2 * A),
            (H / 2, A / 2),
            (-H, -A),
            (H + 0.5 * H.identity, A + 0.5 * eye),
            (H + H, 2 * A),
            (H - as_operator(eye), A - eye),
            (2 * H - H / 4, 1.75 * A),
            (H @ H, A @ A),
            (H**3, A @ A @ A),
            ((H - H.identity) ** 2, (A - eye) @ (A - eye)),
        ):
            self.close(B @ v, dense @ v)
            assert B.layout == H.layout and B.shapes == H.shapes and B.dtype == H.dtype
        assert H.T is H and H.H is H

    def test_products_are_counted_and_the_result_is_the_callers(self, pair):
        H, A = pair
        before, v = H.products, self.vectors(H)[:, 0].to(H.dtype)
        kept = v.clone()
        image = H @ v
        image.zero_()
        assert H.products == before + 1
        assert torch.equal(v, kept)
        self.close(H @ v, A @ kept.double())
        assert (H @ torch.zeros(H.size, 0)).shape == (H.size, 0)

    def test_scipy_has_all_four_products(self, pair):
        H, A = pair
        L, v, a = H.to_scipy(), self.vectors(H).numpy(), A.numpy()
        assert L.dtype == np.float64 and linalg.aslinearoperator(L) is L
        self.close(L.matvec(v[:, 0]), a @ v[:, 0])
        self.close(L.rmatvec(v[:, 0]), a @ v[:, 0])
        self.close(L.matmat(v), a @ v)
        self.close(L.rmatmat(v), a @ v)
        self.close((L.H @ L.T) @ v, a @ a @ v)
        self.close(as_operator(L) @ v, a @ v)

    def test_estimators(self, pair):
        H, A = pair
        values = np.linalg.eigvalsh(A.numpy())
        found = hessdiag.extremes(H, max_steps=H.size)
        assert found.lambda_max.lo <= values[-1] <= found.lambda_max.hi
        assert found.lambda_min.lo - 1e-15 <= values[0] <= found.lambda_min.hi  # eigvalsh rounds a 0 of G
        trace = hessdiag.trace(H, probes=H.size)
        assert trace.kind == "exact" and trace.lo <= values.sum() <= trace.hi
        self.close(np.asarray(trace.value), np.asarray(values.sum()))


class TestClosure(EveryOperator):
    def make(self):
        return ClosureOperator(lambda block: MATRIX @ block, 9), MATRIX


class TestMatrix(EveryOperator):
    def make(self):
        return as_operator(MATRIX), MATRIX


class TestSinglePrecision(EveryOperator):
    rtol = 1e-5

    def make(self):
        return as_operator(MATRIX.float()), MATRIX.float()


class TestArray(EveryOperator):
    def make(self):
        return as_operator(MATRIX.numpy()), MATRIX


class TestSparse(EveryOperator):
    def make(self):
        return as_operator(sparse.csr_array(MATRIX.numpy())), MATRIX


class TestLinearOperator(EveryOperator):
    def make(self):
        return as_operator(linalg.aslinearoperator(MATRIX.numpy())), MATRIX


class TestCombination(EveryOperator):
    def make(self):
        eye = torch.eye(9, dtype=torch.float64)
        return 2 * as_operator(MATRIX) - as_operator(eye) / 3, 2 * MATRIX - eye / 3


class TestPower(EveryOperator):
    def make(self):
        return as_operator(MATRIX) ** 2, MATRIX @ MATRIX


class TestIdentity(EveryOperator):
    def make(self):
        return as_operator(MATRIX).identity, torch.eye(9)


class TestHessian(EveryOperator):
    kind = "hessian"

    def make(self):
        problem = models.mlp()
        return hessdiag.hessian(problem, operator=self.kind, samples=10_000, batch_size=16), self.dense(problem)

    def dense(self, problem):
        return models.dense_hessian(problem)


class TestGaussNewton(TestHessian):
    kind = "ggn"

    def dense(self, problem):
        return models.dense_gauss_newton(problem)


class TestResidual(TestHessian):
    kind = "residual"
    rtol = 1e-10

    def dense(self, problem):
        return models.dense_hessian(problem) - models.dense_gauss_newton(problem)


class TestBatchHessian(EveryOperator):
    def make(self):
        problem = models.mlp()
        model, (x, y) = problem.model, problem.data["train"]
        curved = Curved(lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        return BatchHessian(curved), models.dense_hessian(problem)


# 53 uses by SciPy of a damped Gauss-Newton matrix, positive definite and not diagonal: each against NumPy's.
PROBLEM, LINEAR = models.linear_regression()
a = LINEAR.numpy() + 0.3 * np.eye(8)
v, V = models.randn(8, seed=3).numpy(), models.randn(8, 3, seed=4).numpy()
VALUES, SOLUTION = np.linalg.eigvalsh(a), np.linalg.solve(a, v)


def damped():
    H = hessdiag.hessian(PROBLEM)
    return (H + 0.3 * H.identity).to_scipy()


def solved(method, **options):
    return lambda L: method(L, v, rtol=1e-12, atol=0.0, **options)[0]


def unwrapped(found):
    return np.sort(np.real(np.asarray(found)))


def one_norm(L):
    np.random.seed(0)  # SciPy draws the estimator's vectors from the global stream
    return linalg.onenormest(L, t=4)


P = linalg.aslinearoperator(np.diag(1 / np.diag(a)))  # a preconditioner
START = np.ones(8)
USES = {
    "matvec": (lambda L: L.matvec(v), a @ v),
    "rmatvec": (lambda L: L.rmatvec(v), a @ v),
    "matmat": (lambda L: L.matmat(V), a @ V),
    "rmatmat": (lambda L: L.rmatmat(V), a @ V),
    "L @ v": (lambda L: L @ v, a @ v),
    "L @ V": (lambda L: L @ V, a @ V),
    "L @ column": (lambda L: L @ V[:, :1], a @ V[:, :1]),
    "L * v": (lambda L: L * v, a @ v),
    "L(v)": (lambda L: L(v), a @ v),
    "L.dot": (lambda L: L.dot(V), a @ V),
    "v @ L": (lambda L: v @ L, v @ a),
    "V.T @ L": (lambda L: V.T @ L, V.T @ a),
    "L.T @ v": (lambda L: L.T @ v, a @ v),
    "L.H @ V": (lambda L: L.H @ V, a @ V),
    "transpose()": (lambda L: L.transpose() @ v, a @ v),
    "adjoint()": (lambda L: L.adjoint() @ v, a @ v),
    "L.H.H": (lambda L: L.H.H @ v, a @ v),
    "2 * L": (lambda L: (2 * L) @ v, 2 * a @ v),
    "L * 2": (lambda L: (L * 2) @ V, 2 * a @ V),
    "L / 2": (lambda L: (L / 2) @ v, a @ v / 2),
    "-L": (lambda L: (-L) @ v, -a @ v),
    "L + L": (lambda L: (L + L) @ v, 2 * a @ v),
    "L - L": (lambda L: (L - 0.5 * L) @ v, a @ v / 2),
    "L @ L": (lambda L: (L @ L) @ V, a @ a @ V),
    "L ** 3": (lambda L: (L**3) @ v, a @ a @ a @ v),
    "(2 L).H": (lambda L: (2 * L).H @ v, 2 * a @ v),
    "(L + L).T": (lambda L: (L + L).T @ V, 2 * a @ V),
    "(L @ P).T": (lambda L: (L @ P).T @ v, (a @ np.diag(1 / np.diag(a))).T @ v),
    "(L ** 2).H": (lambda L: (L**2).H @ v, a @ a @ v),
    "plus a matrix": (lambda L: (L + linalg.aslinearoperator(np.eye(8))) @ v, a @ v + v),
    "plus a sparse one": (lambda L: (L + linalg.aslinearoperator(sparse.eye_array(8))) @ v, a @ v + v),
    "aslinearoperator": (lambda L: linalg.aslinearoperator(L) @ v, a @ v),
    "integers": (lambda L: L @ np.arange(8), a @ np.arange(8)),
    "float32": (lambda L: L @ v.astype(np.float32), a @ v.astype(np.float32)),
    "eigsh largest": (lambda L: unwrapped(linalg.eigsh(L, 2, v0=START)[0]), VALUES[-2:]),
    "eigsh smallest": (lambda L: unwrapped(linalg.eigsh(L, 2, which="SA", v0=START)[0]), VALUES[:2]),
    "eigsh both ends": (
        lambda L: unwrapped(linalg.eigsh(L, 4, which="BE", v0=START, return_eigenvectors=False)),
        np.r_[VALUES[:2], VALUES[-2:]],
    ),
    "eigsh near a shift": (
        lambda L: unwrapped(
            linalg.eigsh(L, 2, sigma=0.0, OPinv=linalg.aslinearoperator(np.linalg.inv(a)), v0=START)[0]
        ),
        VALUES[:2],
    ),
    "eigs": (lambda L: unwrapped(linalg.eigs(L, 2, v0=START)[0]), VALUES[-2:]),
    "lobpcg": (
        lambda L: unwrapped(linalg.lobpcg(L, np.eye(8)[:, :1] + 0.1, tol=1e-9, maxiter=300)[0]),
        VALUES[-1:],
    ),
    "svds": (lambda L: np.sort(linalg.svds(L, 2, v0=START)[1]), VALUES[-2:]),
    "svds by LOBPCG": (lambda L: np.sort(linalg.svds(L, 1, solver="lobpcg", rng=0)[1]), VALUES[-1:]),
    "cg": (solved(linalg.cg), SOLUTION),
    "cg with a preconditioner": (solved(linalg.cg, M=P), SOLUTION),
    "cgs": (solved(linalg.cgs), SOLUTION),
    "bicg": (solved(linalg.bicg), SOLUTION),
    "bicgstab": (solved(linalg.bicgstab), SOLUTION),
    "gmres": (solved(linalg.gmres), SOLUTION),
    "lgmres": (solved(linalg.lgmres), SOLUTION),
    "gcrotmk": (solved(linalg.gcrotmk), SOLUTION),
    "qmr": (solved(linalg.qmr), SOLUTION),
    "tfqmr": (solved(linalg.tfqmr), SOLUTION),
    "minres": (lambda L: linalg.minres(L, v, rtol=1e-12)[0], SOLUTION),
    "lsqr": (lambda L: linalg.lsqr(L, v, atol=1e-14, btol=1e-14)[0], SOLUTION),
    "lsmr": (lambda L: linalg.lsmr(L, v, atol=1e-14, btol=1e-14)[0], SOLUTION),
    "expm_multiply": (lambda L: linalg.expm_multiply(L, v, traceA=np.trace(a)), expm(a) @ v),
    "expm_multiply of a block": (lambda L: linalg.expm_multiply(-L, V, traceA=-np.trace(a)), expm(-a) @ V),
    "onenormest": (one_norm, np.linalg.norm(a, 1)),
    "estimate of the 2-norm": (lambda L: estimate_spectral_norm(L, its=200, rng=0), VALUES[-1]),
}


@pytest.mark.parametrize("name", USES)
def test_scipy_uses_give_what_the_matrix_gives(name):
    use, expected = USES[name]
    np.testing.assert_allclose(use(damped()), expected, rtol=1e-6, atol=1e-8)


def test_the_uses_are_53_and_more():
    assert len(USES) >= 53


BROKEN = {
    "no adjoint": lambda L: linalg.LinearOperator(L.shape, matvec=L.matvec, dtype=L.dtype),
    "another adjoint": lambda L: linalg.LinearOperator(
        L.shape, matvec=L.matvec, rmatvec=lambda x: 2 * L.matvec(x), dtype=L.dtype
    ),
    "columns in another order": lambda L: linalg.LinearOperator(
        L.shape, matvec=L.matvec, rmatvec=L.rmatvec, matmat=lambda x: L.matmat(x[:, ::-1]), dtype=L.dtype
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    L = breakage(damped())
    with pytest.raises((AssertionError, NotImplementedError, TypeError, AttributeError)):
        for use, expected in USES.values():
            np.testing.assert_allclose(use(L), expected, rtol=1e-6, atol=1e-8)
