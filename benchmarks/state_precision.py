"""Error of narrow optimizer state: direction after noisy steps beside fp32 state's, and bytes a parameter.

`python benchmarks/state_precision.py` prints the table of docs/optimizers.md. Gradients are a slowly turning mean plus
noise of its size, 512×512; the figure is ‖u − u₃₂‖/‖u₃₂‖ at the last of 100 steps.
"""

import torch

from megatron_opt.optimizers import registry
from megatron_opt.optimizers.base import MatrixInfo, MatrixOptimizer

SIDE, STEPS = 512, 100
CASES = {
    "adamw": [{"state_dtype": "bf16"}, {"state_dtype": "bf16", "rounding": "stochastic"}, {"state_dtype": "int8"},
              {"state_dtype": "int8", "rounding": "stochastic"}],
    "muon": [{"momentum_dtype": "bf16"}, {"momentum_dtype": "int8"}],
}  # fmt: skip


def directions(name: str, options: dict[str, str]) -> tuple[torch.Tensor, float]:
    """The last direction, and bytes of state a parameter."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    rule = registry.build(name, options | ({"fp32_matmul_prec": "high"} if name == "muon" else {}))
    info, param = MatrixInfo("w", (SIDE, SIDE)), torch.zeros(SIDE, SIDE)
    state = rule.init_state(param, info) if isinstance(rule, MatrixOptimizer) else rule.init_state(param)
    u = param
    for t in range(1, STEPS + 1):
        turn = torch.tensor(t / 50.0)
        grad = first * turn.cos() + second * turn.sin() + torch.randn(SIDE, SIDE, generator=generator)
        if isinstance(rule, MatrixOptimizer):
            u = rule.update([grad], [state], t, [info])[0]
        else:
            u = torch.zeros(SIDE, SIDE)
            rule.update([u], [grad], [state], t, 1.0, 0.0)
    return u, sum(x.numel() * x.element_size() for x in state.values()) / SIDE**2


def main() -> None:
    print("| optimizer | state | rounding | bytes a parameter | error of the direction |\n|---|---|---|---|---|")
    for name, several in CASES.items():
        exact, wide = directions(name, {})
        print(f"| `{name}` | fp32 | | {wide:.3f} | 0 |")
        for options in several:
            u, held = directions(name, options)
            error = float((u - exact).norm() / exact.norm())
            kind = options.get("state_dtype") or options["momentum_dtype"]
            print(f"| `{name}` | {kind} | {options.get('rounding', 'nearest')} | {held:.3f} | {error:.2%} |")


if __name__ == "__main__":
    main()
