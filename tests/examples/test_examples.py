"""The example scripts: they parse, name only flags that exist, and start what they say."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_opt.presets import read as read_preset

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = [*EXAMPLES.rglob("*.sh"), EXAMPLES / "slurm.sbatch"]
SCALES = ["130m", "1.2b", "7b"]


@pytest.fixture
def environment(tmp_path):
    """A `megatron-opt` that is this tree's, and the variables that the scripts ask for."""
    command = tmp_path / "bin" / "megatron-opt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_opt.cli "$@"\n')
    command.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DATA": "/data",
        "OUTPUT": str(tmp_path / "run"),
        "HEAD": "node1:29500",
        "RANKS": "8",
    }


def started(script: str, scale: str, environment: dict[str, str]) -> list[str]:
    command = ["bash", str(EXAMPLES / script), scale, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(path):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("scale", SCALES)
def test_several_nodes_start_the_layout(scale, environment):
    words = started("multi_node.sh", scale, environment)
    nodes = int(words[words.index("--nnodes") + 1])
    assert words[words.index("--preset") + 1] == f"llama-{scale}"
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"
    assert words[words.index("--save") + 1] == words[words.index("--load") + 1]
    value = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    preset = read_preset(f"llama-{scale}")
    micro = int(value.get("--micro-batch-size", preset["micro-batch-size"]))
    copies = 8 * nodes // int(value.get("--tensor-model-parallel-size", 1))
    assert preset["global-batch-size"] % (micro * copies) == 0


@pytest.mark.parametrize("nodes", [8, 16, 32, 64])
def test_7b_divides_its_batch_on_8_to_64_nodes(nodes, environment):
    words = started("multi_node.sh", "7b", environment | {"NODES": str(nodes)})
    micro = int(words[words.index("--micro-batch-size") + 1])
    assert read_preset("llama-7b")["global-batch-size"] % (micro * nodes * 8 // 2) == 0


def test_no_flag_of_a_preset_is_repeated_but_to_change_it():
    for scale in SCALES:
        preset = read_preset(f"llama-{scale}")
        text = (EXAMPLES / "layouts" / f"{scale}.sh").read_text()
        given = re.findall(r"^\s+--([a-z0-9-]+)(?: ([0-9.]+))?", text, flags=re.M)
        assert given
        for name, value in given:
            assert name not in preset or str(preset[name]) != value, f"{scale}: --{name} {value} is the preset's"


def test_every_flag_is_known(environment):
    """Megatron's parser with this project's flags takes each script's command line."""
    from megatron.training.arguments import parse_args

    from megatron_opt.training.arguments import add_arguments, expand

    for scale in SCALES:
        words = started("multi_node.sh", scale, environment)
        argv = words[words.index("megatron_opt.pretrain") + 1 :]
        saved, sys.argv = sys.argv, ["pretrain", *expand(argv)]
        try:
            args = parse_args(add_arguments)
        finally:
            sys.argv = saved
        assert args.optimizer == "muon" and args.keep_last == 3 and args.lr > 0


def test_another_optimizer_wants_its_own_learning_rate(environment):
    words = started("single_node.sh", "130m", environment | {"OPTIMIZER": "adamw", "LR": "4e-3"})
    assert words[words.index("--lr") + 1] == "4e-3" and words[words.index("--optimizer") + 1] == "adamw"
    command = ["bash", str(EXAMPLES / "single_node.sh"), "130m", "--dry-run"]
    done = subprocess.run(command, env=environment | {"OPTIMIZER": "adamw"}, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "LR: learning rate of adamw" in done.stderr


def test_kubernetes_manifest(environment):
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes" / "pytorchjob.yaml").read_text()))
    claim, job = documents
    worker = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    assert container["name"] == "pytorch" and pod["securityContext"]["runAsNonRoot"]
    elastic = job["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    script = Path(container["command"][0]).relative_to("/opt/megatron_opt")
    assert os.access(ROOT / script, os.X_OK)
    told = {"PET_NNODES": "2:4", "PET_NPROC_PER_NODE": "8", "PET_RDZV_ENDPOINT": "w-0:23456", "PET_RDZV_ID": "job"}
    words = started("kubernetes/pod.sh", "1.2b", environment | told)
    assert words[words.index("--nnodes") + 1] == "2:4" and words[words.index("--nproc-per-node") + 1] == "8"
    patience = int(words[words.index("--shutdown-timeout") + 1])
    assert patience < pod["terminationGracePeriodSeconds"]
