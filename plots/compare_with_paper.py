"""Do your runs reproduce the paper? A table and a figure of the differences from its curves, point by point.

    python plots/compare_with_paper.py --results_dir results/

For every metric, algorithm and number of classes: ours (mean, standard error, number of runs), the paper's, the difference, and a p-value
of equal means: Welch's t-test's or Student's, whichever is larger. (By chance, a few runs often lie far too close together. Welch's test
believes them; Student's, that pools their variance with the paper's, does not, but finds too much where ours truly is larger.) The error
of reading the paper's mean off its figure is added to its standard error in quadrature; where the figure hides that, it is interpolated
between the curve's nearest ones, and marked.

A metric has up to 100 points, so p-values are adjusted (Benjamini and Hochberg's control of the false discovery rate) twice: over the
points of a curve, then over the curves of the metric, each with its smallest. A point differs if both are below 0.05, a curve if one of
its points does. One run has no standard error: it is drawn, not judged. What to expect (tests/test_plots.py simulates it; in brackets
where the points of a run are correlated by 0.8): if ours are the paper's in mean and standard deviation, a metric has a curve that differs
in 1 % of cases with two or three runs, 5 % with 15; if two runs come of 1.5 times its deviation, in 14 %. A curve that is off by three
standard deviations of a run is found in 92 % (56 %) with two runs, 99 % (66 %) with three, 100 % (93 %) with five. Runs of indices 0 to 14
share the paper's class orders, and agree more often.

Beside that, for every algorithm whose runs have a retrained network of their index beside them, the paper's or not: the gap to it, that
is, test accuracy minus the retrained network's, the best epoch of each task, in percentage points. A run gives two numbers: the mean of its
gaps over all tasks, and the slope of the least-squares line through them over the number of classes, in points per 100 classes (below 0:
what is lost grows). Their means over the runs come with standard errors, and with the same of the paper's curve.

Writes comparison_with_paper.md, .png and .svg beside this script or to `--output-dir`, then prints the table; with nothing to compare,
writes nothing. `--ledger` puts the verdicts into RESULTS.md, too (`plots/ledger.py`). The exit status is 0; with `--strict`, 1 if at least
one curve differs, or none could be judged.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the parts are found wherever this script is called from

import numpy as np
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from incremental_cifar.command_line import run_script
from incremental_cifar.config import Config, UserError
from incremental_cifar.safe_files import around_block, check_destinations, write_file
from plots.drawing import COLOURS, FULL_WIDTH, GREY, SINGLE_COLUMN, add_axes, in_style, new_figure, number_of_classes_axis, wrapped
from plots.ledger import BEGIN, END, RESULTS, update_ledger
from plots.output_files import write_figure
from plots.plain_matplotlib import Figure
from plots.published_curves import PublishedCurve, read_published_curves
from plots.run_results import (
    ALGORITHM_LABELS,
    PUBLISHED,
    RELATIVE,
    RETRAINED,
    TEST_ACCURACY,
    AnalysisSettings,
    Curve,
    Run,
    add_output_argument,
    algorithm_folders,
    algorithm_label,
    as_text,
    flattened,
    indices_text,
    legible,
    make_curves,
    mean_and_standard_error,
    metric_of,
    read_runs,
    results_parser,
    size_differences,
)

AGREES, DIFFERS, NOT_JUDGED = "agrees", "differs", "not judged"
LEVEL = 0.05  # a point with a smaller adjusted p-value differs
PAPERS_RUNS = 15  # behind every mean of the paper


class Point(NamedTuple):
    """One mean of ours beside the paper's; in percent, relative accuracies in percentage points."""

    metric: str  # as in published_curves.csv
    algorithm: str
    number_of_classes: int
    ours: float
    standard_error: float  # NaN with one run
    num_runs: int
    paper: float
    paper_standard_error: float  # where the paper's figure hides it, that of its neighbours
    is_hidden: bool
    reading_error: float
    p_value: float = np.nan  # adjusted for the points of the metric; NaN with one run
    indices: tuple[int, ...] = ()  # of our runs

    @property
    def difference(self) -> float:
        return self.ours - self.paper

    @property
    def paper_error(self) -> float:
        """What the paper's mean is uncertain by: its standard error, and that of reading it."""
        return float(np.hypot(self.paper_standard_error, self.reading_error))

    @property
    def error(self) -> float:
        """The standard error of the difference; NaN with one run."""
        return float(np.hypot(self.standard_error, self.paper_error))

    @property
    def verdict(self) -> str:
        if np.isnan(self.p_value):
            return NOT_JUDGED
        return DIFFERS if self.p_value < LEVEL else AGREES


