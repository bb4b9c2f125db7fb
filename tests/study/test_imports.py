"""Runs of other programs: every format in, divergence and seeds kept, bad values refused by file, line and column."""

import json

import pytest

from megatron_opt.errors import UserError
from megatron_opt.study import cli
from megatron_opt.study.store import Store

MAPPING = """\
columns: {optimizer: config.optimizer, loss: eval/c4_en/loss, seed: config.seed, tokens: tokens (B)}
hyper: {lr: config.learning_rate, batch_size: config.bs}
match: {column: Name, pattern: 'sweep-(?P<model>\\d+m)-'}
values: {optimizer: {adam: adamw}}
scale: {tokens: 1.0e9}
models: {130m: 134217728}
diverged: {column: State, values: [crashed]}
skip: {column: State, values: [running]}
"""
WANDB = """\
Name,State,config.optimizer,config.learning_rate,config.bs,config.seed,tokens (B),eval/c4_en/loss
sweep-130m-a,finished,adam,0.008,128,1,2.68435456,3.53
sweep-130m-b,finished,adam,0.008,128,2,2.68435456,3.54
sweep-130m-c,finished,muon,0.016,128,1,2.68435456,3.46
sweep-130m-d,crashed,muon,0.064,128,1,2.68435456,9.8
sweep-130m-e,finished,muon,0.032,128,1,2.68435456,NaN
sweep-130m-f,running,muon,0.128,128,1,2.68435456,
"""


@pytest.fixture
def bring(tmp_path, capsys):
    """bring(name, text, mapping, *words) → records and what was printed."""

    def bring(name, text, mapping=None, *words):
        file = tmp_path / name
        if text is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        if mapping is not None:
            (tmp_path / "mapping.yaml").write_text(mapping)
            words = (*words, "--mapping", str(tmp_path / "mapping.yaml"))
        capsys.readouterr()
        assert cli.main(["import", str(tmp_path / "a" / "out"), str(file), *words], "study") == 0
        with Store(tmp_path / "a" / "out" / "study.sqlite") as store:
            return store.runs(), capsys.readouterr().out

    return bring


def test_a_table_of_runs_with_names_of_its_own(bring):
    records, shown = bring("runs.csv", WANDB, MAPPING)
    assert [(r.optimizer, r.seed, r.status, r.loss, r.hyper["lr"]) for r in sorted(records, key=lambda r: r.config["source"])] == [
        ("adamw", 1, "completed", 3.53, 0.008),
        ("adamw", 2, "completed", 3.54, 0.008),
        ("muon", 1, "completed", 3.46, 0.016),
        ("muon", 1, "diverged", None, 0.064),
        ("muon", 1, "diverged", None, 0.032),
    ]  # fmt: skip
    assert {(str(r.regime), r.parameters, r.tokens) for r in records} == {("130m@1x", 134217728, 2684354560)}
    assert "1 runs left out by `skip:`" in shown and "5 runs added" in shown and "2 of them diverged" in shown


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("3.46", "-3", r"runs.csv, line 4, column 'eval/c4_en/loss': a final loss of -3 is impossible"),
        ("3.46", "about 3", r"runs.csv, line 4, column 'eval/c4_en/loss': 'about 3' is not a number"),
        ("0.016,128,1,", "0.016,128,x,", r"line 4, column 'config.seed': 'x' is not a number"),
        ("sweep-130m-c", "other", r"line 4, column 'Name': 'other' does not match"),
        ("sweep-130m-c", "sweep-99m-c", r"line 4: parameters, ratio cannot be told"),
        (",3.46", "", r"line 4: fewer values than columns"),
        ("eval/c4_en/loss\n", "loss\n", r"line 2: no column 'eval/c4_en/loss'; it has Name, State"),
    ],
)
def test_a_bad_value_is_refused_by_its_place_and_leaves_no_folder(bring, tmp_path, old, new, message):
    with pytest.raises(UserError, match=message):
        bring("runs.csv", WANDB.replace(old, new), MAPPING)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("loss", ["-3", "inf", "nan", "0"])
def test_an_impossible_loss_is_never_completed(bring, tmp_path, loss):
    """In our own columns: with the status completed a refusal; without a status, NaN and ∞ are divergence."""
    head = "optimizer,model,ratio,parameters,tokens,loss,status\n"
    with pytest.raises(UserError, match="column 'loss'"):
        bring("own.csv", f"{head}adamw,s,1,1000,20000,{loss},completed\n")
    assert not (tmp_path / "a").exists()
    if loss in ("inf", "nan"):
        records, _ = bring("own.csv", f"{head}adamw,s,1,1000,20000,{loss},\n")
        assert records[0].status == "diverged" and records[0].loss is None


