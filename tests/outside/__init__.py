"""An optimizer of another package, installed where a test wants it."""

import shutil
from pathlib import Path


def install(folder: Path) -> Path:
    """The file and the metadata that pip would write, in a folder for `sys.path`."""
    shutil.copy(Path(__file__).with_name("ademamix.py"), folder / "outside_ademamix.py")
    metadata = folder / "outside_ademamix-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-ademamix\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[megatron_opt.optimizers]\nademamix = outside_ademamix:AdEMAMix\n")
    return folder