class Gap(NamedTuple):
    """How far an algorithm's test accuracies are from the retrained network's, over all tasks: (n,) a value per run."""

    algorithm: str
    mean: np.ndarray  # percentage points
    slope: np.ndarray  # percentage points per 100 classes


# --- Comparing -----------------------------------------------------------------------------------------------------------------------


def compare(results_dir: Path, published: dict[tuple[str, str], PublishedCurve]) -> tuple[list[Point], list[str]]:
    """All points that both we and the paper have, in the paper's order, and remarks on runs that are left out, missing or in progress.

    Raises UserError for files that cannot be used.
    """
    points, remarks = [], []
    for name, published_name in PUBLISHED.items():
        metric = metric_of(name)
        algorithms = [algorithm for algorithm in ALGORITHM_LABELS if (published_name, algorithm) in published]
        runs, left_out = only_the_papers(read_runs(results_dir, metric, algorithms))
        shown = make_curves(runs, metric)
        remarks += [*left_out, *(f"{published_name}: {remark}" for remark in shown.remarks)]
        needed = [*algorithms, RETRAINED] if metric.is_relative else algorithms
        if missing := [algorithm for algorithm in needed if algorithm not in runs]:
            remarks.append(f"{published_name}: nothing to compare of {', '.join(missing)}")
        curves = [matching_points(published_name, curve, published[published_name, curve.algorithm]) for curve in shown.curves]
        points += judged([point for curve in curves for point in curve])
    return points, remarks


def gaps_to_retrained(results_dir: Path) -> tuple[list[Gap], list[str]]:
    """The gap of every algorithm that has one, of complete runs of the paper's problem, and remarks on those that are left out.

    Files of other folders than the paper's that cannot be used leave these out, too. Raises UserError for files of the paper's.
    """
    metric = metric_of(RELATIVE)
    found, unusable = read_runs(results_dir, metric, list(ALGORITHM_LABELS)), []
    if RETRAINED not in found:
        return [], []
    for name in algorithm_folders(results_dir):
        try:
            found |= {} if name in found else read_runs(results_dir, metric_of(TEST_ACCURACY), [name])
        except UserError as error:
            unusable.append(f"gap to the retrained network: {name} left out, {str(error).replace(f'{results_dir}/', '')}")
    runs, remarks = only_the_papers(found)
    remarks += unusable
    gaps = []
    for curve in make_curves(runs, metric).curves:
        is_complete = np.isfinite(curve.values).all(axis=1) & (len(curve.positions) == Config().num_tasks)
        if not is_complete.all():
            indices = [index for index, complete in zip(curve.indices, is_complete, strict=True) if not complete]
            remarks.append(f"gap to the retrained network: {curve.algorithm}: {indices_text(indices)} without all tasks; left out")
        if is_complete.any():
            values = curve.values[is_complete]
            gaps.append(Gap(curve.algorithm, values.mean(axis=1), slopes(curve.positions, values)))
    return gaps, remarks


