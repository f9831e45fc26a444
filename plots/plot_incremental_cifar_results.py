"""One figure of one metric: a curve per algorithm, the mean of its runs and +- 1 standard error.

    python plots/plot_incremental_cifar_results.py --metric test_accuracy_per_epoch --published

Reads <results_dir>/<algorithm>/<metric>/index-K.npy, of any folder *_per_epoch or *_analysis, and writes plots/<metric>.svg, or `--output`.
Per task, the best of its epochs counts (losses: the least; counts and whatever else: the mean of those that have a value); `--per-epoch`
draws every epoch.
`plots/run_results.py` says which task is drawn where, and what a folder's name says about its values.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the parts are found wherever this script is called from

import numpy as np

from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError
from plots.drawing import (
    BAND_OPACITY,
    GREY,
    LINE_WIDTH,
    SINGLE_COLUMN,
    add_axes,
    draw_curves,
    epoch_axis,
    in_style,
    limit_to_possible_values,
    new_figure,
    number_of_classes_axis,
    place,
    room_beside,
    wrapped,
)
from plots.output_files import SUFFIXES, check_figure_path, write_figure
from plots.plain_matplotlib import Figure, Line2D, Patch
from plots.published_curves import PublishedCurve, read_published_curves
from plots.run_results import (
    METRIC_ENDINGS,
    METRICS,
    PUBLISHED,
    RELATIVE,
    RETRAINED,
    Curve,
    MetricCurves,
    add_algorithms_argument,
    algorithm_label,
    find_metrics,
    flattened,
    legible,
    make_curves,
    mean_and_standard_error,
    metric_of,
    read_runs,
    results_parser,
    size_differences,
)

AXES_HEIGHT, RIGHT = 1.9, 0.18  # inches
PAPERS_LINE = {"linestyle": (0, (4, 2)), "linewidth": 0.7}


@in_style
def draw_metric(shown: MetricCurves, per_epoch: bool, published: dict[str, PublishedCurve], notes: Sequence[str]) -> Figure:
    """The figure of one metric at single-column width, with a legend and notes below the axes.

    shown: at least one curve. published: the paper's curves by algorithm; those of algorithms that are shown appear beneath them.
    """
    metric = shown.metric
    beneath = {curve.algorithm: published[curve.algorithm] for curve in shown.curves if curve.algorithm in published}
    has_band = any(len(curve.indices) > 1 for curve in shown.curves)
    num_entries = len(shown.curves) + metric.is_relative + has_band + bool(beneath)
    note_lines, foot = wrapped(notes, SINGLE_COLUMN)

    legend_top = max(foot, 0.08) + 0.04 + 0.127 * num_entries
    bottom = legend_top + 0.4
    height = bottom + AXES_HEIGHT + (0.28 if metric.images else 0.12)
    figure = new_figure(SINGLE_COLUMN, height, note_lines)
    axes = add_axes(figure, 0.5, bottom, SINGLE_COLUMN - 0.5 - RIGHT, AXES_HEIGHT)

    lines = draw_curves(axes, shown, 0.7 if per_epoch else LINE_WIDTH)
    handles = [*lines.values()]
    if has_band:
        handles.append(Patch(color=GREY, alpha=BAND_OPACITY, linewidth=0, label="± 1 standard error"))
    for algorithm, paper in beneath.items():
        colour = lines[algorithm].get_color()
        axes.plot(paper.number_of_classes, paper.mean, color=colour, zorder=1.5, label="_published", **PAPERS_LINE)
    if beneath:
        handles.append(Line2D([], [], color=GREY, label="The paper (15 runs)", **PAPERS_LINE))

    if per_epoch:
        epoch_axis(axes, len(shown.axis))
    else:
        number_of_classes_axis(axes, np.unique(np.concatenate([shown.axis, *(paper.number_of_classes for paper in beneath.values())])))
    limit_to_possible_values(axes, metric)
    axes.set_ylabel(shown.axis_label)
    axes.set_title(metric.images, loc="left")
    left = room_beside(axes)[0] + 0.05
    place(axes, left, SINGLE_COLUMN - left - RIGHT)
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(left / SINGLE_COLUMN, legend_top / height),
        frameon=False,
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.35,
        handlelength=2.4,
    )
    return figure


def last_points(curves: Sequence[Curve], per_epoch: bool) -> str:
    """One line: where each curve ends, mean and standard error in the unit of the axis, and the runs that reach there."""
    texts = []
    for curve in curves:
        mean, standard_error, count = mean_and_standard_error(curve.values)
        end = np.flatnonzero(count)[-1]
        error = f" ± {standard_error[end]:.4g}" if count[end] > 1 else ""
        where = f"epoch {curve.positions[end]}" if per_epoch else f"{curve.positions[end]} classes"
        texts.append(f"{legible(curve.algorithm)} {mean[end]:.4g}{error} at {where} (n = {count[end]})")
    return "; ".join(texts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked as far as that needs no results. Raises UserError."""
    parser = results_parser("Draw one metric of stored runs: mean and +- 1 standard error per algorithm.")
    endings = " or ".join("*" + ending for ending in METRIC_ENDINGS)
    parser.add_argument("--metric", required=True, metavar="NAME", help=f"what to draw: a run's folder {endings}, or {RELATIVE}")
    add_algorithms_argument(parser, "folders, in the order of the legend (default: all that have the metric)")
    parser.add_argument("--output", type=Path, metavar="PATH", help=f"file to write, {SUFFIXES} (default <metric>.svg beside this script)")
    parser.add_argument("--per-epoch", action="store_true", help="draw every epoch instead of one value for each task")
    parser.add_argument("--published", action="store_true", help="draw the paper's curves beneath, thin and dashed")
    parsed = parser.parse_args(arguments)
    metric = metric_of(parsed.metric)
    if parsed.per_epoch and not metric.per_epoch:
        raise UserError(f"--per-epoch: {parsed.metric} has one value per task")
    if parsed.published and parsed.metric not in PUBLISHED:
        raise UserError(f"--published: the paper shows no {parsed.metric}")
    if parsed.published and parsed.per_epoch:
        raise UserError("--published: the paper's curves have one value per task; leave out --per-epoch")
    if metric.is_relative and parsed.algorithms == [RETRAINED]:
        raise UserError(f"--algorithms: {parsed.metric} compares others with {RETRAINED}; name at least one")
    parsed.output = check_figure_path(parsed.output or Path(__file__).resolve().parent / f"{parsed.metric}.svg")
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    metric = metric_of(parsed.metric)
    is_folder_of_values = metric.folder.endswith(METRIC_ENDINGS) and "/" not in metric.folder
    runs = read_runs(parsed.results_dir, metric, parsed.algorithms) if is_folder_of_values else {}
    writer = "incremental_cifar_experiment.py" if metric.per_epoch else "post_run_analysis.py"
    if not runs:
        hint = f" ({writer} writes it)" * (parsed.metric in METRICS)
        there = ", ".join(find_metrics(parsed.results_dir)) or "nothing that can be drawn"
        raise UserError(f"{parsed.results_dir}: no algorithm here has {metric.folder}{hint}; what there is: {there}")
    for algorithm in [*(parsed.algorithms or []), *([RETRAINED] if metric.is_relative else [])]:
        if algorithm not in runs:
            raise UserError(f"{parsed.results_dir / algorithm / metric.folder}: no run's metric here, and it is needed; {writer} writes it")
    shown = make_curves(runs, metric, parsed.per_epoch)
    if not shown.curves:
        raise UserError(f"{parsed.results_dir}: nothing to draw yet of {parsed.metric}: {'; '.join(shown.remarks) or 'only ' + RETRAINED}")

    notes = list(shown.remarks)
    published = {}
    if parsed.published:
        published = {algorithm: curve for (name, algorithm), curve in read_published_curves().items() if name == PUBLISHED[parsed.metric]}
        if differences := {size_differences(run.sizes) for run in flattened(runs)} - {""}:
            notes.append("These runs are another experiment than the paper's: " + "; ".join(sorted(differences)))
        if absent := [algorithm_label(curve.algorithm) for curve in shown.curves if curve.algorithm not in published]:
            notes.append("The paper has no such curve of: " + ", ".join(absent))
    for note in notes:
        print("Note: " + note)
    if escaped := [f"{name!r} is {algorithm_label(name)}" for name in runs if legible(name) != name]:
        print("Note: in the figure, characters that its font cannot show are escaped: " + ", ".join(escaped))
    print(f"{parsed.metric}: {last_points(shown.curves, parsed.per_epoch)}")
    write_figure(draw_metric(shown, parsed.per_epoch, published, notes), parsed.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
