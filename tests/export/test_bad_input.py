"""What cannot be exported, imported or continued ends with one sentence and exit code 2; generation repeats itself."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("safetensors")

from megatron_opt import cli
from megatron_opt.errors import UserError
from megatron_opt.export import tokenizer_files
from megatron_opt.export.generating import sample
from tests.export import models


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    args = models.flags(models.CASES["llama"])
    models.save(args, models.weights(args), root / "ours")
    assert cli.main(["export", str(root / "ours"), "--output", str(root / "hf")]) == 0
    return root


def _refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.fixture
def hf(folders: Path, tmp_path: Path) -> Path:
    shutil.copytree(folders / "hf", tmp_path / "hf")
    return tmp_path / "hf"


def _change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_damaged_weights(hf: Path, capsys, tmp_path: Path) -> None:
    content = (hf / "model.safetensors").read_bytes()
    for length in (0, 5, 100, len(content) - 8):
        (hf / "model.safetensors").write_bytes(content[:length])
        assert "model.safetensors is cut short" in _refused(capsys, "import", hf, "--output", tmp_path / "new")
    (hf / "model.safetensors").unlink()
    assert "has no model.safetensors" in _refused(capsys, "import", hf, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("values", "said"), [
    ({"model_type": "bert"}, "the architecture 'bert' is none of llama, mixtral, gpt2"),
    ({"intermediate_size": 64}, "the two are of different models"),
    ({"num_hidden_layers": 1}, "has no place for model.layers.1."),
    ({"num_hidden_layers": 3}, "have no model.layers.2."),
    ({"tie_word_embeddings": True}, "the two are not equal"),
    ({"sliding_window": 8}, "sliding_window 8"),
    ({"some_new_key": 1}, "some_new_key 1"),
    ({"hidden_act": "relu"}, "hidden_act 'relu'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "the rope scaling 'yarn'"),
    ({"hidden_size": "large"}, "it must be a positive whole number"),
    ({"model_type": ["llama"]}, "the architecture ['llama'] is none of"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
    ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object"),
    ({"rope_theta": "large"}, "rope_theta 'large' is no whole number"),
    ({"attention_bias": "no"}, "attention_bias is 'no'; it must be true or false"),
])  # fmt: skip
def test_another_models_config(hf: Path, capsys, tmp_path: Path, values: dict, said: str) -> None:
    _change(hf, **values)
    assert said in _refused(capsys, "import", hf, "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_of_another_vocabulary(hf: Path, folders: Path, capsys, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(200)} | {"</s>": 200}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(hf / "tokenizer.json"))
    told = "it is the tokenizer of another vocabulary"
    assert told in _refused(capsys, "import", hf, "--output", tmp_path / "new")
    beside = ("--tokenizer", hf / "tokenizer.json")
    assert told in _refused(capsys, "export", folders / "ours", "--output", tmp_path / "x", *beside)
    assert told in _refused(capsys, "generate", folders / "ours", "--prompt", "w1", *beside)
    (hf / "tokenizer.json").rename(hf / "tokenizer.model")  # its family is told from its content
    assert told in _refused(capsys, "import", hf, "--output", tmp_path / "new")
    (hf / "tokenizer.model").write_bytes(b"\xff neither")
    assert str(hf / "tokenizer.model") in _refused(capsys, "import", hf, "--output", tmp_path / "new")


def test_a_tokenizer_with_fewer_ids_than_the_runs_own_is_of_another_vocabulary(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(40)} | {"</s>": 40}
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(path))
    for ids in (41, 60):
        record = {"config": {}, "tokenizer": {"model": "own.model", "vocab_size": ids, "sha256": "0" * 64}}
        (tmp_path / "config.json").write_text(json.dumps(record))
        saved = SimpleNamespace(padded_vocab_size=64, output_dir=str(tmp_path))
        if ids == 41:  # as many: one that was converted
            assert tokenizer_files.of_run(saved, path).vocab_size == 41
            continue
        with pytest.raises(UserError, match=r"has 41 ids, the one that the run was trained with 60 \(own.model\)"):
            tokenizer_files.of_run(saved, path)


def test_checkpoints_that_are_not(folders: Path, capsys, tmp_path: Path) -> None:
    assert "holds no checkpoint" in _refused(capsys, "export", tmp_path, "--output", tmp_path / "x")
    shutil.copytree(folders / "ours", tmp_path / "cut")
    (part,) = (tmp_path / "cut").rglob("*.distcp")
    part.write_bytes(part.read_bytes()[:-20])
    assert "is damaged" in _refused(capsys, "export", tmp_path / "cut", "--output", tmp_path / "x")
    assert "not empty" in _refused(capsys, "export", folders / "ours", "--output", folders / "hf")
    assert "holds checkpoints already" in _refused(capsys, "import", folders / "hf", "--output", folders / "ours")


def test_generation_is_a_function_of_its_seed(folders: Path, capsys) -> None:
    words = ["generate", str(folders / "ours"), "--prompt", "1 2 3", "--max-new-tokens", "6"]
    said = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        capsys.readouterr()
        assert cli.main([*words, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2] and said[3].startswith("1 2 3 ") and len(said[3].split()) == 9
    assert "give ids" in _refused(capsys, "generate", folders / "ours", "--prompt", "hello")
    assert "--top-p" in _refused(capsys, "generate", folders / "ours", "--prompt", "1", "--top-p", "0")


def test_samples_come_from_the_nucleus() -> None:
    chances = torch.tensor([0.05, 0.5, 0.3, 0.1, 0.05, 9.0])  # the last is padding
    fixed = lambda now: chances.log().expand(1, now.shape[1], -1)  # noqa: E731
    drawn = list(sample(fixed, [0], 2000, 1.0, 0.7, 0, 5, None))
    assert set(drawn) == {1, 2} and abs(drawn.count(1) / 2000 - 0.625) < 0.04
    assert list(sample(fixed, [0], 3, 0.0, 1.0, 0, 5, None)) == [1, 1, 1]
    assert list(sample(fixed, [0], 3, 0.0, 1.0, 0, 5, 1)) == []
