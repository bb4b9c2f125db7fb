"""`study init`: a study file with comments, ready to be changed."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opt.errors import UserError
from megatron_opt.files import write_output
from megatron_opt.study.hyperparameters import PAPER_GRIDS
from megatron_opt.study.study_file import read_study

_HEAD = """\
# A study: optimizers compared at equal tuning effort. Every key is described in docs/study.md.
name: {name}
baseline: {baseline}
sequence_length: 256
tokens_per_parameter: 20          # 1x of the Chinchilla ratio
ratios: [1, 4]
models:                           # a preset of this package, or a shape
  s: {{num_layers: 4, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 2}}
  m: {{num_layers: 4, hidden_size: 96, ffn_hidden_size: 288, num_attention_heads: 3}}
  l: {{num_layers: 4, hidden_size: 128, ffn_hidden_size: 384, num_attention_heads: 4}}
data:                             # prefixes of indexed datasets; relative paths start at this file
  tokenizer: data/tokenizer.model
  train: [data/train]
  valid: [data/valid]
defaults: {{batch_size: 16, clip_grad: 1.0}}
optimizers:                       # `grid: default` takes the published search grid, or the rule's own, instead
"""

_TAIL = """\
seeds: [1, 2, 3, 4]               # the search uses the first; winners get two more, and further ones where it is open
thresholds: {adopt: 0.003, insensitive: 0.0064}
effort: equal                     # or free: each optimizer stops when its search has converged
phases:
  - {kind: descent, regimes: [s@1x, s@4x, m@1x]}
  - {kind: restricted, regimes: [m@4x]}
  - {kind: predict, regimes: [l@1x, l@4x]}
  - seeds
executor: {kind: local, ranks: 1, retries: 2}
budget: {hours: 8, runs: 24}      # core-hours in all; runs of one optimizer in one regime
flags: {log_interval: 10, eval_iters: 8}
"""

_SPACES = {
    "adamw": (
        "{beta1: 0.9, beta2: 0.98, warmup: 0.1}",
        "{lr: [0.002, 0.004, 0.008, 0.016], weight_decay: [0.1, 0.2]}",
    ),
    "muon": (
        "{momentum: 0.95, beta1: 0.9, beta2: 0.98, scalar_lr_ratio: 0.2, decay: 0.8}",
        "{lr: [0.008, 0.016, 0.032, 0.064], weight_decay: [0.1, 0.2]}",
    ),
    "soap": (
        "{beta1: 0.95, beta2: 0.98, shampoo_beta: 0.95, precondition_frequency: 10, warmup: 0.1}",
        "{lr: [0.002, 0.004, 0.008, 0.016], weight_decay: [0.1, 0.2]}",
    ),
}
_OTHER = ("{warmup: 0.1}", "{lr: [0.001, 0.002, 0.004, 0.008], weight_decay: [0.1, 0.2]}")


def study_text(name: str, optimizers: list[str]) -> str:
    """The text of a new study file."""
    text = _HEAD.format(name=name, baseline=optimizers[0])
    for optimizer in optimizers:
        start, grid = _SPACES.get(optimizer, _OTHER)
        text += f"  {optimizer}:\n    start: {start}\n    grid: {grid}\n"
    return text + _TAIL


def main(argv: list[str], prog: str) -> int:
    """Write a study file; refuses to replace one."""
    parser = argparse.ArgumentParser(prog=prog)
    parser.add_argument("study", type=Path, help="file to write (YAML)")
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=["adamw", "muon", "soap"],
        metavar="NAME",
        help=f"the baseline first; the paper has grids for {', '.join(PAPER_GRIDS)}",
    )
    options = parser.parse_args(argv)
    if options.study.exists():
        raise UserError(f"{options.study} exists; choose another name")
    write_output(options.study, study_text(options.study.stem, options.optimizers))
    read_study(options.study)
    print(f"{options.study} written; next: {prog.removesuffix(' init')} plan {options.study}")
    return 0
