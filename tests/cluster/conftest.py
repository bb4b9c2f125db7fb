"""One undisturbed run that most tests here compare with."""

import pytest

from tests.cluster.harness import LAYOUTS, Run, job_flags, undisturbed

ITERATIONS = 60
LIMIT = 600.0  # seconds: a run alone takes 12, on a crowded machine far more


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """Folder with the dataset, shared by all runs."""
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="session")
def reference(bench):
    """Losses of ITERATIONS undisturbed steps of AdamW on two ranks."""
    return undisturbed(bench / "plain", flags_of(bench / "plain"), LIMIT)


def flags_of(folder, *more, iterations=ITERATIONS, **kwargs):
    """Flags of the reference run for another folder; later ones win."""
    return [*job_flags(folder, iterations, **kwargs), *LAYOUTS["DP2"], "--optimizer", "adamw", *more]


@pytest.fixture
def job(bench, request):
    """A run in a folder of its own, killed at the end of the test."""
    runs = []

    def make(*more, iterations=ITERATIONS, save=None, interval=5, **kwargs):
        folder = bench / f"{request.node.name.replace('/', '-')}-{len(runs)}"
        run = Run(folder, flags_of(folder, *more, iterations=iterations, save=save, interval=interval), **kwargs)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.end()


# a minute or more: `make test-all`; kills, signals, damage, hangs and losses that jump are in every run of the tests
LONG = ("test_disk.py",)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in LONG:
            item.add_marker(pytest.mark.slow)
