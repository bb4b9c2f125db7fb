"""Newton–Schulz orthogonalization: odd polynomials that drive singular values to 1, standard or Gram form.

Muon: kellerjordan.github.io/posts/muon. Coefficients: leloykun.github.io/ponder/muon-opt-coeffs (quintic),
arXiv 2505.16932 (polar_express, its 1.01 safety factor included), arXiv 2506.10935 (cans), DeepSeek-V4 (deepseekv4).
"""

from collections.abc import Sequence
from functools import cache
from itertools import islice

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.errors import UserError
from megatron_opt.kernels import products
from megatron_opt.kernels.symmetric import symmetric_product

Coefficients = tuple[tuple[float, float, float], ...]

_SIMPLE = (3.4445, -4.7750, 2.0315)
SETS: dict[str, Coefficients] = {
    "simple": (_SIMPLE,),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ),
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    "deepseekv4": (_SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
_REPEAT_LAST = ("polar_express", "cans", "deepseekv4")

_ROUNDING = 2.0**-8  # of bf16
_SAFETY = 1.01  # as in polar_express

ITERATION_DTYPES = {"medium": torch.bfloat16, "high": None, "highest": None}  # None: the matrix's own

# Long side over short from which the Gram form is faster (one CPU core, k = 512: bf16 1.3× at 4, fp32 1.5× at 8).
GRAM_ASPECT = {torch.bfloat16: 3.0, torch.float32: 5.0}
_STACK_SIDE = 256  # from this short side on one product fills a core, and stacking only copies
_STACK_ELEMENTS = 1 << 24


def coefficients(kind: str, steps: int, custom: Sequence[Sequence[float]] = ()) -> Coefficients:
    """The (a, b, c) of each step; sets cycle, those made for convergence repeat their last entry."""
    if steps < 1:
        raise UserError(f"{steps} Newton–Schulz steps leave nothing to do; use at least 1.")
    if kind == "custom":
        table = tuple((float(a), float(b), float(c)) for a, b, c in custom)
        if not table:
            raise UserError("coefficient type 'custom' needs its list of (a, b, c).")
    elif kind in SETS:
        table = SETS[kind]
    else:
        raise UserError(f"there is no coefficient type {kind!r}; there are {', '.join(SETS)} and custom.")
    if kind in _REPEAT_LAST:
        return tuple(islice(table + (table[-1],) * steps, steps))
    return tuple(table[i % len(table)] for i in range(steps))


@cache
def bounded(table: Coefficients, rounding: float = 0.0) -> bool:
    """Whether singular values in [0, 1] stay below 100 where each step's are up to 1 + `rounding` times too large."""
    high = 1.0
    for a, b, c in table:
        square = torch.linspace(0, high * (1 + rounding), 1001, dtype=torch.float64).square()
        high = float((square.sqrt() * (a + square * (b + c * square))).abs().max())
        if not high <= 100:
            return False
    return True


@cache
def safe(table: Coefficients, dtype: torch.dtype) -> Coefficients:
    """The table to iterate with in `dtype`: each step but the last of p(σ/1.01) where bf16 would leave the polynomials' range.

    Those of cans end steeply at the largest value of the step before; rounded beyond it (of rank 1 σ is 1 from the start),
    singular values grow without bound. Of the sets here only cans changes.
    """
    if dtype != torch.bfloat16 or bounded(table, _ROUNDING):
        return table
    s = _SAFETY
    return (*((a / s, b / s**3, c / s**5) for a, b, c in table[:-1]), table[-1])


def scale_to_unit(norm: Tensor, eps: float, form: str) -> Tensor:
    """1/(‖X‖ + ε) (`add`, the study) or 1/max(‖X‖, ε) (`max`, most other codes)."""
    return 1.0 / (norm + eps if form == "add" else norm.clamp_min(eps))


def _polynomial(a: float, b: float, c: float, r: Tensor) -> Tensor:
    """aI + bR + cR² for a batch of symmetric (…, k, k)."""
    z = symmetric_product(r, r, c, b)
    z.diagonal(dim1=-2, dim2=-1).add_(a)
    return z


def gram_polynomial(gram: Tensor, table: Coefficients) -> Tensor:
    """Q (…, k, k) with Q·X = the iteration's result, from R = X·Xᵀ of normalized X; exact in high precision only."""
    r, q = gram, None
    for index, (a, b, c) in enumerate(table):
        z = _polynomial(a, b, c, r)
        q = z if q is None else z @ q
        if index + 1 < len(table):
            r = z @ r @ z
    assert q is not None
    return q


def standard_form(x: Tensor, table: Coefficients) -> Tensor:
    """X ← aX + (bA + cA²)X with A = XXᵀ, on normalized wide X (…, k, K), in the dtype of X. T(4Kk² + 2k³) FLOPs."""
    product = torch.baddbmm if x.ndim == 3 else torch.addmm
    for a, b, c in table:
        gram = symmetric_product(x)
        x = product(x, symmetric_product(gram, gram, c, b), x, beta=a)
    return x


def segments(steps: int, dtype: torch.dtype) -> list[int]:
    """Steps between restarts of the Gram form: k×k iterates in bf16 keep small singular values for two steps."""
    if dtype != torch.bfloat16:
        return [steps]
    return [2] * (steps // 2) + [1] * (steps % 2)


def gram_form(x: Tensor, table: Coefficients) -> Tensor:
    """The same by iterating on k×k and applying once; fp32 keeps its k×k in fp64, bf16 restarts every two steps."""
    start = 0
    for length in segments(len(table), x.dtype):
        wide = x if x.dtype == torch.bfloat16 else x.double()
        x = gram_polynomial(symmetric_product(wide), table[start : start + length]).to(x.dtype) @ x
        start += length
    return x


def _steep(dtype: torch.dtype, table: Coefficients) -> bool:
    """Whether bf16 must not iterate on the Gram matrix.

    Rounded, it has small negative eigenvalues, which steep first steps (polar_express, cans) blow up.
    """
    return dtype == torch.bfloat16 and (len(table) > 5 or max(a for a, _, _ in table) > 5)


def uses_gram_form(k: int, K: int, dtype: torch.dtype, table: Coefficients) -> bool:
    """Whether torch's path takes the Gram form: for long matrices, and in bf16 only where no step can overflow."""
    return len(table) > 2 and not _steep(dtype, table) and GRAM_ASPECT.get(dtype, float("inf")) * k <= K


def native_segment(k: int, K: int, dtype: torch.dtype, table: Coefficients) -> int:
    """Steps that the native kernel takes on the Gram matrix before it applies them: 1 is the standard form.

    Two are cheaper from K ≥ 1.25·k and as exact (docs/kernels.md); more lose the small singular values, and bf16 loses
    them in steep first steps already with two.
    """
    return 1 if _steep(dtype, table) or K < 1.25 * k else 2


def _native(
    matrices: Sequence[Tensor], table: Coefficients, eps: float, precision: str, norm_form: str
) -> list[Tensor | None]:
    """Results of the matrices that the native kernel takes."""
    results: list[Tensor | None] = [None] * len(matrices)
    calls: dict[tuple[bool, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        work = ITERATION_DTYPES[precision] or matrix.dtype
        bf16 = work == torch.bfloat16
        if products.available(matrix, "bf16_products" if bf16 else "products"):
            k, K = sorted(matrix.shape)
            calls.setdefault((bf16, native_segment(k, K, work, table)), []).append(index)
    for (bf16, gram), indices in calls.items():
        given = [matrices[index].contiguous() for index in indices]
        steps = safe(table, torch.bfloat16 if bf16 else torch.float32)
        computed = products.orthogonalize(given, steps, eps, add_eps=norm_form == "add", bf16=bf16, gram=gram)
        for index, result in zip(indices, computed):
            results[index] = result
    return results


def orthogonalize(
    matrices: Sequence[Tensor],
    table: Coefficients,
    eps: float = 1e-5,
    precision: str = "medium",
    norm_form: str = "add",
) -> list[Tensor]:
    """Orthogonalize matrices (m, n) of any shapes; same shapes (up to transposition) go through one batched product.

    A zero matrix gives zeros. Results are contiguous and have each matrix's dtype.
    """
    results = _native(matrices, table, eps, precision, norm_form)
    batches: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = {}
    for index, matrix in enumerate(matrices):
        if results[index] is not None:
            continue
        k, K = sorted(matrix.shape)
        batches.setdefault((k, K, matrix.dtype, matrix.device), []).append(index)
    for (k, K, dtype, _), indices in batches.items():
        work = ITERATION_DTYPES[precision] or dtype
        form = gram_form if uses_gram_form(k, K, work, table) else standard_form
        size = max(1, _STACK_ELEMENTS // (k * K)) if k <= _STACK_SIDE else 1
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            wide = [matrices[i] if matrices[i].shape[0] == k else matrices[i].mT for i in batch]
            x = torch.stack(wide) if len(batch) > 1 else wide[0]
            norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
            y = form((x * scale_to_unit(norm, eps, norm_form)).to(work), safe(table, work)).to(dtype)
            for i, row in zip(batch, y.unbind() if len(batch) > 1 else [y]):
                results[i] = row if matrices[i].shape[0] == k else row.mT.contiguous()
    return [result for result in results if result is not None]


def flops(k: int, K: int, table: Coefficients, precision: str = "medium", dtype: torch.dtype = torch.float32) -> float:
    """FLOPs as `orthogonalize` computes it: T(4Kk² + 2k³), or 4Kk² + (8T − 6)k³ for each Gram segment of T steps."""
    work = ITERATION_DTYPES[precision] or dtype
    if not uses_gram_form(k, K, work, table):
        return len(table) * (4.0 * K * k * k + 2.0 * k**3)
    return sum(4.0 * K * k * k + (8.0 * part - 6.0) * k**3 for part in segments(len(table), work))


@register_flop_formula(torch.ops.megatron_opt.orthogonalize)
def _native_flops(
    matrices: Sequence[Sequence[int]],
    steps: Sequence[float],
    eps: float,
    add_eps: bool,
    bf16: bool,
    gram: int,
    **options: object,
) -> float:
    """The native kernel's work counted as torch's path would do it."""
    table = tuple(zip(steps[::3], steps[1::3], steps[2::3], strict=True))
    precision = "medium" if bf16 else "high"
    return sum(flops(min(shape), max(shape), table, precision) for shape in matrices)
