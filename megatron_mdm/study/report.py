"""study.json → tables in three forms and pictures, in the study's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_mdm.config.files import write_atomically
from megatron_mdm.reports.plots import save_figure
from megatron_mdm.study.pictures import all_pictures
from megatron_mdm.study.scores import Scores
from megatron_mdm.study.tables import FORMS, all_tables, as_csv, as_markdown, run_table

TABLES = "tables"
PICTURES = "pictures"
PAGE = "tables.md"


def write_report(record: dict[str, Any], folder: Path) -> list[Path]:
    """record: the content of study.json. Returns what was written."""
    scores = Scores(record)
    tables = all_tables(scores)
    failed = f", {len(scores.failed)} have failed" if scores.failed else ""
    asked = f"{len(scores.runs)} of {scores.num_asked} runs are done{failed}"
    page = folder / PAGE
    write_atomically(page, "\n".join([f"# Study\n\n{asked}.\n", *map(as_markdown, tables)]))
    written = [page]
    for table in tables:
        for form, write in FORMS.items():
            path = folder / TABLES / f"{table.name}.{form}"
            write_atomically(path, write(table))
            written.append(path)
    runs = folder / TABLES / "runs.csv"
    write_atomically(runs, as_csv(run_table(scores)))
    written.append(runs)
    for name, figure in all_pictures(scores).items():
        path = folder / PICTURES / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
        written.append(path)
    return written