def test_a_store_that_was_there_survives_a_rejected_import(bring, tmp_path):
    bring("runs.csv", WANDB, MAPPING)
    with pytest.raises(UserError, match="nothing was imported"):
        bring("runs.csv", WANDB.replace("3.46", "3.47"), MAPPING)
    with Store(tmp_path / "a" / "out" / "study.sqlite") as store:
        assert len(store.runs()) == 5


def test_repetitions_without_a_seed_are_numbered(bring):
    mapping = "columns: {optimizer: o, loss: l}\nconstants: {model: s, ratio: 1}\nmodels: {s: 1000}\n"
    records, shown = bring("runs.csv", "o,l\nadamw,3.1\nadamw,3.2\nmuon,3.0\n", mapping)
    assert sorted((r.optimizer, r.seed, r.tokens) for r in records) == [
        ("adamw", 0, 20000),
        ("adamw", 1, 20000),
        ("muon", 0, 20000),
    ]
    assert "No seed is given: 1 repetitions" in shown


def test_an_export_of_a_chart_has_a_run_a_column(bring):
    text = (
        '"Step","adamw-s1 - loss","adamw-s1 - loss__MIN","muon-s1 - loss","muon-s1 - loss__MIN"\n'
        '"10","4.0","4.0","3.9","3.9"\n"20","3.5","3.5","3.2","3.2"\n"30","3.4","3.4","",""\n'
    )
    mapping = (
        "format: wandb-history\ncolumns: {loss: loss}\nconstants: {model: s, ratio: 1}\nmodels: {s: 1000}\n"
        "match: {column: run, pattern: '(?P<optimizer>\\w+)-s(?P<seed>\\d)'}\n"
    )
    records, _ = bring("chart.csv", text, mapping)
    assert sorted((r.optimizer, r.seed, r.loss) for r in records) == [("adamw", 1, 3.4), ("muon", 1, 3.2)]


def test_a_history_counts_by_its_last_step(bring):
    text = "run,step,opt,loss\na,2,adamw,3.3\na,1,adamw,4\nb,1,muon,4\nb,2,muon,inf\n"
    mapping = (
        "columns: {optimizer: opt, loss: loss, run: run}\nconstants: {model: s, ratio: 1, seed: 1}\nmodels: {s: 1000}\n"
        "last_of: {run: run, step: step}\n"
    )
    records, _ = bring("history.csv", text, mapping)
    assert sorted((r.optimizer, r.status, r.loss) for r in records) == [
        ("adamw", "completed", 3.3),
        ("muon", "diverged", None),
    ]


def test_results_and_events_of_levanter_and_marin(bring):
    """`tracker_metrics.jsonl` with config and summary, and the JSON logger's events behind a log's prefix."""
    one = {
        "config": {"optimizer": {"type": "muon", "learning_rate": 0.016}, "trainer": {"seed": 3}},
        "summary": {"eval/paloma/c4_en/loss": 3.46, "throughput/total_tokens": 2684354560},
    }
    mapping = (
        "columns: {optimizer: config.optimizer.type, loss: summary.eval/paloma/c4_en/loss, seed: config.trainer.seed,\n"
        "  tokens: summary.throughput/total_tokens}\n"
        "hyper: {lr: config.optimizer.learning_rate}\nconstants: {model: 130m}\nmodels: {130m: 134217728}\n"
    )
    records, _ = bring("runs/x/tracker_metrics.jsonl", json.dumps(one) + "\n", mapping)
    assert (records[0].optimizer, records[0].seed, records[0].loss, records[0].hyper) == (
        "muon",
        3,
        3.46,
        {"lr": 0.016},
    )
    events = [
        {"tracker": "json_logger", "event": "hparams", "hparams": {"optimizer": {"type": "adamw"}}},
        {"tracker": "json_logger", "event": "log", "step": 5, "metrics": {"eval/loss": 4.0}},
        {"tracker": "json_logger", "event": "log", "step": 9, "metrics": {"eval/loss": 3.5}},
        {"tracker": "json_logger", "event": "finish", "summary": {"eval/loss": 3.5}},
    ]
    text = "".join(f"INFO levanter.json_logger: {json.dumps(event)}\n" for event in events)
    mapping = (
        "format: json\ncolumns: {optimizer: hparams.optimizer.type, loss: eval/loss}\n"
        "constants: {model: 130m, ratio: 1, seed: 1}\nmodels: {130m: 134217728}\n"
    )
    records, _ = bring("log.jsonl", text, mapping)
    assert {(r.optimizer, r.loss) for r in records} == {("muon", 3.46), ("adamw", 3.5)}
    with pytest.raises(UserError, match=r"log.jsonl, line 2: .*correct the line"):
        bring("log.jsonl", text.replace('"log", "step": 5', '"log" "step": 5'), mapping)


