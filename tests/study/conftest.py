"""A small study on the fake trainer, and data of a real one, made in a temporary folder."""

import json
import random
import sys
from pathlib import Path

import pytest

from megatron_opt.data import cli as data

FAKE = Path(__file__).with_name("fake_trainer.py")

STUDY = """\
name: small
sequence_length: 64
models:
  tiny: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2}
data:
  tokenizer: tokenizer.model
  train: [train]
  valid: [valid]
defaults: {batch_size: 4, weight_decay: 0.1}
optimizers:
  adamw:
    grid: {lr: [0.004, 0.008, 0.064]}
  muon:
    grid: {lr: [0.008, 0.016, 0.032]}
executor:
  jobs: 2
  command: [PYTHON, FAKE, "{flags}"]
"""


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    """make_study(text=STUDY, name="study.yaml") → path of a study file beside dummy data."""
    for name in ("train", "valid"):
        for suffix in (".bin", ".idx"):
            (tmp_path / (name + suffix)).write_bytes(b"0")
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")

    def make(text=STUDY, name="study.yaml"):
        path = tmp_path / name
        path.write_text(text.replace("PYTHON", sys.executable).replace("FAKE", str(FAKE)))
        return path

    return make


@pytest.fixture
def real_data(tmp_path):
    """A folder with tokenizer.model, and train and valid as text and indexed: sentences of 60 made-up words."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(60)]
    for name, count in (("train", 700), ("valid", 60)):
        said = [[" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(5)] for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": "\n\n".join(one)}) + "\n" for one in said))
    tokenizer = str(tmp_path / "tokenizer.model")
    where = ["--input", str(tmp_path / "train.jsonl"), "--vocab-size", "300", "--output", tokenizer]
    data.main(["tokenizer", *where], "data")
    for name in ("train", "valid"):
        where = ["--input", str(tmp_path / f"{name}.jsonl"), "--output-prefix", str(tmp_path / name)]
        data.main(["index", *where, "--tokenizer", tokenizer], "data")
    return tmp_path
