"""Every command where a package is missing: a sentence with what brings it, never a traceback."""

import ast
import subprocess
import sys
from pathlib import Path

from megatron_opt.extras import missing_package

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = """
import contextlib, io, json, os, sys
from pathlib import Path

os.chdir(sys.argv[1])
root = Path(sys.argv[2])
blocked = set(sys.argv[3].split(","))


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
from megatron_opt import cli

Path("tokenizer.json").write_text("{}")
Path("some.parquet").write_bytes(b"PAR1")
Path("some.jsonl.zst").write_bytes(b"zst")
Path("empty").mkdir()
commands = [
    ["data", "corpus", "--input", "some.parquet", "--output", "out"],
    ["data", "corpus", "--input", "some.jsonl.zst", "--output", "out"],
    ["data", "tokenizer", "--from", "tokenizer.json", "--output", "adopted"],
    ["data", "index", "--input", "some.jsonl", "--tokenizer", "tokenizer.json", "--output-prefix", "out/x"],
    ["data", "inspect", "nothing"],
    ["doctor", "--help"],
    ["status", "empty"],
    ["train", "--dry-run"],
    ["study", "plan", str(root / "examples/studies/demo.yaml")],
    ["study", "demo-paper", "--output", "paper"],
    ["study", "fit", "empty"],
    ["study", "report", "empty"],
    ["study", "verify", "empty"],
    ["cost", "tables", "--cluster", "h100", "--output", "tables", "--optimizers", "adamw"],
    ["cost", "search", "--preset", "llama-7b", "--cluster", "h100", "--gpus", "8"],
    ["migrate", "plan", "--preset", "llama-7b", "--to", "muon", "--gpus", "64", "--cluster", "h100-node"],
]
answers = []
for words in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except SystemExit as leaving:
            code = leaving.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    answers.append((words[:2], code, err.getvalue()))
print(json.dumps(answers))
"""


def test_every_command_without_what_a_small_installation_lacks(tmp_path):
    blocked = "matplotlib,pyarrow,scipy,tiktoken,tokenizers,transformers,wandb,zstandard"
    command = [sys.executable, "-c", COMMANDS, str(tmp_path), str(ROOT), blocked]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={"PATH": "", "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    answers = ast.literal_eval(done.stdout.strip().splitlines()[-1].replace("null", "None"))
    for words, code, err in answers:
        assert code in (0, 1, 2), (words, code)
        assert "Traceback" not in err
    said = "\n".join(err for _, code, err in answers if code)
    for package in ("scipy", "pyarrow", "tokenizers", "zstandard"):
        assert package in said, said
    assert "megatron-opt[data]" in said


def test_a_missing_module_of_ours_is_a_defect_and_a_submodule_of_what_is_there_too():
    assert missing_package(ModuleNotFoundError("x", name="megatron_opt.nothing")) is None
    assert missing_package(ModuleNotFoundError("x", name="numpy.nothing")) is None
    assert "megatron-opt[wandb]" in str(missing_package(ModuleNotFoundError("x", name="wandb")))
    assert "brings it" in str(missing_package(ModuleNotFoundError("x", name="no_such_package_here")))
