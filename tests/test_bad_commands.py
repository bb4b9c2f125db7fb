"""Numbers, words and files that no command can mean: exit code 2 and one sentence that names the flag or the file."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from megatron_opt import run_files
from megatron_opt.cli import main
from megatron_opt.errors import UserError, number
from megatron_opt.training import entry

_COST = "cost step --cluster h100 --preset llama-130m"
_PLAN = "migrate plan --cluster h100 --preset llama-130m --to muon"
# command line -> what the sentence must hold
WORDS = {
    **{f"{_COST} --gpus {text}": "--gpus" for text in ("0", "-8", "1.5", "nan", "many", "100000000000")},
    **{f"cost search --cluster h100 --gpus 8 --top {text}": "--top" for text in ("0", "-1", "nan")},
    **{f"cost calibrate --output c.yaml --ranks {text}": "--ranks" for text in ("-1", "x")},
    **{f"{_PLAN} --gpus 8 --tokens {text}": "--tokens" for text in ("nan", "-1", "0", "inf")},
    **{f"{_PLAN} --gpus 8 --chinchilla {text}": "--chinchilla" for text in ("nan", "-1", "0", "one")},
    **{f"{_PLAN} --gpus 8 --done {text}": "--done" for text in ("nan", "-0.1", "2", "inf")},
    **{f"{_PLAN} --gpus {text}": "--gpus" for text in ("0", "-1", "nan")},
    **{f"status . --watch {text}": "--watch" for text in ("0", "-1", "nan", "inf", "x")},
    **{f"doctor --timeout {text}": "--timeout" for text in ("0", "-1", "nan")},
    **{f"doctor --megabytes {text}": "--megabytes" for text in ("0", "-1", "x")},
    **{f"doctor --free-gb {text}": "--free-gb" for text in ("nan", "-1", "inf")},
    "doctor --tensor-model-parallel-size 0": "--tensor-model-parallel-size",
    **{f"train --dry-run --nproc-per-node {text}": "--nproc-per-node" for text in ("0", "-1", "x", "nan")},
    **{f"train --dry-run --max-restarts {text}": "--max-restarts" for text in ("-1", "x")},
    "train --dry-run --shutdown-timeout -1": "--shutdown-timeout",
    **{f"mup check --widths {text}": "--widths" for text in ("0", "nan", "-64")},
    "mup check --steps 0": "--steps",
    "mup check --head-dim 0": "--head-dim",
    **{f"mup check --ffn-ratio {text}": "--ffn-ratio" for text in ("nan", "0", "inf")},
    **{f"{_COST} --gpus 8 {flags}": said for flags, said in {
        "--lr 1e30": "--lr is 1e30", "--adam-beta1 1.5": "--adam-beta1 is 1.5", "--hidden-size 1000000000": "--hidden-size is",
        "--seq-length 1000000000000": "--seq-length is", "--global-batch-size 1000000000000000": "--global-batch-size is",
        "--num-layers 1e400": "--num-layers is", "--num-experts 0.5": "--num-experts is", "--weight-decay inf": "--weight-decay is",
        "--lr -1": "--lr is -1", "--micro-batch-size 0": "--micro-batch-size is 0", "--bf16 maybe": "--bf16 is 'maybe'",
        "--optimizer nope": "--optimizer: there is no optimizer 'nope'", "--optimizer muon --muon-momentum 2": "--muon-momentum is 2",
        "--optimizer muon --soap-block-size 64": "--soap-… is given, but no parameter is trained by soap",
        "--chinchilla 4": "--chinchilla is given without --against", "--study x": "--study is given without --against",
        "--against adamw --chinchilla nan": "--chinchilla: 'nan'", "--against nope": "--against nope",
        "--against adamw --study /nowhere": "--study /nowhere", "--from /nowhere": "--from /nowhere cannot be read",
        "--from /etc/passwd": "--from /etc/passwd holds no flags", "--json .": ".: Is a directory",
        "--json /etc/passwd/x": "Not a directory",
        "--bf16 true false": "'false' belongs to no flag", "--tensor-model-parallel-size 3": "--tensor-model-parallel-size",
        "--recompute-modules foo --recompute-granularity selective": "--recompute-modules has no 'foo'",
        "--optimizer-groups /nowhere": "--optimizer-groups /nowhere cannot be read", "--preset": "--preset needs a value",
    }.items()},
    f"{_COST} stray --gpus 8": "--preset takes one value; 'stray' belongs to no flag",
    "cost step --cluster h300 --gpus 8 --preset demo": "--cluster: there is no cluster 'h300'",
    "cost step --cluster /etc/passwd --gpus 8 --preset demo": "/etc/passwd is no cluster file",
    "cost search --cluster h100 --gpus 8 --preset demo --tensor-model-parallel-size 2": "--tensor-model-parallel-size is what",
    "cost search --cluster h100 --gpus 8": "--global-batch-size is missing",
    "cost tables --cluster h100 --output /etc/passwd": "Not a directory",
    "cost tables --cluster h100 --output t --optimizers adamw,,muon": "--optimizers has ''",
    "cost tables --cluster h100 --output t --optimizers muno": "Did you mean muon?",
    "cost calibrate --output .": ".: Is a directory",
    "migrate plan --to muon --cluster h100 --gpus 8 --preset demo --output /etc/passwd": "Not a directory",
    "data corpus --input a.jsonl --output o --seed -1": "--seed",
    "data corpus --input a.jsonl --output o --seed nan": "--seed",
    "data tokenizer --input a.jsonl --output o --vocab-size 0": "--vocab-size",
    "data index --input a.jsonl --tokenizer t --output-prefix p --workers 0": "--workers",
    "data index --input a.jsonl --tokenizer t --output-prefix p --tiktoken-num-special-tokens -1": "--tiktoken-num",
    "data corpus --name nope --output o": "--name nope",
    "data index --input a.jsonl --tokenizer t --output-prefix folder/": "--output-prefix 'folder/'",
    "data index --input a.jsonl --tokenizer t --output-prefix=": "--output-prefix ''",
    "data tokenizer --input a.jsonl --output o --eod x": "--eod x",
    **{f"train --dry-run {flags}": said for flags, said in {
        "--nnodes 0": "--nnodes is '0'", "--nnodes 3:2": "--nnodes is '3:2'", "--nnodes x": "--nnodes is 'x'",
        "--nnodes 1:2:3": "--nnodes is",
        "--nnodes 2": "--rdzv-endpoint HOST:PORT", "--nnodes 2 --rdzv-endpoint foo:bar": "--rdzv-endpoint is 'foo:bar'",
        "--nnodes 2 --rdzv-endpoint :1": "--rdzv-endpoint is ':1'", "--nnodes 2 --rdzv-endpoint a:70000": "--rdzv-endpoint",
        "--rdzv-conf nonsense": "--rdzv-conf has 'nonsense'", "--node-rank -1": "--node-rank is torchrun's", "--nproc 2": "--nproc is",
        "--master-port x": "--master-port is torchrun's", "--signals-to-handle SIGFOO": "--signals-to-handle is torchrun's",
        "--preset nope": "(--preset NAME)",
    }.items()},
    **{f"generate . --prompt x {flags}": flags.split()[0] for flags in (
        "--temperature nan", "--temperature -1", "--top-p 0", "--top-p 2", "--seed -1", "--seed x", "--max-new-tokens 0")},
    "data corpus --input nope.jsonl --output o": "--input: no file matches nope.jsonl",
    "data tokenizer --from nope --output o": "--from: cannot read nope",
    "data index --input nope --tokenizer t --output-prefix p": "--input: the corpus nope does not exist",
    "optimizers muno": "Did you mean muon?", "optimizers muon soap": "'soap'",
    "study plan nope.yaml": "nope.yaml", "study report nope": "nope/study.sqlite", "study nope": "'nope' is none of",
    "import nope --output o": "nope/config.json cannot be read",
    "status": "DIR", "status a b": "'b'", "cost": "step|search", "cost stepp": "Did you mean step?", "nope": "'nope'",
    "Train": "Did you mean train?", "COST": "Did you mean cost?", "--vresion": "'--vresion'", "data": "command", "mup": "command",
    "migrate": "plan|checkpoint", "migrate plan": "--to",
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_words_that_cannot_be_meant(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words.split())
    except SystemExit as ended:
        code = ended.code
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and WORDS[words] in said, said
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_used_is_one_sentence_in_every_command(tmp_path, monkeypatch, capsys):
    """Whatever a command does with it: of all OSErrors, what has a file or a full disk to blame."""
    import megatron_opt.status as status

    for error, part in (
        (PermissionError(13, "Permission denied", "secret.yaml"), "secret.yaml: Permission denied"),
        (NotADirectoryError(20, "Not a directory", "file/x"), "file/x: Not a directory"),
        (OSError(28, "No space left on device"), "No space left on device; make room"),
    ):

        def fails(*_, _error=error):
            raise _error

        monkeypatch.setattr(status, "look", fails)
        assert main(["status", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert part in said and said.count("\n") == 1
    monkeypatch.setattr(status, "look", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        main(["status", str(tmp_path)])


@pytest.mark.parametrize(("text", "limits"), [
    ("nan", {}), ("inf", {}), ("-inf", {}), ("", {}), ("1e999", {}), ("2.5", {"whole": True}), ("0", {"low": 0, "above": True}),
    ("3", {"high": 2}), ("1e3", {"whole": True}),
])  # fmt: skip
def test_numbers_that_are_refused(text, limits):
    with pytest.raises(Exception, match=r"is no (whole|finite) number"):
        number(**limits)(text)


def test_numbers_that_are_taken():
    assert number(0)("0") == 0 and number(0, 1)("1") == 1 and number(whole=True)("-3") == -3


ENVIRONMENTS = {
    "WORLD_SIZE=two": "WORLD_SIZE is 'two'", "WORLD_SIZE=": "WORLD_SIZE is ''", "WORLD_SIZE=0": "WORLD_SIZE is '0'",
    "WORLD_SIZE=-1": "WORLD_SIZE is '-1'", "WORLD_SIZE=1.5": "WORLD_SIZE is '1.5'", "RANK=x": "RANK is 'x'",
    "RANK=1": "RANK is '1'", "WORLD_SIZE=2 RANK=2": "RANK is '2'", "RANK=-1": "RANK is '-1'", "LOCAL_RANK=x": "LOCAL_RANK",
    "LOCAL_RANK=3": "LOCAL_RANK is '3'", "MASTER_PORT=http": "MASTER_PORT is 'http'", "MASTER_PORT=70000": "70000",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=a MASTER_PORT=0": "MASTER_PORT is '0'", "WORLD_SIZE=2": "RANK is not set",
    "WORLD_SIZE=2 RANK=1": "MASTER_ADDR is not set", "WORLD_SIZE=2 RANK=1 MASTER_ADDR=a": "MASTER_PORT is not set",
}  # fmt: skip


@pytest.mark.parametrize("given", ENVIRONMENTS)
def test_variables_of_a_launcher_that_cannot_be_meant(given, monkeypatch, capsys):
    _environment(monkeypatch, given)
    with pytest.raises(UserError, match="torchrun") as error:
        entry.set_single_process_env()
    assert ENVIRONMENTS[given] in str(error.value)
    assert entry.print_user_error("job", error.value) == 2 and capsys.readouterr().err.count("\n") == 1


def test_variables_of_a_launcher_that_are_taken(monkeypatch):
    _environment(monkeypatch, "WORLD_SIZE=4 RANK=3 LOCAL_RANK=1 MASTER_ADDR=h MASTER_PORT=29500")
    assert entry.check_launcher() == (3, 4)
    _environment(monkeypatch, "")
    entry.set_single_process_env()
    assert os.environ["MASTER_PORT"] == "0" and entry.check_launcher() == (0, 1)


def _environment(monkeypatch, given):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what a case sets is undone
        monkeypatch.delenv(name)
    for word in given.split():
        monkeypatch.setenv(*word.split("=", 1))


@pytest.mark.parametrize("line", [
    '{"event": "start", "time": "x"}', '{"event": 3, "time": 1}', '{"event": "save", "time": 1, "iteration": "x"}',
    '{"event": "start"}',
    '{"event": "end", "time": 1, "restart": []}', '{"event": "end", "time": NaN}', "[1]", "3", "{", "\xff",
])  # fmt: skip
def test_lines_of_a_log_that_are_no_events_are_left_out(line, tmp_path: Path):
    good = '{"event": "start", "time": 1, "iteration": null}'
    (tmp_path / "events.jsonl").write_text(f"{line}\n{good}\n", encoding="latin-1")
    assert run_files.events(tmp_path) == [json.loads(good)]


def test_a_line_of_metrics_with_words_for_numbers_is_left_out(tmp_path):
    row = {"kind": "train", "iteration": 1, "loss": 2.0, "step_time": 0.5}
    lines = [row, {**row, "iteration": 2, "step_time": "fast"}, {**row, "iteration": 3, "tokens_per_s": [1]}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run_files.metrics(tmp_path / "metrics.jsonl") == [row]


def test_a_key_that_is_given_twice_is_refused_in_every_file(tmp_path):
    from megatron_opt.cost_model import cluster, flags
    from megatron_opt.optimizers.groups import load_group_configs

    file = tmp_path / "twice.yaml"
    for text, read in (
        ("lr: 1e-3\nlr: 1e-2\n", flags.from_run),
        ("name: a\nname: b\n", lambda path: cluster.load(str(path))),
        ("groups:\n- {match: x, optimizer: adamw, match: y}\n", lambda path: load_group_configs(str(path), {})),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"twice\.yaml.*is given twice"):
            read(file)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"- 1", b"7", b"groups: [", b"groups: {}", b"groups: 3", b"groups:\n- 1"]
)
def test_a_groups_file_that_is_none_is_one_sentence(content, tmp_path):
    from megatron_opt.optimizers.groups import load_group_configs

    file = tmp_path / "gruppen ü.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"gruppen ü\.yaml") as error:
        load_group_configs(str(file), {})
    assert "\n" not in str(error.value)


def test_a_disk_that_fills_while_training(tmp_path, capsys):
    """/dev/full takes no byte: metrics end the run by a sentence, a log is left short."""
    from types import SimpleNamespace

    from megatron_opt import pretrain
    from megatron_opt.training import console, monitoring

    (tmp_path / run_files.METRICS).symlink_to("/dev/full")
    run = SimpleNamespace(folder=tmp_path, is_logging_rank=True)
    with pytest.raises(UserError, match=r"--output-dir .*metrics\.jsonl cannot be written \(No space left on device\)"):
        monitoring.Monitor._append(run, {"loss": 1.0})
    log = console._Log("/dev/full")
    log.write("a line\n")
    log.flush()
    with contextlib.suppress(OSError):
        log.file.close()

    def full(*_):
        raise OSError(28, "No space left on device", "config.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "run", full)
        assert pretrain.main([]) == 2
        said = capsys.readouterr().err
        assert "config.json cannot be written: No space left on device; make room" in said and said.count("\n") == 1
        patch.setattr(pretrain, "run", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(OSError, match="Input/output"):  # which may pass: a launcher starts it again
            pretrain.main([])
        gone = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"
        patch.setattr(pretrain, "run", lambda *_: (_ for _ in ()).throw(RuntimeError(gone)))
        assert pretrain.main([]) == 1, "which a launcher starts again"
        said = capsys.readouterr().err
        assert "another rank is gone" in said and said.count("\n") == 1
        patch.setattr(pretrain, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes")))
        with pytest.raises(RuntimeError, match="shapes"):
            pretrain.main([])


def test_a_sentence_names_the_flag_of_the_value_it_speaks_of():
    from megatron_opt.errors import naming

    argv = "--input a.jsonl --tokenizer=t/x.model --workers 8 stray".split()
    assert naming("cannot read t/x.model: gone", argv) == "--tokenizer: cannot read t/x.model: gone"
    assert naming("a.jsonl, line 3: no text", argv) == "--input: a.jsonl, line 3: no text"
    for told in ("--input a.jsonl is empty", "8 of 8 failed", "data/a.jsonl is empty", "nothing to do"):
        assert naming(told, argv) == told


def test_a_record_of_a_run_has_no_option_without_effect(tmp_path):
    """It names every option of the run's rules with its value: what stands at its default was not asked for."""
    from megatron_opt.cost_model import flags

    config = {
        "optimizer": "muon",
        "rule_muon_normuon": False,
        "rule_muon_normuon_beta2": 0.95,
        "rule_muon_momentum": 0.9,
    }
    (tmp_path / run_files.CONFIG).write_text(json.dumps({"config": config}))
    found = flags.from_run(tmp_path)
    assert {name for name in found if name.startswith("muon")} == {"muon-momentum"}
    assert flags.grouping(found)[0].options["momentum"] == 0.9
