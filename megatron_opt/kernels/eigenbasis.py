"""Eigenbases of second-moment factors: a first eigendecomposition, then QR power iterations, well-defined at any rank.

A factor of t gradients of rank k has rank t·k at most. Where that is less than its size, a decomposition fills the
null space with whatever rounding leaves, and the preconditioned step depends on it. Here the range's basis B is
completed by the Householder reflections of its own QR decomposition, applied to the identity's remaining columns: a
function of B alone, as smooth as B's basis. Signs: the diagonal of R is positive, so columns keep theirs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_opt.kernels import products
from megatron_opt.kernels.dispatch import Operation
from megatron_opt.kernels.projection import Shapes, rotate, two_sided

Tensors = Sequence[Tensor]

_FLOOR = 2.0  # a value below this many roundings of the largest is rounding itself
_NOISE = 8.0  # a column shorter than this many roundings of the longest is rounding itself


def _noise(dtype: torch.dtype, size: int) -> float:
    return _NOISE * torch.finfo(dtype).eps * size**0.5


def complete(columns: Tensor, noise: float | None = None, doubts: list[Tensor] | None = None) -> Tensor:
    """Orthonormal Q (…, K, K) whose first r columns are those of the QR decomposition of (…, K, r), diag R ≥ 0.

    Columns that are rounding noise (|R_jj| ≤ noise·max|R|, default 8·ε·√K) count as zero: filled like the null space.
    A row that is exactly zero (a token not seen yet, a dead unit) keeps its own unit vector, exactly. Noise before
    another column needs a second decomposition, which the host decides. With `doubts` it does not wait: a flag ()
    is added to them, true where the result is wrong for want of that decomposition.
    """
    size, rank = columns.shape[-2:]
    noise = _noise(columns.dtype, size) if noise is None else noise
    rows = torch.argsort((columns == 0).all(-1).to(torch.uint8), dim=-1, stable=True)  # rows of zeros last
    columns = columns.gather(-2, rows.unsqueeze(-1).expand_as(columns))
    reflectors, tau = torch.geqrf(columns)
    diagonal = reflectors.diagonal(dim1=-2, dim2=-1)
    small = diagonal.abs() <= noise * diagonal.abs().amax(-1, keepdim=True)
    scattered = (small[..., 1:] < small[..., :-1]).any()
    if doubts is not None:
        doubts.append(scattered)
    if doubts is None and bool(scattered):
        reflectors, tau = torch.geqrf(columns.masked_fill(small.unsqueeze(-2), 0.0))
    else:  # reflections before them stay what they are
        tau = tau.masked_fill(small, 0.0)
    diagonal = reflectors.diagonal(dim1=-2, dim2=-1).masked_fill(small, 0.0)
    signs = torch.where(diagonal < 0, -1.0, 1.0).to(columns.dtype).unsqueeze(-2)
    if rank < size:
        reflectors = torch.nn.functional.pad(reflectors, (0, size - rank))
    basis = torch.linalg.householder_product(reflectors, tau)
    basis[..., :rank] *= signs
    return torch.empty_like(basis).scatter_(-2, rows.unsqueeze(-1).expand_as(basis), basis)


def _cholesky_qr_reference(columns: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Cholesky QR on columns of length one, a second time where the first leaves them oblique."""
    size, tiny = columns.shape[-1], torch.finfo(columns.dtype).tiny
    lengths = torch.linalg.vector_norm(columns, dim=-2)
    sound = lengths.isfinite() & (lengths > tiny)
    q = columns / torch.where(sound, lengths, torch.ones_like(lengths)).unsqueeze(-2)
    success, oblique = sound.all(-1), torch.full_like(lengths[..., 0], torch.inf)
    eye = torch.eye(size, dtype=columns.dtype, device=columns.device)
    for attempt in range(2):
        again = oblique > size * torch.finfo(columns.dtype).eps
        lower, failed = torch.linalg.cholesky_ex(q.mT @ q)
        if attempt == 0:
            diagonal = lower.diagonal(dim1=-2, dim2=-1) * lengths
            success = success & (failed == 0) & (diagonal.amin(-1) > noise * diagonal.amax(-1))
        else:
            success = success & (~again | (oblique < 0.5) & (failed == 0))
        solved = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
        q = torch.where(again.view(-1, 1, 1), solved, q)
        oblique = torch.linalg.matrix_norm(q.mT @ q - eye)
    return q, success


_cholesky_qr = Operation(
    "cholesky_qr",
    "(Tensor columns, float noise) -> (Tensor, Tensor)",
    _cholesky_qr_reference,
    lambda columns, noise: (torch.empty_like(columns), columns.new_empty(columns.shape[:1], dtype=torch.bool)),
)