def slopes(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least-squares slopes of rows over positions, per 100 of these: (p,) and (n, p) to (n,)."""
    centred = positions - positions.mean()
    return 100 * values @ centred / (centred @ centred)


def only_the_papers(runs: dict[str, list[Run]]) -> tuple[dict[str, list[Run]], list[str]]:
    """The runs of the paper's problem and analysis, and a remark for each group of others; runs of fewer tasks are the beginning of it."""
    kept: dict[str, list[Run]] = {}
    groups: dict[tuple[str, str], list[int]] = {}
    for run in flattened(runs):
        if run.sizes.num_tasks < Config().num_tasks:
            run = run._replace(sizes=replace(run.sizes, num_tasks=Config().num_tasks))
        if differences := size_differences(run.sizes):
            groups.setdefault((run.algorithm, f"another experiment than the paper's ({differences})"), []).append(run.index)
        elif run.analysis not in (None, AnalysisSettings()):
            groups.setdefault((run.algorithm, f"analysed otherwise than the paper ({run.analysis})"), []).append(run.index)
        else:
            kept.setdefault(run.algorithm, []).append(run)
    return kept, [f"{algorithm}: {indices_text(indices)} left out, {reason}" for (algorithm, reason), indices in groups.items()]


def matching_points(published_name: str, curve: Curve, paper: PublishedCurve) -> list[Point]:
    """The points of a curve at numbers of classes where we have a run and the paper a value; not judged yet."""
    mean, standard_error, count = mean_and_standard_error(curve.values)
    is_hidden = np.isnan(paper.standard_error)
    shown = paper.number_of_classes[~is_hidden], paper.standard_error[~is_hidden]
    paper_errors = np.interp(paper.number_of_classes, *shown)
    papers = zip(paper.mean, paper_errors, is_hidden, paper.reading_error, strict=True)
    paper_at = dict(zip(paper.number_of_classes, papers, strict=True))
    return [
        Point(published_name, curve.algorithm, classes, *ours, *paper_at[classes], indices=tuple(np.array(curve.indices)[is_there]))
        for classes, *ours, is_there in zip(curve.positions, mean, standard_error, count, np.isfinite(curve.values).T, strict=True)
        if classes in paper_at and is_there.any()
    ]


def judged(points: Sequence[Point]) -> list[Point]:
    """All points of a metric with their p-values."""
    if not points:
        return []
    values = np.array([(point.ours, point.standard_error, point.num_runs, point.paper, point.paper_error) for point in points])
    adjusted = adjusted_p_values(p_values(*values.T), np.array([point.algorithm for point in points]))
    return [point._replace(p_value=float(p_value)) for point, p_value in zip(points, adjusted, strict=True)]


def p_values(ours: np.ndarray, standard_error: np.ndarray, num_runs: np.ndarray, paper: np.ndarray, paper_error: np.ndarray) -> np.ndarray:
    """Two-sided p-values of equal means, of Welch's t-test or of Student's, whichever is larger; arrays that broadcast, NaN with one run.

    The paper's reading error counts as a part of its 15 runs' deviation, in Welch and Satterthwaite's degrees of freedom too. Where a few
    runs are close together by chance, these are near 14: the reason why Welch's test alone finds far too much.
    """
    samples = ours, standard_error * np.sqrt(num_runs), num_runs, paper, paper_error * np.sqrt(PAPERS_RUNS), PAPERS_RUNS
    return np.maximum(*(ttest_ind_from_stats(*samples, equal_var=equal_var).pvalue for equal_var in (False, True)))


def adjusted_p_values(p: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """p-values of a metric's points, adjusted by Benjamini and Hochberg over those of a curve, and at least the curve's over the curves.

    p: (p,) NaN where there is none. curve: (p,) which curve a point is on. Returns (p,). A curve's is the smallest of its points': adjusted
    all at once, a curve that differs everywhere would let single points of others pass for differing.
    """
    adjusted = p.copy()
    curves = [points for name in np.unique(curve) if (points := np.flatnonzero((curve == name) & np.isfinite(p))).size]
    for points in curves:
        adjusted[points] = false_discovery_control(p[points])
    for points, of_curve in zip(curves, false_discovery_control([adjusted[points].min() for points in curves]), strict=True):
        adjusted[points] = np.maximum(adjusted[points], of_curve)
    return adjusted


def by_curve(points: Sequence[Point]) -> dict[tuple[str, str], list[Point]]:
    """(metric, algorithm) to points."""
    curves: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        curves.setdefault((point.metric, point.algorithm), []).append(point)
    return curves


def common_verdict(points: Sequence[Point]) -> str:
    """Of a curve, or of all: differs if one of the points does, and otherwise agrees if one is judged."""
    return min((point.verdict for point in points), key=(DIFFERS, AGREES, NOT_JUDGED).index, default=NOT_JUDGED)


def summary(points: Sequence[Point]) -> str:
    """One line: how many of the points and curves that are judged agree, and the smallest p-value."""
    compared = [point for point in points if point.verdict != NOT_JUDGED]
    if not compared:
        return "Nothing compared: " + (
            "one run is too few for a standard error." if points else "no run of the paper's experiment here; nothing written."
        )
    curves = [common_verdict(curve) for curve in by_curve(compared).values()]
    least = min(compared, key=lambda point: point.p_value)
    return (
        f"{curves.count(AGREES)} of {len(curves)} curves agree, {sum(point.verdict == AGREES for point in compared)} of {len(compared)} "
        f"points; the smallest adjusted p-value is {p_text(least.p_value)}, {least.metric} of {least.algorithm} at "
        f"{least.number_of_classes} classes, {least.difference:+.3f}."
    )


# --- The table -----------------------------------------------------------------------------------------------------------------------

COLUMNS = ("metric", "algorithm", "classes", "ours", "SE", "n", "paper", "SE", "difference", "adjusted p", "verdict")
NUM_TEXT_COLUMNS = 2  # on the left; the others are numbers, to the right


def number_or_dash(value: float, form: str = ".3f") -> str:
    return "-" if np.isnan(value) else format(value, form)


def p_text(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else number_or_dash(p_value)


def table_row(point: Point) -> tuple[str, ...]:
    """A point as texts, one per column."""
    return (
        point.metric,
        point.algorithm,
        str(point.number_of_classes),
        f"{point.ours:.3f}",
        number_or_dash(point.standard_error),
        str(point.num_runs),
        f"{point.paper:.3f}",
        ("hidden, ~" if point.is_hidden else "") + f"{point.paper_standard_error:.3f}",
        f"{point.difference:+.3f}",
        p_text(point.p_value),
        point.verdict,
    )


OVERVIEW_COLUMNS = ("metric", "algorithm", "agree", "largest difference", "at classes", "adjusted p", "verdict")


def overview_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Per curve: how many of the judged points agree, the largest difference of any, the smallest p-value, and the verdict."""
    rows = []
    for names, curve in by_curve(points).items():
        compared = [point for point in curve if point.verdict != NOT_JUDGED]
        agree = f"{sum(point.verdict == AGREES for point in compared)} of {len(compared)}" if compared else "-"
        farthest = max(curve, key=lambda point: abs(point.difference))
        largest = f"{farthest.difference:+.3f}", str(farthest.number_of_classes)
        p_value = min((point.p_value for point in compared), default=np.nan)
        rows.append((*names, agree, *largest, p_text(p_value), common_verdict(curve)))
    return rows


GAP_COLUMNS = ("gap to the retrained network", "n", "mean", "SE", "paper", "slope", "SE", "paper")


def gap_rows(gaps: Sequence[Gap], published: dict[tuple[str, str], PublishedCurve]) -> list[tuple[str, ...]]:
    """Per algorithm the mean gap and its slope, with standard errors over the runs ("-" of one run), and those of the paper's curve."""
    rows = []
    for gap in gaps:
        row = [gap.algorithm, str(len(gap.mean))]
        paper = published.get((PUBLISHED[RELATIVE], gap.algorithm))
        papers = (paper.mean.mean(), slopes(paper.number_of_classes, paper.mean)) if paper else (np.nan, np.nan)
        for values, papers_value in zip((gap.mean, gap.slope), papers, strict=True):
            (mean,), (standard_error,), _ = mean_and_standard_error(values[:, np.newaxis])
            row += [f"{mean:+.3f}", number_or_dash(standard_error), number_or_dash(papers_value, "+.3f")]
        rows.append(tuple(row))
    return rows


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned by spaces."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = (
        "  ".join(
            cell.ljust(width) if number < NUM_TEXT_COLUMNS else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (columns, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rules = ["---" if number < NUM_TEXT_COLUMNS else "---:" for number in range(len(columns))]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, rules, *rows))


EXPLANATION = """\
All numbers are percent; relative accuracies are percentage points, stable ranks percent of 512 units. SE is the standard error of the
mean over n runs (the paper: 15; where its figure hides it, "hidden" and that of its neighbours on the curve). p is the larger of Welch's
and Student's t-tests of equal means, with the error of reading the paper's mean in its SE, adjusted (Benjamini-Hochberg) for the points
of the curve and the curves of the metric; a curve's is the smallest of its points'. Below 0.05 it differs: where ours are the paper's in
mean and standard deviation, a metric has such a curve in at most one of twenty comparisons. One run has no SE and is not judged. That few
runs agree may only mean that they are few. Runs of indices 0 to 14 have the paper's class orders and agree more often than others. On the
first task the base system, head resetting and the retrained network are one algorithm: deterministic runs of one index are equal there."""


GAP_EXPLANATION = """\
Gaps are test accuracies minus those of the retrained network of the same index, the best epoch of each task: their mean over the tasks in
percentage points, and the slope of the least-squares line through them in points per 100 classes; means over n complete runs."""


def markdown(points: Sequence[Point], gaps: Sequence[Sequence[str]], remarks: Sequence[str]) -> str:
    """The whole comparison as a Markdown file."""
    parts = [
        "# Comparison with the paper",
        summary(points),
        "\n".join(f"- {remark}" for remark in remarks),
        markdown_table(OVERVIEW_COLUMNS, overview_rows(points)),
        *([GAP_EXPLANATION, markdown_table(GAP_COLUMNS, gaps)] if gaps else []),
        EXPLANATION,
        markdown_table(COLUMNS, [table_row(point) for point in points]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


# --- The figure ----------------------------------------------------------------------------------------------------------------------

MARKERS = {
    AGREES: {"marker": "o", "markersize": 2.4},
    DIFFERS: {"marker": "x", "markersize": 3.6, "markeredgewidth": 1.0},
    NOT_JUDGED: {"marker": "o", "markersize": 2.4, "markerfacecolor": "white", "markeredgewidth": 0.6},
}
LEGEND = (
    "Our mean minus the paper's, in percentage points. Grey: ± 1 standard error of the difference. "
    "Dots agree, crosses differ; hollow: one run, not judged."
)


@in_style
def draw_differences(points: Sequence[Point], notes: Sequence[str] = ()) -> Figure:
    """A panel per metric and algorithm: our mean minus the paper's, with its standard error as a band around 0.

    Filled: agrees. Crosses: differs. Hollow: one run, not judged. The panels of a row share their y axis.
    """
    panels = by_curve(points)
    metrics = list(dict.fromkeys(metric for metric, _ in panels))
    algorithms = [algorithm for algorithm in ALGORITHM_LABELS if any(algorithm == of_panel for _, of_panel in panels)]
    left, right, gap, row_height, row_gap = 0.6, 0.12, 0.17, 0.95, 0.16
    width = min((FULL_WIDTH - left - right - gap * (len(algorithms) - 1)) / len(algorithms), 2.4)
    full_width = max(left + right + len(algorithms) * (width + gap) - gap, SINGLE_COLUMN)
    note_lines, foot = wrapped(notes, full_width)
    full_height = foot + 0.42 + len(metrics) * (row_height + row_gap) + 0.2
    figure = new_figure(full_width, full_height, note_lines)
    for row, metric in enumerate(metrics):
        of_metric = [point for point in points if point.metric == metric]
        reach = min(1.12 * max(max(abs(point.difference), np.nan_to_num(point.error)) for point in of_metric), 100)
        for column, algorithm in enumerate(algorithms):
            if not (panel := panels.get((metric, algorithm))):
                continue
            bottom = full_height - 0.28 - (row + 1) * row_height - row * row_gap
            axes = add_axes(figure, left + column * (width + gap), bottom, width, row_height)
            classes, differences, errors = np.array([(point.number_of_classes, point.difference, point.error) for point in panel]).T
            colour = COLOURS[algorithm]
            axes.axhline(0, color=GREY, linewidth=0.6, linestyle=(0, (4, 2)), zorder=1.5)
            axes.fill_between(classes, -errors, errors, where=np.isfinite(errors), color=GREY, alpha=0.15, linewidth=0)
            axes.plot(classes, differences, color=colour, linewidth=0.5)
            for verdict, marker in MARKERS.items():
                chosen = np.array([point.verdict == verdict for point in panel])
                axes.plot(classes[chosen], differences[chosen], color=colour, linestyle="none", label=f"_{verdict}", **marker)
            number_of_classes_axis(axes, np.arange(5, 101, 5))
            axes.set_xticks([5, 50, 100])
            axes.set_ylim(-reach, reach)
            axes.locator_params(axis="y", nbins=5)
            is_lowest = not any((below, algorithm) in panels for below in metrics[row + 1 :])
            axes.tick_params(labelbottom=is_lowest)
            if not is_lowest:
                axes.set_xlabel("")
            if not any((metric, before) in panels for before in algorithms[:column]):
                axes.set_ylabel(as_text(metric))
            else:
                axes.tick_params(labelleft=False)
            if not any((above, algorithm) in panels for above in metrics[:row]):
                axes.set_title(algorithm_label(algorithm), color=colour, fontsize=6.5)
    figure.align_ylabels()
    return figure


# --- The script ----------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    parser = results_parser("Compare stored runs with the paper's curves.")
    add_output_argument(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit status 1 if at least one curve differs (by chance, one of a metric does in at most 1 of 20 cases), or none is judged",
    )
    parser.add_argument(
        "--ledger", type=Path, nargs="?", const=RESULTS, metavar="PATH", help="put the verdicts into this file (default RESULTS.md), too"
    )
    parsed = parser.parse_args(arguments)
    check_destinations(*output_paths(parsed.output_dir))
    if parsed.ledger is not None:
        check_destinations(parsed.ledger)
        around_block(parsed.ledger, BEGIN, END)
    return parsed


def output_paths(folder: Path) -> list[Path]:
    """The files of a comparison: the table and the figures."""
    return [folder / f"comparison_with_paper{suffix}" for suffix in (".md", ".png", ".svg")]


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    published = read_published_curves()
    points, remarks = compare(parsed.results_dir, published)
    gaps, more_remarks = gaps_to_retrained(parsed.results_dir)
    gap_table = gap_rows(gaps, published)
    remarks = list(dict.fromkeys([*remarks, *more_remarks]))
    if points:
        figure = draw_differences(points, [LEGEND, *(legible(f"{remark}.") for remark in remarks)])
        table_path, *figure_paths = output_paths(parsed.output_dir)
        write_file(table_path, markdown(points, gap_table, remarks).encode())
        write_figure(figure, *figure_paths)
        print(f"Wrote {table_path}")
    if points and parsed.ledger is not None:
        verdicts = {curve: (of_curve, common_verdict(of_curve)) for curve, of_curve in by_curve(points).items()}
        remarks += update_ledger(parsed.ledger, parsed.results_dir, published, verdicts)
        print(f"Wrote {parsed.ledger}")
    for remark in remarks:
        print("Note: " + remark)
    if points:
        print(plain_table(COLUMNS, [table_row(point) for point in points]), end="\n\n")
        print(plain_table(OVERVIEW_COLUMNS, overview_rows(points)), end="\n\n")
    if gap_table:
        print(plain_table(GAP_COLUMNS, gap_table), end="\n\n")
    print(summary(points))
    return 1 if parsed.strict and common_verdict(points) != AGREES else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
