"""Predictions that were registered before their runs, beside what the runs gave."""

from __future__ import annotations

from typing import Any

from megatron_opt.report.blocks import Section, Table
from megatron_opt.study.dataset import Dataset
from megatron_opt.study.registration import data_digest
from megatron_opt.study.scoring import score

HEADER = ["", "optimizer", "regime", "predicted", "90% interval", "outcome", "error", "inside", "CRPS", "runs"]


def registered(name: str, content: dict[str, Any], dataset: Dataset) -> Section:
    """Of one file of `study predict`: every loss and gain, how many lie inside their intervals, which hypothesis won."""
    section = Section(f"{name}: registered {content['written']}, before the runs")
    known = [record for record in dataset.finished if record.id in set(content["data"]["runs"])]
    if data_digest(known) != content["data"]["sha256"]:
        section.warnings.append("The runs behind this prediction are not what they were when it was written.")
    scored = score(content, dataset)
    rows = [
        [
            row.what,
            row.optimizer,
            row.regime,
            f"{row.value:.4f}",
            f"{row.low:.4f} to {row.high:.4f}",
            f"{row.outcome:.4f}",
            f"{row.value - row.outcome:+.4f}",
            "yes" if row.inside else "no",
            f"{row.crps:.4f}",
            ", ".join(row.runs),
        ]
        for row in scored.rows
    ]
    section.tables.append(Table(HEADER, rows))
    for what, plural in (("loss", "losses"), ("gain", "gains")):
        inside, count = scored.coverage(what)
        if count:
            crps = scored.mean_crps(what)
            section.text.append(f"{inside} of {count} {plural} inside their 90% interval, mean CRPS {crps:.4f} nats.")
    words = content["hypotheses"]
    if scored.log_scores:
        order = sorted(scored.log_scores, key=lambda key: -scored.log_scores[key])
        cells = [[words[key], f"{scored.log_scores[key]:.2f}", f"{scored.crps[key]:.4f}"] for key in order]
        section.tables.append(
            Table(["hypothesis on the gain", "log score", "mean CRPS"], cells, "Which hypothesis won")
        )
        section.text.append(scored.verdict(words))
    if scored.missing:
        section.text.append(f"No outcome of {', '.join(scored.missing)}.")
    return section