def cholesky_qr(columns: Tensor, noise: float | None = None) -> tuple[Tensor, Tensor]:
    """(Q, found) of (B, K, K): Q of the QR decomposition, diag R > 0, by products, and whether this form held (B,).

    Columns are scaled to length one, so that only their angles count, and decomposed as XᵀX = LLᵀ once or twice. It is
    not found where a column is rounding noise (R_jj ≤ noise·max R) or ‖QᵀQ − I‖ ≥ ½ after the first time: Q is then of
    no use. 10/3 to 17/3·K³ FLOPs, in products. CholeskyQR2: arXiv 1401.3725.
    """
    noise = _noise(columns.dtype, columns.shape[-1]) if noise is None else noise
    if products.available(columns):
        return _cholesky_qr(columns.device, columns.contiguous(), noise)
    return _cholesky_qr.reference(columns, noise)


def orthonormalize(columns: Tensor, doubts: list[Tensor] | None = None) -> Tensor:
    """`complete` of (B, K, K): by Cholesky QR where it is the faster one and holds, block by block."""
    if not products.available(columns):
        return complete(columns, doubts=doubts)
    basis, success = cholesky_qr(columns)
    if not bool(success.all()):
        basis[~success] = complete(columns[~success])
    return basis


def _descending(factor: Tensor) -> Tensor:
    """Eigenvectors of symmetric (…, K, K), largest eigenvalue first, their signs fixed by one generic vector."""
    vectors = torch.linalg.eigh(factor).eigenvectors.flip(-1)
    weights = torch.arange(1, factor.shape[-1] + 1, dtype=factor.dtype, device=factor.device).sin()
    return vectors * torch.where(weights @ vectors < 0, -1.0, 1.0).to(factor.dtype).unsqueeze(-2)


def first_basis_of_factor(
    factor: Tensor, rank: int, dtype: torch.dtype = torch.float32, doubts: list[Tensor] | None = None
) -> Tensor:
    """Basis (…, K, K) in `dtype` from a symmetric fp64 factor of gradients in `dtype`, of the given rank at most.

    `doubts` as in `complete`.
    """
    vectors = _descending(factor.double())[..., :rank]
    return complete(factor.double() @ vectors, _noise(dtype, factor.shape[-1]) ** 2, doubts).to(dtype)


