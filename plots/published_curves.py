"""The paper's curves, as read off its figures: published_curves.csv in, arrays out.

The file has the columns metric (relative_accuracy, test_accuracy, dormant_units, stable_rank), algorithm, number_of_classes (5 to 100),
mean (percent; relative_accuracy in percentage points; stable_rank in percent of 512), standard_error (of 15 runs; empty where the band is
hidden under other curves) and reading_error (of the mean). Of dormant units and ranks, a row is the network about to be trained on so
many classes, with images of the newest of them; see `run_results`.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from incremental_cifar.config import UserError

PUBLISHED_CURVES = Path(__file__).resolve().parent / "published_curves.csv"


class PublishedCurve(NamedTuple):
    """One curve of the paper; four arrays of shape (p,)."""

    number_of_classes: np.ndarray  # integers, rising
    mean: np.ndarray  # float64, percent
    standard_error: np.ndarray  # float64, percent; NaN where the figure hides it
    reading_error: np.ndarray  # float64, percent, greater than 0


def read_published_curves(path: Path = PUBLISHED_CURVES) -> dict[tuple[str, str], PublishedCurve]:
    """(metric, algorithm) to curve. Raises UserError naming the file, and the line if one of them is at fault."""
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    line = 1
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                line += 1
                number_of_classes, mean, reading_error = int(row["number_of_classes"]), float(row["mean"]), float(row["reading_error"])
                if not (np.isfinite(mean) and 0 < reading_error < np.inf):
                    raise ValueError("mean and reading_error must be finite, the latter greater than 0")
                point = number_of_classes, mean, float(row["standard_error"] or "nan"), reading_error
                rows.setdefault((row["metric"], row["algorithm"]), []).append(point)
    except OSError as error:
        raise UserError(f"{path}: cannot read the paper's curves ({error.strerror})") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}, line {line}: not a row of the paper's curves ({type(error).__name__}: {error})") from None
    curves = {}
    for key, points in rows.items():
        columns = np.array(sorted(points)).T  # (4, p)
        curves[key] = PublishedCurve(columns[0].astype(int), *columns[1:])
    return curves
