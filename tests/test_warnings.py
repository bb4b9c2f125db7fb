"""A warning of one of our modules fails the test that meets it, here and in a process that a test starts."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch.distributed

WARNS = "import warnings; exec('warnings.warn(\"said\")', {'__name__': 'MODULE', 'warnings': warnings})"


@pytest.mark.parametrize("module", ["megatron_opt.errors", "megatron_opt.training.job", "megatron_opt.kernels"])
def test_a_warning_of_ours_is_an_error(module: str) -> None:
    with pytest.raises(UserWarning, match="said"):
        exec("warnings.warn('said')", {"__name__": module, "warnings": warnings})
    started = subprocess.run([sys.executable, "-c", WARNS.replace("MODULE", module)], capture_output=True, text=True)
    assert started.returncode == 1 and started.stderr.endswith("UserWarning: said\n"), started.stderr


def test_a_warning_of_others_is_none() -> None:
    exec("warnings.warn('said')", {"__name__": "torch.somewhere", "warnings": warnings})
    done = subprocess.run([sys.executable, "-c", WARNS.replace("MODULE", "torch.somewhere")], capture_output=True)
    assert done.returncode == 0


def test_no_collective_of_ours_is_deprecated() -> None:
    """torch warns of them in a module of its own, where no filter sees whose call it was."""
    package = Path(__file__).parent.parent / "megatron_opt"
    calls = {
        (path.name, name)
        for path in package.rglob("*.py")
        for name in re.findall(r"\bdist(?:ributed)?\.(\w+)", path.read_text(encoding="utf-8"))
    }
    assert ("exchange.py", "all_to_all_single") in calls
    assert not [call for call in calls if hasattr(getattr(torch.distributed, call[1], None), "__deprecated__")]
