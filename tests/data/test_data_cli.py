"""The commands as a user types them."""

import subprocess
import sys

import pytest

from megatron_opt.cli import main


def run(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    return code, capsys.readouterr()


def test_from_text_to_tokens(tmp_path, corpus, capsys):
    code, said = run(capsys, "corpus", "--input", corpus, "--output", tmp_path / "c", "--split", "90,10,0")
    assert code == 0 and "train.jsonl: 108 documents" in said.out and "test.jsonl: 0 documents" in said.out
    model = tmp_path / "c" / "tokenizer.model"
    train = tmp_path / "c" / "train.jsonl"
    code, said = run(capsys, "tokenizer", "--input", train, "--vocab-size", 380, "--output", model)
    assert code == 0 and "380 tokens, end of document 2" in said.out
    code, said = run(capsys, "index", "--input", train, "--tokenizer", model, "--output-prefix", tmp_path / "train")
    assert code == 0 and "108 documents" in said.out and "bytes per token" in said.out
    assert f"--data-path {tmp_path / 'train'} --tokenizer-type SentencePieceTokenizer" in said.out
    code, said = run(capsys, "inspect", tmp_path / "train", "--tokenizer", model)
    assert code == 0 and "closes 108 of 108 documents" in said.out
    assert said.err == ""


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    code, said = run(capsys, "inspect", tmp_path / "nothing")
    assert code == 2 and said.out == ""
    assert said.err.count("\n") == 1 and said.err.startswith("megatron-opt data: ") and "nothing.idx" in said.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["corpus", "--output", "x"],
        ["corpus", "--name", "large", "--output", "x"],
        ["tokenizer", "--input", "x", "--output", "y", "--vocab-size", "-3"],
        ["index", "--input", "x", "--tokenizer", "y", "--output-prefix", "z", "--workers", "none"],
        ["nonsense"],
    ],
)
def test_bad_flags(arguments, capsys):
    assert main(["data", *arguments]) == 2
    assert "--help" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from megatron_opt.data.cli import main\n"
        "try: main(['--help'], 'p')\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'megatron', 'sentencepiece', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_work_needs_no_torch(tmp_path, corpus, model):
    code = (
        "import sys; from megatron_opt.cli import main\n"
        "assert main(['data', *sys.argv[1:]]) == 0\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    arguments = [
        "index",
        "--input",
        corpus,
        "--tokenizer",
        model,
        "--output-prefix",
        tmp_path / "d",
        "--workers",
        "1",
    ]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
