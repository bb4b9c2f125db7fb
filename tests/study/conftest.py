"""A small study on the fake trainer, made in a temporary folder."""

import sys
from pathlib import Path

import pytest

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
