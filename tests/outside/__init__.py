"""An optimizer of another package, installed where a test wants it."""

import shutil
from pathlib import Path


def install(folder: Path) -> Path:
    """The file and the metadata that pip would write, in a folder for `sys.path`."""
    shutil.copy(Path(__file__).with_name("two_averages.py"), folder / "outside_two_averages.py")
    metadata = folder / "outside_two_averages-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-two-averages\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[megatron_opt.optimizers]\ntwo_averages = outside_two_averages:TwoAverages\n"
    )
    return folder
