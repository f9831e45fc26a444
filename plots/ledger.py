"""RESULTS.md: the rows of the paper's curves, which `compare_with_paper.py --ledger` writes between two comments there.

A row is a curve of the paper: its values at 5, 25, 50 and 100 classes, ours beside them with the verdict on each, and what ours come from,
as the runs' stored configs say it. The verdicts, and that of the row on all 20 points, are `compare_with_paper`'s. What somebody recorded
before stays unless these results have more of the row's numbers or more runs; to have it written anew, delete that row.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from incremental_cifar.config import FIELDS, FREE_KEYS, REPOSITORY, load_config, read_stored
from incremental_cifar.safe_files import around_block, write_file

if TYPE_CHECKING:
    from plots.compare_with_paper import Point
    from plots.published_curves import PublishedCurve

RESULTS = REPOSITORY / "RESULTS.md"
BEGIN, END = "<!-- the paper's curves: written by plots/compare_with_paper.py --ledger -->\n", "<!-- end of the paper's curves -->\n"
STATUSES = {"agrees": "verified", "differs": "differs", "not judged": "one run, not judged"}
NOT_RUN = "not run yet"
CLASSES = (5, 25, 50, 100)
COLUMNS = ("metric", "algorithm", *(f"{classes} classes" for classes in CLASSES), "n", "status", "date", "machine", "settings", "commit")
NUMBERS = slice(2, 2 + len(CLASSES))  # which columns


def update_ledger(
    path: Path,
    results_dir: Path,
    published: "Mapping[tuple[str, str], PublishedCurve]",
    verdicts: "Mapping[tuple[str, str], tuple[Sequence[Point], str]]",
) -> list[str]:
    """Write the rows; return remarks on those that are older than these results and stay.

    verdicts: of (metric, algorithm), the points that are there and the verdict on all of them. Raises UserError unless the file has both
    comments, or if it cannot be written.
    """
    before, block, after = around_block(path, BEGIN, END)
    lines = block.decode(errors="replace").splitlines()
    recorded = {tuple(cells[:2]): cells for line in lines if len(cells := line.strip("| ").split(" | ")) == len(COLUMNS)}
    rows, remarks = [COLUMNS, ["---"] * len(COLUMNS)], []
    for key, curve in published.items():
        row = row_of(key, curve, results_dir, *verdicts.get(key, ((), "")))
        old = recorded.get(key, row)
        is_further = all(here >= there for there, here in zip(reach(old), reach(row), strict=True)) and reach(row) != reach(old)
        if old != row and not is_further:
            if key in verdicts:
                remarks.append(f"{path.name}: what is recorded of {', '.join(key)} has as many numbers and runs, or more, and stays")
            row = old
        rows.append(row)
    text = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    write_file(path, before + text.encode() + after)
    return remarks


def reach(row: Sequence[str]) -> tuple[int, int]:
    """How many of the row's numbers are there, and from how many runs."""
    return sum(not cell.startswith("paper") for cell in row[NUMBERS]), int((re.match(r"\d+", row[NUMBERS.stop]) or ["0"])[0])


def row_of(key: tuple[str, str], curve: "PublishedCurve", results_dir: Path, points: "Sequence[Point]", verdict: str) -> list[str]:
    """The cells of a row."""
    there = {point.number_of_classes: point for point in points}
    papers = dict(zip(curve.number_of_classes.tolist(), curve.mean.tolist(), strict=True))
    cells = [number_text(there.get(classes), f"paper {papers[classes]:.3f}" if classes in papers else "paper -") for classes in CLASSES]
    if not points:
        return [*key, *cells, "-", NOT_RUN, "-", "-", "-", "-"]
    indices = sorted({index for point in points for index in point.indices})
    is_range = len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1))
    of_indices = f"{indices[0]}-{indices[-1]}" if is_range else ", ".join(map(str, indices))
    n = f"{min(point.num_runs for point in points)} (index {of_indices})"
    configs = [read_stored(results_dir / key[1] / "config_files" / f"index-{index}.json") or {} for index in indices]
    return [*key, *cells, n, STATUSES[verdict], *origins(key[1], configs)]


def number_text(point: "Point | None", paper: str) -> str:
    if point is None:
        return paper
    if point.verdict == "not judged":
        return f"{point.ours:.3f}, {paper}"
    return f"{point.ours:.3f} ± {point.standard_error:.3f}, {paper}, {STATUSES[point.verdict]}"


def origins(algorithm: str, configs: Sequence[dict[str, Any]]) -> list[str]:
    """Date, machine, settings other than those of cfg/, and commit of some runs and their resumptions; "-" where their configs say none."""
    resumptions = [there for config in configs if isinstance(config.get("_resumptions"), list) for there in config["_resumptions"]]
    environments = [there for there in (*(config.get("_environment") for config in configs), *resumptions) if isinstance(there, dict)]
    mine = load_config(REPOSITORY / "cfg" / f"{algorithm}.json").to_dict()
    settings = {
        f"{key}={config[key]}"
        for config in configs
        for key in FIELDS
        if key not in FREE_KEYS and key in config and mine[key] not in (config[key], "auto")
    }
    dates = sorted({str(there["date"]) for there in environments if there.get("date")}) or ["-"]
    machines = {there.get("device") for there in environments}
    commits = {re.sub(r"^(\w{12})\w+", r"\1", str(there["commit"])) for there in environments if there.get("commit")}
    listed = (sorted(map(str, filter(None, values))) for values in (machines, settings, commits))
    cells = [" to ".join(dict.fromkeys((dates[0], dates[-1]))), *map(", ".join, listed)]
    return [cell.replace("|", "/") or "-" for cell in cells]
