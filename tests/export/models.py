"""Tiny models of every family, with random weights, in this project's checkpoints and in Hugging Face's folders."""

from argparse import Namespace
from pathlib import Path

import torch

from megatron_opt.export import families, names, writing
from megatron_opt.export.model import validated

SIZE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 24 --max-position-embeddings 24 "
LLAMA = SIZE + (
    "--normalization RMSNorm --swiglu --position-embedding-type rope --disable-bias-linear --ffn-hidden-size 48 "
)
UNTIED = "--untie-embeddings-and-output-weights "
GPT2 = SIZE + "--position-embedding-type learned_absolute "
MIXTRAL = LLAMA + UNTIED + "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss "
CASES = {
    "llama": LLAMA + UNTIED + "--norm-epsilon 1e-5",
    "llama-gqa-tied": LLAMA + "--group-query-attention --num-query-groups 2 --rotary-base 500000 --norm-epsilon 1e-3",
    "llama-bias-head": LLAMA.replace("--disable-bias-linear ", "") + UNTIED + "--kv-channels 16",
    "llama-scaled-rope": LLAMA + UNTIED + "--use-rope-scaling --rotary-base 5000",
    "gpt2": GPT2,
    "gpt2-exact": GPT2 + UNTIED + "--no-bias-gelu-fusion --ffn-hidden-size 40 --norm-epsilon 1e-3",
    "mixtral": MIXTRAL + "--group-query-attention --num-query-groups 2",
    "bf16": LLAMA + UNTIED + "--bf16",
}
IDS, PADDED = 90, 96


def flags(words: str) -> Namespace:
    """Checked flags of a model whose vocabulary of 90 ids is padded to 96."""
    return validated([*words.split(), "--padded-vocab-size", str(PADDED)], IDS)


def weights(args: Namespace, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random parameters by canonical name; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for parameter in names.parameters(families.spec_of(args)):
        value = torch.randn(parameter.shape, generator=generator) * 0.2
        if "norm" in parameter.name and parameter.name.endswith("weight"):
            value += 1
        found[parameter.name] = value.to(args.params_dtype)
    return found


def save(args: Namespace, values: dict[str, torch.Tensor], folder: Path) -> Path:
    """A checkpoint of them."""
    writing.write(args, values.__getitem__, folder)
    return folder
