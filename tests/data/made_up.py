"""Text made up from a small word list."""

import json
import random
from pathlib import Path

TEXT = "the ship sailed from Athens with 120 men, café and naïve; who sang: “ἄνδρα μοι ἔννεπε” all night"
WORDS = TEXT.split()


def sentences(count: int, seed: int) -> str:
    """Lines of random words."""
    choose = random.Random(seed)
    return "\n".join(" ".join(choose.choices(WORDS, k=choose.randint(1, 12))) for _ in range(count))


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    """A JSONL file of `texts`."""
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path
