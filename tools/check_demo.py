"""Checks what `make demo` wrote: six finished runs, both optimizers learned, plots, a self-contained page."""

import json
import math
import sys
from pathlib import Path


def main(folder: Path) -> int:
    """Exit code 0 when everything is there and right; otherwise says what is not."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/results.json"))]
    wrong = []
    if len(results) != 6:
        wrong.append(f"{len(results)} of 6 runs have results.json")
    for result in results:
        guess = math.log(result["tokenizer"]["vocab_size"])
        if result["status"] != "completed" or not result["final_valid_loss"] < guess - 0.5:
            wrong.append(
                f"a run of {result['optimizer']} did not learn: {result['final_valid_loss']}, a guess has {guess}"
            )
    if {result["optimizer"] for result in results} != {"adamw", "muon"}:
        wrong.append("not both optimizers ran")
    if len({result["tokens"] for result in results}) != 1:
        wrong.append("runs saw different numbers of tokens")
    pages = list(folder.glob("report/*.html"))
    if not pages or "http" in pages[0].read_text().split("<body")[0].lower().replace("http-equiv", ""):
        wrong.append("there is no self-contained report page")
    if pages and pages[0].read_text().count("The old man") < 2:
        wrong.append("the page has no sample of each optimizer")
    if len(list(folder.glob("report/**/*.png"))) < 2:
        wrong.append("plots are missing")
    print("\n".join(wrong) or f"demo: {len(results)} runs and the report are as they should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
