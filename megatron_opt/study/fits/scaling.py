"""Joint scaling laws of several optimizers, fitted to final losses.

`separate` fits a law to each optimizer alone. `shared` gives all optimizers one law and each its own
efficiency
factors ρ_N, ρ_D, one for the baseline (arXiv 2602.07712). A weak Gaussian prior on the exponents, centered
on the
published ones, keeps directions finite that a few sizes cannot determine; `Fit.diagnosis` says where it, and
not
the data, decided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import chi2

from megatron_opt.errors import UserError
from megatron_opt.study.fits.law import CORE, law, tokens_for
from megatron_opt.study.fits.observations import Observations
from megatron_opt.study.fits.solver import Solution, solve

KINDS = ("shared", "separate")
FORMS = ("additive", "coupled")


@dataclass(frozen=True)
class Prior:
    """Gaussian prior on a, b and log κ; a and b are centered on arXiv 2203.15556, table A3."""

    a: float = 0.34
    b: float = 0.28
    width: float = 0.15
    kappa: float = 0.0
    kappa_width: float = 0.75


@dataclass(frozen=True)
class Fit:
    """A fitted law and its bootstrap copies."""

    kind: str
    form: str
    data: Observations
    theta: np.ndarray
    """(blocks, p): one block for shared, one an optimizer for separate"""
    origin: tuple[float, float]
    """geometric means of N and D: the fit works in N/N0 and D/D0"""
    sigma: float
    """standard error of one loss: residual spread or the noise floor, whichever is larger"""
    residuals: np.ndarray
    """fitted − observed"""
    prior: Prior
    draws: np.ndarray = field(default_factory=lambda: np.empty((0, 1, CORE)))
    """(resamples, blocks, p)"""

    @property
    def optimizers(self) -> tuple[str, ...]:
        return self.data.optimizers

    def block(self, optimizer: str) -> tuple[int, int]:
        """(block of θ, position of the optimizer in that block)."""
        if optimizer not in self.optimizers:
            raise UserError(f"the fit has no {optimizer!r}; it has {', '.join(self.optimizers)}")
        k = self.optimizers.index(optimizer)
        return (0, k) if self.kind == "shared" else (k, 0)

    def predict(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Final loss at N parameters and D tokens; n and d broadcast."""
        return self.loss_at(self.theta, optimizer, n, d)

    def predict_draws(self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """The same of every bootstrap copy: (resamples, *shape)."""
        return np.stack([self.loss_at(theta, optimizer, n, d) for theta in self.draws])

    def loss_at(self, theta: np.ndarray, optimizer: str, n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
        """Final loss by a given θ, such as a bootstrap copy; n and d broadcast."""
        block, k = self.block(optimizer)
        log_n, log_d = np.broadcast_arrays(
            np.log(np.asarray(n, float) / self.origin[0]), np.log(np.asarray(d, float) / self.origin[1])
        )
        shape = log_n.shape
        values, _ = law(theta[block], np.full(log_n.size, k), log_n.ravel(), log_d.ravel())
        return values.reshape(shape)

    def speedup(
        self, optimizer: str, n: np.ndarray | float, d: np.ndarray | float, theta: np.ndarray | None = None
    ) -> np.ndarray:
        """Tokens the baseline needs for the optimizer's loss at (N, D), over D; inf where it never
        gets there.
        """
        theta = self.theta if theta is None else theta
        block, k = self.block(self.optimizers[0])
        loss = self.loss_at(theta, optimizer, n, d)
        log_d = tokens_for(theta[block], k, loss, np.log(np.asarray(n, float) / self.origin[0]))
        return np.exp(log_d) * self.origin[1] / np.asarray(d, float)

    def gradient(self, optimizer: str, n: float, d: float) -> np.ndarray:
        """dL/dθ at one point, flat over all blocks: what one more run there would tell."""
        block, k = self.block(optimizer)
        gradient = np.zeros(self.theta.shape)
        point = np.log([n / self.origin[0]]), np.log([d / self.origin[1]])
        gradient[block] = law(self.theta[block], np.array([k]), *point)[1][0]
        return gradient.ravel()

    def efficiency(self, optimizer: str, theta: np.ndarray | None = None) -> tuple[float, float]:
        """(ρ_N, ρ_D) of a shared fit: the baseline needs ρ_N times the parameters and ρ_D times the
        tokens.
        """
        if self.kind != "shared":
            raise UserError("efficiency factors exist only in the shared fit")
        x, k = (self.theta if theta is None else theta)[0], self.block(optimizer)[1]
        column = CORE + 2 * (k - 1)
        with np.errstate(over="ignore"):  # what a few runs do not determine may be infinite
            return (float(np.exp(x[column])), float(np.exp(x[column + 1]))) if k else (1.0, 1.0)

    def diagnosis(self) -> list[str]:
        """Sentences on what the data cannot determine; empty for a well-conditioned fit."""
        sentences = []
        free = [i for i in range(self.theta.shape[1]) if i != 5 or self.form == "coupled"]
        for block in range(len(self.theta)):
            who = "all optimizers" if self.kind == "shared" else self.optimizers[block]
            mine = [k for k in range(len(self.data)) if self.block(self.optimizers[self.data.index[k]])[0] == block]
            rows = [self.gradient(self.optimizers[self.data.index[k]], self.data.n[k], self.data.d[k]) for k in mine]
            jacobian = np.array(rows).reshape(len(mine), *self.theta.shape)[:, block][:, free]
            condition = np.linalg.cond(jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300))
            if condition > 1e3:
                sentences.append(
                    f"The {self.kind} fit of {who} is ill-conditioned (condition number "
                    f"{condition:.0e}): its single "
                    "parameters mean little, and extrapolation rests on the prior as much as on the data."
                )
            for name, column, remedy in (("a", 2, "model size"), ("b", 4, "token budget")):
                spread = self.draws[:, block, column].std() if len(self.draws) else 0.0
                if spread > 0.7 * self.prior.width:
                    sentences.append(
                        f"The exponent {name} of {who} is set by the prior rather than by the data "
                        f"({self.theta[block, column]:.2f} ± {spread:.2f}); add a {remedy}."
                    )
        return sentences


def fit_law(
    data: Observations,
    kind: str = "shared",
    *,
    form: str | None = None,
    prior: Prior | None = None,
    noise: float = 0.0,
    resamples: int = 0,
    seed: int = 0,
    start: np.ndarray | None = None,
    origin: tuple[float, float] | None = None,
) -> Fit:
    """Fit one of KINDS with a robust loss from many starts.

    `form`: one of FORMS; by default additive with two sizes, and with more the one of lower AICc. `noise`:
    the noise
    floor, a lower bound on the standard error of a loss. `resamples`: parametric bootstrap copies, in which
    the
    prior's centers are drawn too, so that their spread is that of the posterior. `start`, with its `origin`,
    replaces
    the many starts by one, for a fit to almost the same data. Raises UserError for too few data.
    """
    _check(data, kind)
    prior = prior or Prior()
    if form is None:
        forms = FORMS if len(data.sizes) > 2 else FORMS[:1]
        fits = [_fit(data, kind, one, prior, noise, seed, start, origin) for one in forms]
        fit = min(fits, key=_aicc)
    else:
        fit = _fit(data, kind, form, prior, noise, seed, start, origin)
    return replace(fit, draws=_bootstrap(fit, resamples, seed)) if resamples else fit


def _check(data: Observations, kind: str) -> None:
    if len(data.sizes) < 2 or len(np.unique(data.d)) < 3:
        raise UserError("a joint law needs two model sizes and three token budgets; run more regimes")
    least = 4 if kind == "separate" else 2
    for name, count in zip(data.optimizers, np.bincount(data.index, minlength=len(data.optimizers))):
        if count < least:
            raise UserError(
                f"{name} has {count} results, the {kind} fit needs {least}; run more regimes or leave it out"
            )


def _parts(data: Observations, kind: str) -> list[Observations]:
    return [data] if kind == "shared" else [data.of(name) for name in data.optimizers]


def _fit(
    data: Observations,
    kind: str,
    form: str,
    prior: Prior,
    noise: float,
    seed: int,
    start: np.ndarray | None,
    origin: tuple[float, float] | None,
) -> Fit:
    origin = origin or (float(np.exp(np.log(data.n).mean())), float(np.exp(np.log(data.d).mean())))
    parts, rng = _parts(data, kind), np.random.default_rng(seed)
    sigma = max(noise, 2e-3)
    solutions: list[Solution] = []
    # The residual spread sets the weight of robust loss and prior; three rounds settle it.
    for round_ in range(3):
        solutions = [
            solve(
                _objective(part, part.loss, origin, sigma, prior, form),
                [solutions[i].x] if round_ else _starts(part, form, rng) if start is None else [start],
            )
            for i, part in enumerate(parts)
        ]
        residuals = _residuals(solutions, parts, data, sigma)
        sigma = max(noise, float(np.sqrt(np.sum(residuals**2) / _freedom(data, kind, form))), 1e-6)
    return Fit(kind, form, data, np.stack([s.x for s in solutions]), origin, sigma, residuals, prior)


def _residuals(solutions: list[Solution], parts: list[Observations], data: Observations, sigma: float) -> np.ndarray:
    residuals = np.empty(len(data))
    for block, (solution, part) in enumerate(zip(solutions, parts)):
        mask = slice(None) if len(parts) == 1 and len(part) == len(data) else data.index == block
        residuals[mask] = solution.residuals[: len(part)] * sigma
    return residuals


def _objective(
    part: Observations, loss: np.ndarray, origin: tuple[float, float], sigma: float, prior: Prior, form: str
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Weighted residuals of the losses, then of the prior on a, b and log κ."""
    log_n, log_d = np.log(part.n / origin[0]), np.log(part.d / origin[1])
    size = CORE + 2 * (len(part.optimizers) - 1)
    center = np.array([prior.a, prior.b, prior.kappa if form == "coupled" else 0.0])
    width = np.array([prior.width, prior.width, prior.kappa_width if form == "coupled" else 1e-6])
    rows = np.zeros((3, size))
    rows[[0, 1, 2], [2, 4, 5]] = 1 / width

    def function(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, jacobian = law(x, part.index, log_n, log_d)
        return (
            np.concatenate([(values - loss) / sigma, (x[[2, 4, 5]] - center) / width]),
            np.vstack([jacobian / sigma, rows]),
        )

    return function


def _starts(part: Observations, form: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Different splits of the loss between E and the two terms."""
    level, starts = float(part.loss.min()), []
    for _ in range(16):
        shares = rng.dirichlet([2.0, 1.0, 1.0])
        kappa = rng.uniform(-1.2, 0.0) if form == "coupled" else 0.0
        core = [
            np.log(level * shares[0]),
            np.log(level * shares[1]),
            rng.uniform(0.1, 0.6),
            np.log(level * shares[2]),
            rng.uniform(0.1, 0.6),
            kappa,
        ]
        starts.append(np.array(core + [0.0] * (2 * (len(part.optimizers) - 1))))
    return starts


def _parameters(data: Observations, kind: str, form: str) -> int:
    core, others = CORE if form == "coupled" else CORE - 1, len(data.optimizers) - 1
    return core + 2 * others if kind == "shared" else core * (others + 1)


def _freedom(data: Observations, kind: str, form: str) -> int:
    """Degrees of freedom; the prior pays for one parameter of each block."""
    blocks = 1 if kind == "shared" else len(data.optimizers)
    return max(1, len(data) - _parameters(data, kind, form) + blocks)


def _aicc(fit: Fit) -> float:
    """Akaike's criterion with its small-sample correction."""
    count, parameters = len(fit.data), _parameters(fit.data, fit.kind, fit.form)
    spread = max(float(np.mean(fit.residuals**2)), 1e-12)
    return count * np.log(spread) + 2 * parameters + 2 * parameters * (parameters + 1) / max(1, count - parameters - 1)


def _bootstrap(fit: Fit, resamples: int, seed: int) -> np.ndarray:
    """Refits to losses drawn around the fit, warm-started."""
    parts, rng = _parts(fit.data, fit.kind), np.random.default_rng(seed + 1)
    freedom, prior = _freedom(fit.data, fit.kind, fit.form), fit.prior
    fitted = [
        law(fit.theta[i], p.index, np.log(p.n / fit.origin[0]), np.log(p.d / fit.origin[1]))[0]
        for i, p in enumerate(parts)
    ]
    draws = np.empty((resamples, *fit.theta.shape))
    for i in range(resamples):
        # The spread is itself an estimate; drawing it too gives the heavier tails of Student's t.
        sigma = fit.sigma * np.sqrt(freedom / chi2.rvs(freedom, random_state=rng))
        for block, part in enumerate(parts):
            loss = fitted[block] + sigma * rng.standard_normal(len(part))
            x, z = fit.theta[block], rng.standard_normal(3)
            center = replace(
                prior,
                a=x[2] + prior.width * z[0],
                b=x[4] + prior.width * z[1],
                kappa=x[5] + prior.kappa_width * z[2],
            )
            objective = _objective(part, loss, fit.origin, fit.sigma, center, fit.form)
            draws[i, block] = solve(objective, [x], tolerance=1e-7).x
    return draws