ARGS = {
    "optimizer": "adam", "lr": 0.008, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.98, "clip_grad": 1.0,
    "global_batch_size": 4, "seq_length": 64, "seed": 7, "train_iters": 100, "num_layers": 2, "hidden_size": 32,
    "ffn_hidden_size": 64, "num_attention_heads": 2, "swiglu": True, "normalization": "RMSNorm", "moe_layer_freq": 1,
}  # fmt: skip


def megatron_log(loss="3.512345E+00", end=100):
    lines = ["------------------------ arguments ------------------------"]
    lines += [f"  {key} {'.' * (48 - len(key))} {value}" for key, value in ARGS.items()]
    lines += ["-------------------- end of arguments ---------------------"]
    lines += [
        f" [2026-01-01 00:00:00] iteration {i:8d}/     100 | consumed samples: {4 * i:12d} | lm loss: 3.6E+00 |"
        for i in range(10, end + 1, 10)
    ]
    lines += [f" validation loss at iteration {end} | lm loss value: {loss} | lm loss PPL: 3.3E+01 | "]
    return "\n".join(lines) + "\n"


def test_megatrons_logs_need_no_mapping(bring, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "stopped.log").write_text(megatron_log(end=50))
    (tmp_path / "logs" / "burst.log").write_text(megatron_log("NAN").replace("0.008", "0.1"))
    records, shown = bring("logs/a.log", megatron_log(), None)
    records, shown = bring("logs", None)
    fine, burst = sorted(records, key=lambda r: r.status)
    assert (fine.optimizer, fine.seed, fine.loss, fine.tokens, str(fine.regime)[:5]) == (
        "adamw",
        7,
        3.512345,
        25600,
        "2x32@",
    )
    assert (
        fine.parameters == 2 * (3 * 32 * 64 + 4 * 32**2) and fine.hyper["lr"] == 0.008 and fine.hyper["beta2"] == 0.98
    )
    assert burst.status == "diverged" and "stopped.log left out: it ends at iteration 50 of 100" in shown
    with pytest.raises(UserError, match=r"empty\.log has no arguments as Megatron-LM prints them"):
        bring("empty.log", "hello\n")


def test_tensorboard_folders(bring, tmp_path):
    """Written by TensorBoard's own writer, as torch's SummaryWriter writes scalars and texts."""
    from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    def text(value):
        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
        return tensor_pb2.TensorProto(dtype="DT_STRING", string_val=[str(value).encode()], tensor_shape=shape)

    for name, change, losses in (("a", {}, (4.0, 3.4)), ("b", {"optimizer": "muon", "seed": 8}, (4.0, float("nan")))):
        writer = EventFileWriter(str(tmp_path / "tb" / name))
        for key, value in (ARGS | change).items():
            one = summary_pb2.Summary.Value(tag=f"{key}/text_summary", tensor=text(value))
            writer.add_event(event_pb2.Event(step=0, summary=summary_pb2.Summary(value=[one])))
        for step, loss in zip((50, 100), losses):
            one = summary_pb2.Summary.Value(tag="lm loss validation", simple_value=loss)
            writer.add_event(event_pb2.Event(step=step, summary=summary_pb2.Summary(value=[one])))
        writer.close()
    records, _ = bring("tb", None)
    assert [(r.optimizer, r.seed, r.status, r.loss) for r in sorted(records, key=lambda r: r.seed)] == [
        ("adamw", 7, "completed", pytest.approx(3.4)),
        ("muon", 8, "diverged", None),
    ]
    mapping = (
        "format: tensorboard\ncolumns: {loss: lm loss validation}\nmodels: {s: 1000}\nconstants: {ratio: 1, seed: 1}\n"
        "match: {column: path, pattern: '/(?P<optimizer>[ab])$'}\n"
    )
    with pytest.raises(UserError, match="model, parameters, tokens cannot be told"):
        bring("tb", None, mapping)


def test_mapping_files_are_checked(bring):
    with pytest.raises(UserError, match=r"mapping.yaml:1: `columns:` has no 'los'"):
        bring("runs.csv", WANDB, "columns: {los: x}\n")
    with pytest.raises(UserError, match=r"mapping.yaml:1: `pattern: \(` is no regular expression"):
        bring("runs.csv", WANDB, "match: {column: Name, pattern: '('}\n")
    with pytest.raises(UserError, match="say what they mean by --mapping"):
        bring("runs.json", "{}", None)
