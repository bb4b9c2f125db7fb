"""Error of narrow optimizer state: direction after noisy steps beside fp32 state's, bases a refresh makes, bytes a parameter.

`python benchmarks/state_precision.py` prints the tables of docs/optimizers.md. Gradients are a slowly turning mean plus
noise of its size, 512×512; the figure is ‖u − u₃₂‖/‖u₃₂‖ at the last of 100 steps. `--bytes` prints the third table, of a 7B model
by its plan, without a run.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_opt.cost_model.cluster import load
from megatron_opt.cost_model.flags import parse
from megatron_opt.cost_model.step import predict
from megatron_opt.kernels import eigenbasis
from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer

SIDE, STEPS = 512, 100
FACTORS, MOMENTS = {"factor_precision": "bf16"}, {"moment_dtype": "bf16"}
BOTH, CODES = FACTORS | MOMENTS, FACTORS | {"moment_dtype": "int8"}
CASES = {
    "adamw": [{"state_dtype": "bf16"}, {"state_dtype": "bf16", "rounding": "stochastic"}, {"state_dtype": "int8"},
              {"state_dtype": "int8", "rounding": "stochastic"}],
    "muon": [{"momentum_dtype": "bf16"}, {"momentum_dtype": "int8"}],
    "dion": [MOMENTS, {"moment_dtype": "int8"}],
    "soap": [FACTORS, MOMENTS, BOTH, CODES],
    "kl_soap": [BOTH],
    "shampoo": [BOTH],
    "kron": [BOTH, CODES],
}  # fmt: skip
BYTES = {
    "adamw": ["", "--adamw-state-dtype bf16", "--adamw-state-dtype int8"],
    "lion": ["", "--lion-state-dtype bf16", "--lion-state-dtype int8"],
    "muon": ["", "--muon-momentum-dtype bf16", "--muon-momentum-dtype int8"],
    **{
        name: ["", *(f"--{name}-factor-precision bf16 --{name}-moment-dtype {kind}" for kind in ("bf16", "int8"))]
        for name in ("soap", "shampoo", "kron")
    },
}
WEIGHTS = {
    "bf16": "",
    "FP8, bf16 beside it": "--fp8-format e4m3 --fp8-recipe blockwise",
    "FP8": "--fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather",
}


def gradients() -> list[Tensor]:
    """The gradients of all steps."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    turns = torch.arange(1, STEPS + 1) / 50.0
    return [first * t.cos() + second * t.sin() + torch.randn(SIDE, SIDE, generator=generator) for t in turns]


def directions(name: str, options: dict[str, str]) -> tuple[Tensor, float, float | None]:
    """The last direction; bytes of state a parameter; ‖QᵀQ − I‖/√k of SOAP's left basis."""
    optimizer = registry.build(name, options | ({"fp32_matmul_prec": "high"} if name == "muon" else {}))
    info, param = MatrixInfo("w", (SIDE, SIDE)), torch.zeros(SIDE, SIDE)
    state = optimizer.init_state(param, info) if isinstance(optimizer, MatrixOptimizer) else optimizer.init_state(param)
    u = param
    for t, grad in enumerate(gradients(), 1):
        if isinstance(optimizer, MatrixOptimizer):
            u = optimizer.update([grad], [state], t, [info])[0]
        else:
            u = torch.zeros(SIDE, SIDE)
            optimizer.update([u], [grad], [state], t, 1.0, 0.0)
    oblique = None
    if name.endswith("soap"):
        basis = state["q_0_0"][0].double()
        oblique = float((basis.mT @ basis - torch.eye(SIDE)).norm()) / SIDE**0.5
    return u, sum(x.numel() * x.element_size() for x in state.values()) / SIDE**2, oblique


def nearest(x: Tensor) -> Tensor:
    """fp32 numbers that bf16 holds."""
    return x.bfloat16().float()


def stochastic(x: Tensor) -> Tensor:
    """The same, up or down with the probability that keeps the mean."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32)
    return ((x.view(torch.int32) + noise) & -65536).view(torch.float32)


def refreshed(rounding: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """Means over ten refreshes of a factor and a basis kept with a rounding: error of the factor, share of the exact factor that the
    basis leaves off the diagonal, and the same of a basis from exact ones.
    """
    exact = kept = torch.zeros(1, SIDE, SIDE)
    base = basis = torch.eye(SIDE).unsqueeze(0)
    results = []
    for t, grad in enumerate(gradients(), 1):
        outer = (grad @ grad.mT).unsqueeze(0)
        exact, kept = exact * 0.95 + 0.05 * outer, rounding(kept * 0.95 + 0.05 * outer)
        if t % 10 == 0:
            base, basis = (eigenbasis.power_step(a, q, SIDE)[0] for a, q in ((exact, base), (kept, basis)))
            basis = rounding(basis)
            off = []
            for q in (basis, base):
                turned = q.mT @ exact @ q
                off.append(float((turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).norm() / turned.norm()))
            results.append((float((kept - exact).norm() / exact.norm()), *off))
    return tuple(sum(column) / len(results) for column in zip(*results))  # type: ignore[return-value]


def print_errors() -> None:
    print("| optimizer | state | bytes a parameter | error of the direction | ‖QᵀQ − I‖/√k |\n|---|---|---|---|---|")
    for name, several in CASES.items():
        exact, wide, oblique = directions(name, {})
        print(f"| `{name}` | fp32 | {wide:.3f} | 0 | {'' if oblique is None else f'{oblique:.1e}'} |")
        for options in several:
            u, held, oblique = directions(name, options)
            error = float((u - exact).norm() / exact.norm())
            said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items())
            print(f"| `{name}` | {said} | {held:.3f} | {error:.2%} | {'' if oblique is None else f'{oblique:.1e}'} |")
    print(
        "\n| rounding of factor and basis | error of the factor | basis leaves off the diagonal | of exact ones |\n|---|---|---|---|"
    )
    for rounding in (nearest, stochastic):
        error, off, of_exact = refreshed(rounding)
        print(f"| {rounding.__name__} | {error:.2e} | {off:.4f} | {of_exact:.4f} |")


def print_bytes() -> None:
    """Bytes a parameter of a llama-7b on one GPU, and gradients in fp32 and main copies among them."""
    print("| optimizer, state | state | " + " | ".join(f"all, weights in {kind}" for kind in WEIGHTS) + " |")
    print("|---|---:|" + "---:|" * len(WEIGHTS))
    for name, several in BYTES.items():
        for options in several:
            row = []
            for weights in WEIGHTS.values():
                words = f"--preset llama-7b --use-distributed-optimizer --global-batch-size 1 --optimizer {name} {options} {weights}"
                step = predict(parse(words.split())[0], load("h100"), 1, exact=False)
                m, n = step.memory, step.model.total_parameters
                held = m.parameters + m.fp8_weights + m.gradients + m.main_copies + m.optimizer_state
                row = row or [f"{m.optimizer_state / n:.2f}"]
                row.append(f"{held / n:.2f}")
            kind = options.rpartition(" ")[2] or "fp32"
            print(f"| `{name}`, {kind} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", action="store_true", help="the table of bytes alone, which no run is needed for")
    print_bytes() if parser.parse_args().bytes else print_errors()
