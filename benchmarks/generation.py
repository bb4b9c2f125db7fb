"""Seconds to generate on the CPU: all read again, keys and values kept, and `transformers` with its cache on the exported model.

One Llama of random weights in fp32, the likeliest token each time, one thread; the three in turn in every repeat, medians. Seconds are
those that the process has computed, so that other work on the machine counts little. The three texts must be one, token for token.
usage: python benchmarks/generation.py [--size 1M 10M] [--lengths 32 128 256] [--repeats 3]
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SIZES = {"1M": (4, 128, 384, 4), "10M": (8, 320, 896, 5)}  # layers, hidden, ffn, heads
VOCABULARY, PROMPT = 2048, 16
PACKAGES = Path(sys.prefix) / "transformers"  # by `make setup`
Generate = Callable[[list[int], int], list[int]]


def checkpoint(size: str, longest: int, folder: Path) -> Path:
    """A checkpoint whose logits are far apart."""
    from megatron_opt.export import families, names, writing
    from megatron_opt.export.model import validated

    layers, hidden, ffn, heads = SIZES[size]
    flags = f"""--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} --num-attention-heads {heads}
        --seq-length {PROMPT + longest} --max-position-embeddings {PROMPT + longest} --normalization RMSNorm --swiglu
        --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
        --padded-vocab-size {VOCABULARY}"""
    args = validated(flags.split(), VOCABULARY)
    generator, values = torch.Generator().manual_seed(0), {}
    for one in names.parameters(families.spec_of(args)):
        value = torch.randn(one.shape, generator=generator) * (one.shape[-1] ** -0.5)
        values[one.name] = torch.ones(one.shape) if len(one.shape) == 1 else value
    writing.write(args, values.__getitem__, folder)
    return folder


def ours(source: Any, kept: bool) -> Generate:
    """Our model, as `megatron-opt generate` reads it; inside `one_process`."""
    from megatron_opt.export import kv_cache, model
    from megatron_opt.export.generating import sample

    flags = model.of_checkpoint(source.args)
    forward = partial(model.logits, model.build(flags, source))

    def generate(prompt: list[int], count: int) -> list[int]:
        with mock.patch.object(kv_cache, "is_kept", lambda flags: kept):
            reader = kv_cache.Reader(forward, flags, 1, len(prompt) + count)
        return list(sample(reader, prompt, count, 0.0, 1.0, 0, VOCABULARY, None))

    return generate


def theirs(folder: Path) -> Generate:
    """The same weights in `transformers`."""
    sys.path.append(str(PACKAGES))
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        more = {"do_sample": False, "use_cache": True, "eos_token_id": None, "pad_token_id": 0}
        with torch.inference_mode():
            text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **more)
        return text[0, len(prompt) :].tolist()

    return generate


def measure(size: str, lengths: list[int], repeats: int) -> None:
    """Print a row for each length."""
    from megatron_opt.export.exporting import export
    from megatron_opt.export.model import one_process
    from megatron_opt.export.reading import Checkpoint

    with contextlib.ExitStack() as until:
        place = Path(until.enter_context(tempfile.TemporaryDirectory()))
        saved = checkpoint(size, max(lengths), place / "ours")
        export(saved, place / "hf")
        source = Checkpoint(saved)
        until.enter_context(one_process())
        ways = {"all read again": ours(source, False), "kept": ours(source, True), "theirs": theirs(place / "hf")}
        prompt = torch.randint(0, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
        for way in ways.values():
            way(prompt, 4)  # what a first call sets up
        for count in lengths:
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeats):
                texts = []
                for name, way in ways.items():
                    began = time.process_time()
                    texts.append(way(prompt, count))
                    seconds[name].append(time.process_time() - began)
                if any(text != texts[0] for text in texts):
                    sys.exit(f"{size}, {count} tokens: the texts differ")
            again, kept, peer = (statistics.median(one) for one in seconds.values())
            distinct = len(set(texts[0]))
            print(
                f"| {size} | {count} | {again:.2f} | {kept:.2f} | {peer:.2f} | {again / kept:.1f} | {peer / kept:.2f} | {distinct} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 256])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"processor seconds, one thread, fp32, a prompt of {PROMPT} tokens, median of {options.repeats}; all texts agree"
    )
    print(
        "| size | new tokens | ours, all read again | ours, kept | transformers | again/kept | transformers/kept | distinct |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for size in options.size:
        measure(size, options.lengths, options.repeats)


if __name__ == "__main__":
    main()