def first_bases(grad: Tensor, sides: tuple[int, ...], doubts: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Bases of G·Gᵀ (side 0) and GᵀG (side 1) of (…, m, n), from the short side's eigenvectors U and GᵀU.

    Works on G in fp64, so that the bases depend on G as its singular vectors do, not as those of a rounded product.
    `doubts` as in `complete`.
    """
    wide = grad.double()
    short = 0 if grad.shape[-2] <= grad.shape[-1] else 1
    oriented = wide if short == 0 else wide.mT  # (…, k, K)
    noise = _noise(grad.dtype, max(grad.shape[-2:]))
    long_columns = oriented.mT @ _descending(oriented @ oriented.mT)
    bases = []
    for side in sides:
        columns, level = (oriented @ long_columns, noise**2) if side == short else (long_columns, noise)
        bases.append(complete(columns, level, doubts).to(grad.dtype))
    return tuple(bases)


def power_step(
    factor: Tensor, basis: Tensor, rank: int, shift: float = 0.0, doubts: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """One QR power iteration: sort the basis by qᵀAq, then orthonormalize A·Q; returns (basis, order (…, K)).

    `rank` bounds the factor's rank: so many columns are sorted and iterated. The others, and those whose qᵀAq is
    rounding noise, keep their order and are completed. `shift` iterates with A + shift·(largest qᵀAq)·I: the same
    eigenvectors, but those of smaller eigenvalues turn slowly, and no more by rounding. `doubts` as in `complete`.
    """
    size = basis.shape[-1]
    image = products.matmul(factor, basis)
    values = (basis * image).sum(-2)
    largest = values.amax(-1, keepdim=True)
    last = torch.full_like(values, -torch.inf)
    values = torch.where(values > _FLOOR * torch.finfo(basis.dtype).eps * largest, values, last)
    if rank < size:
        kept = values.topk(rank, dim=-1).indices
        values = last.scatter(-1, kept, values.gather(-1, kept))
    if shift:
        image = image + (shift * largest).unsqueeze(-1) * basis
    image = image.masked_fill(values.isinf().unsqueeze(-2), 0.0)
    order = torch.argsort(values, dim=-1, descending=True, stable=True)
    columns = order[..., :rank].unsqueeze(-2).expand(*image.shape[:-1], -1)
    sorted_image, full = image.gather(-1, columns), rank == size and image.ndim == 3
    return (orthonormalize if full else complete)(sorted_image, doubts=doubts), order


def _refresh_reference(
    moments: Tensors, seconds: Tensors, lefts: Tensors, rights: Tensors, left_factors: Tensors, right_factors: Tensors,
    shift: float, floor: float, left_noise: float, right_noise: float,
) -> Tensor:  # fmt: skip
    flags = []
    for i, (m, v) in enumerate(zip(moments, seconds, strict=True)):
        moment, second = (x if x.ndim == 3 else x.unsqueeze(0) for x in (m, v))
        old: list[Tensor | None] = [None, None]
        new: list[Tensor | None] = [None, None]
        success, reordered = torch.ones(len(moment), dtype=torch.bool, device=m.device), second
        sides = ((lefts, left_factors, left_noise), (rights, right_factors, right_noise))
        for side, (bases, factors, noise) in enumerate(sides):
            if not bases:
                continue
            basis, factor = (x.view(len(moment), *x.shape[-2:]) for x in (bases[i], factors[i]))
            image = factor @ basis
            values = (basis * image).sum(-2)
            largest = values.amax(-1, keepdim=True)
            order = torch.argsort(values, dim=-1, descending=True, stable=True)
            image = (image + (shift * largest).unsqueeze(-1) * basis).gather(-1, order.unsqueeze(-2).expand_as(image))
            old[side] = basis
            new[side], well_formed = _cholesky_qr_reference(image, noise)
            success = success & (values > floor * largest).all(-1) & well_formed
            index = order.unsqueeze(-1) if side == 0 else order.unsqueeze(-2)
            reordered = reordered.gather(side + 1, index.expand_as(reordered))
        rotated = rotate(rotate(moment, old[0], old[1], back=True), new[0], new[1])
        for to, value in ((moment, rotated), (second, reordered), *zip(old, new)):
            if to is not None and value is not None:
                to.copy_(torch.where(success.view(-1, 1, 1), value, to))
        flags.append(success)
    return torch.cat(flags) if flags else torch.empty(0, dtype=torch.bool)


_refresh_bases = Operation(
    "refresh_bases",
    "(Tensor(a!)[] moments, Tensor(b!)[] seconds, Tensor(c!)[] lefts, Tensor(d!)[] rights, Tensor[] left_factors, "
    "Tensor[] right_factors, float shift, float floor, float left_noise, float right_noise) -> Tensor",
    _refresh_reference,
    lambda moments, *rest: torch.empty(
        sum(len(m) if m.ndim == 3 else 1 for m in moments), dtype=torch.bool, device=moments[0].device
    ),
)


@register_flop_formula(torch.ops.megatron_opt.refresh_bases)
def _refresh_flops(
    moments: Shapes, seconds: Shapes, lefts: Shapes, rights: Shapes, *rest: object, **options: object
) -> int:
    """4mn(m + n) to turn the moment, 2K³ for the image of each basis."""
    images = two_sided(lefts, lefts, []) + two_sided(rights, rights, [])
    return 2 * two_sided(moments, lefts, rights) + images


def refresh_bases(
    moments: Tensors,
    seconds: Tensors,
    bases: Mapping[int, Tensors],
    factors: Mapping[int, Tensors],
    shift: float = 0.0,
) -> Tensor:
    """`power_step` of blocks whose factors have full rank, by Cholesky QR; first moments turn along, second ones are
    reordered.

    Lists of (m, n) or (B, m, n) as `projection.project_adam`'s, all fp32 on CPU and in place; by side 0 and 1 the
    bases and factors (…, m, m) and (…, n, n). Returns (blocks,) whether each was found: where a column is rounding
    noise or Cholesky QR gives up, a block stays as it was.
    """
    sides = [bases.get(0, ()), bases.get(1, ()), factors.get(0, ()), factors.get(1, ())]
    levels = [_noise(moments[0].dtype, size) for size in moments[0].shape[-2:]]
    floor = _FLOOR * torch.finfo(moments[0].dtype).eps
    return _refresh_bases(moments[0].device, moments, seconds, *sides, shift, floor, *levels)


def rotation(factor: Tensor, basis: Tensor, columns: Tensor) -> Tensor:
    """How far (…) the basis is from the factor's: ‖offdiag(QᵀAQ)‖/‖QᵀAQ‖ on the given columns of Q. 2cK² FLOPs."""
    probe = basis.index_select(-1, columns)
    image = factor @ probe
    total = image.square().sum((-2, -1))
    aligned = (probe * image).sum(-2).square().sum(-1)
    return ((total - aligned).clamp_min(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
