"""How well SOAP's bases fit after a warm start, beside those of the first gradients.

`python benchmarks/soap_start.py --data DIR --load CHECKPOINTS` (an AdamW checkpoint of `benchmarks/warm_start.py`, such as
OUTPUT/1/adamw/checkpoints) makes a warm start, runs steps that move nothing (a learning rate of 1e-12) and compares bases
against the factors of gradients that none of them has seen: the share of a factor's off-diagonal part in the basis,
‖offdiag(QᵀAQ)‖/‖A‖, mean over all hidden matrices. 0 is its eigenbasis.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from warm_start import MODEL, RULES, SHARE, run

FIRST = (1, 4, 16)  # numbers of gradients that bases are built from
SEEN, HELD_OUT = 40, 200  # steps before the gradients that judge, and their number


class Recorder:
    """Collects factors of first gradients and of later ones, and bases on the way, inside `Soap.update`."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}  # by matrix
        self.factors: dict[tuple[str, str], Tensor] = {}
        self.bases: dict[str, dict[tuple[str, int], Tensor]] = {}

    def install(self) -> None:
        from megatron_opt.optimizers.soap import Soap

        update = Soap.update

        def recorded(optimizer: Any, grads: Any, states: Any, step: int, infos: Any) -> Any:
            for grad, state, info in zip(grads, states, infos, strict=True):
                self.see(optimizer, grad, state, info)
            return update(optimizer, grads, states, step, infos)

        Soap.update = recorded  # type: ignore[method-assign]

    def see(self, optimizer: Any, grad: Tensor, state: dict[str, Tensor], info: Any) -> None:
        if info.kind != "hidden":
            return
        count = self.steps[info.name] = self.steps.get(info.name, 0) + 1
        names = {2: "1 step", 11: "10 steps", 21: "20 steps", 41: "40 steps"}
        for side in optimizer.sides(info):
            key = (info.name, side)
            if count in names:
                self.bases.setdefault(names[count], {})[key] = state[f"q_0_{side}"][0].clone()
            outer = (grad @ grad.mT if side == 0 else grad.mT @ grad).double()
            for kind in [f"first {n}" for n in FIRST if count <= n] + ["judge"] * (count > SEEN):
                at = (kind, f"{info.name}.{side}")
                self.factors[at] = self.factors.get(at, 0.0) + outer

    def table(self) -> list[tuple[str, float]]:
        """(basis, mean off-diagonal share), best last."""
        rows = []
        keys = list(self.bases["1 step"])
        kinds: dict[str, Any] = {"none": lambda key: torch.eye(self.bases["1 step"][key].shape[0])}
        kinds |= {f"first {n} gradients": lambda key, n=n: eigenbasis(self.at(f"first {n}", key)) for n in FIRST}
        kinds |= {f"warm start after {name}": found.__getitem__ for name, found in self.bases.items()}
        for name, basis in kinds.items():
            shares = [off_diagonal(self.at("judge", key), basis(key).double()) for key in keys]
            rows.append((name, sum(shares) / len(shares)))
        return rows

    def at(self, kind: str, key: tuple[str, int]) -> Tensor:
        return self.factors[kind, f"{key[0]}.{key[1]}"]


def eigenbasis(factor: Tensor) -> Tensor:
    """Its eigenvectors."""
    return torch.linalg.eigh(factor).eigenvectors


def off_diagonal(factor: Tensor, basis: Tensor) -> float:
    """‖offdiag(QᵀAQ)‖/‖A‖."""
    inside = basis.mT @ factor @ basis
    return float(torch.linalg.norm(inside - torch.diag(inside.diagonal())) / torch.linalg.norm(factor))


def main() -> None:
    """Convert, run still steps, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--load", required=True, type=Path, help="checkpoints of an AdamW run of warm_start.py")
    parser.add_argument("--iterations", type=int, default=2000, help="as given to warm_start.py")
    args = parser.parse_args()
    switch = int(SHARE * args.iterations)
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *MODEL,
            *RULES["soap"][0].split(),
            "--seed",
            "1",
            "--override-opt_param-scheduler",
            "--eval-iters",
            "0",
        ]
        flags += ["--train-iters", str(switch + SEEN + HELD_OUT), "--lr", "1e-12", "--lr-decay-style", "constant"]
        flags += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(args.data / "tokenizer.model")]
        flags += ["--train-data-path", str(args.data / "train"), "--data-cache-path", f"{folder}/cache"]
        flags += ["--valid-data-path", str(args.data / "valid"), "--eval-interval", "100000"]
        start, words = Path(folder) / "start", ["--load", str(args.load), "--ckpt-step", str(switch)]
        run("megatron_opt.migrate.checkpoint", [*flags, *words, "--save", str(start)], start / "none")
        recorder = Recorder()
        recorder.install()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        from megatron_opt.pretrain import main as train

        train([*flags, "--load", str(start), "--output-dir", f"{folder}/run"])
        for name, share in recorder.table():
            print(f"{name:<28} {share:.3f}")


if __name__ == "__main__":
    main()
