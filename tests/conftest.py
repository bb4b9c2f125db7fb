"""Property tests draw the same examples in every run; warnings of our modules are errors in processes that tests start
too; a run ends with what it skipped and why."""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

ROOT = Path(__file__).parents[1]


def _modules() -> list[str]:
    """Every module of the package: PYTHONWARNINGS knows whole names alone."""
    files = (file.relative_to(ROOT).with_suffix("") for file in (ROOT / "megatron_opt").glob("**/*.py"))
    return sorted(".".join(file.parts).removesuffix(".__init__") for file in files)


os.environ["PYTHONWARNINGS"] = ",".join(f"error:::{module}" for module in _modules())


@pytest.fixture(scope="module", autouse=True)
def _no_world_is_left_behind() -> Iterator[None]:
    """A file that leaves process groups or Megatron's buffers would fail whichever file comes after it."""
    yield
    dist, state = sys.modules.get("torch.distributed"), sys.modules.get("megatron.core.parallel_state")
    left = [
        name for name in ("_GLOBAL_MEMORY_BUFFER", "_DATA_PARALLEL_GROUP") if getattr(state, name, None) is not None
    ]
    assert not left and not (dist and dist.is_initialized()), f"left behind: {left or 'a process group'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skipped tests by reason, the most frequent first."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    if reasons:
        terminalreporter.section("skipped")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5}  {reason}")
