"""The study files that come with the package are valid."""

from pathlib import Path

import pytest

from megatron_opt.study import cli

STUDIES = sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_example_can_be_planned(path, monkeypatch, tmp_path, capsys):
    for variable in ("DEMO_DATA", "STUDY_DATA"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert cli.main(["plan", str(path)], "study") == 0
    assert "adamw" in capsys.readouterr().out
