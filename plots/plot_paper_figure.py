"""The paper's figure from your runs: accuracy relative to the retrained network, dormant units and stable rank; and test accuracy.

    python plots/plot_paper_figure.py --results_dir results/

Writes paper_figure and test_accuracy_figure, each as .png and .svg, beside this script or to `--output-dir`. Curves are means over runs,
bands +- 1 standard error, and names are written at the curves' ends. Without `--algorithms` they are the paper's. What is not there yet is
left out, and said so; an empty panel says why. As in the paper, the retrained network has no curve of dormant units and rank.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the parts are found wherever this script is called from

from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError
from incremental_cifar.safe_files import check_destinations
from plots.drawing import (
    FULL_WIDTH,
    SINGLE_COLUMN,
    add_axes,
    draw_curves,
    in_style,
    label_ends,
    limit_to_possible_values,
    new_figure,
    number_of_classes_axis,
    place,
    room_beside,
    runs_text,
    wrapped,
)
from plots.output_files import write_figure
from plots.plain_matplotlib import Axes, Figure
from plots.run_results import (
    ALGORITHM_LABELS,
    RELATIVE,
    RETRAINED,
    TEST_ACCURACY,
    Metric,
    MetricCurves,
    Run,
    add_algorithms_argument,
    add_output_argument,
    algorithm_folders,
    algorithm_label,
    flattened,
    make_curves,
    metric_of,
    read_runs,
    results_parser,
)

PANELS = (RELATIVE, "next_task_dormant_units_analysis", "next_task_stable_rank_analysis")
LETTERS = "abc"
STEMS = ("paper_figure", "test_accuracy_figure")
LINE_HEIGHT = 0.105  # inches that a line of a name takes


@in_style
def draw_three_panels(panels: Sequence[MetricCurves], empty: Sequence[str], notes: Sequence[str]) -> Figure:
    """Three panels side by side at full page width. empty: what each says if it has no curve."""
    bottom, margin, gap = 0.42, 0.05, 0.1  # inches
    height = max(1.85, *map(names_height, panels))
    note_lines, foot = wrapped(notes, FULL_WIDTH)
    figure = new_figure(FULL_WIDTH, foot + bottom + height + 0.25, note_lines)
    for shown, text in zip(panels, empty, strict=True):
        draw_panel(add_axes(figure, 1, foot + bottom, 1, height), shown, text)
    rooms = [room_beside(axes) for axes in figure.axes]
    width = (FULL_WIDTH - 2 * margin - 2 * gap - sum(map(sum, rooms))) / len(panels)
    x = margin
    for axes, letter, (left, right) in zip(figure.axes, LETTERS, rooms, strict=True):
        place(axes, x + left, width)
        if width < 1:
            axes.set_xticks(axes.get_xticks()[1::2])  # beside long names
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=8, x=-left / width)
        x += left + width + right + gap
    return figure


@in_style
def draw_test_accuracy(shown: MetricCurves, notes: Sequence[str]) -> Figure:
    """Test accuracy of all algorithms at single-column width."""
    height = max(2.2, names_height(shown))
    note_lines, foot = wrapped(notes, SINGLE_COLUMN)
    figure = new_figure(SINGLE_COLUMN, foot + (height + 0.55), note_lines)
    axes = add_axes(figure, 1, foot + 0.42, 1, height)
    draw_panel(axes, shown)
    left, right = room_beside(axes)
    place(axes, left + 0.05, SINGLE_COLUMN - left - right - 0.1)
    return figure


def short_name(algorithm: str) -> str:
    """An algorithm's label in two lines, or as many as a panel has room for."""
    label = algorithm_label(algorithm)
    spaces = [place for place, character in enumerate(label) if character == " " and len(label) > 10]
    middle = min(spaces, key=lambda place: abs(2 * place + 1 - len(label)), default=len(label))
    return "\n".join(textwrap.fill(part, 20) for part in (label[:middle], label[middle + 1 :]) if part)


def names_height(shown: MetricCurves) -> float:
    """The inches that all names take one above the other."""
    names = [short_name(algorithm) for algorithm in (*(curve.algorithm for curve in shown.curves), RETRAINED)]
    return LINE_HEIGHT * sum(name.count("\n") + 1 for name in names)


def draw_panel(axes: Axes, shown: MetricCurves, empty: str = "") -> None:
    """Draw one metric, with the algorithms' names at their curves' ends. empty: written where there is no curve."""
    axes.set_ylabel(shown.axis_label)
    if not shown.curves:
        axes.set(xlabel="Number of classes", xticks=[], yticks=[])
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="#7f7f7f")
        return
    named = [(short_name(algorithm), line) for algorithm, line in draw_curves(axes, shown).items()]
    number_of_classes_axis(axes, shown.axis)
    axes.margins(y=0.1)
    limit_to_possible_values(axes, shown.metric)
    axes.locator_params(axis="y", nbins=6)
    label_ends(axes, named)


def why_empty(metric: Metric, runs: dict[str, list[Run]]) -> str:
    """What a panel says if it has no curve, but another has one. runs: all that have its metric."""
    indices = {run.index for run in flattened(runs) if run.algorithm != RETRAINED}
    retrained = {run.index for run in runs.get(RETRAINED, [])}
    if not indices:
        return "No test\naccuracies yet" if metric.is_relative else "Not analysed yet"
    if metric.is_relative and indices.isdisjoint(retrained):
        return "No retrained\nnetwork" + " of\nthese indices" * bool(retrained)
    return "No complete task yet"


def panel_remarks(panels: Sequence[MetricCurves]) -> list[str]:
    """What is drawn in part or not at all, each once, with the letters of its panels."""
    letters: dict[str, list[str]] = {}
    for shown, letter in zip(panels, LETTERS, strict=True):
        for remark in shown.remarks:
            letters.setdefault(remark, []).append(letter)
    return [f"Panel {', '.join(where)}: {remark}." for remark, where in letters.items()]


def count_note(panels: Sequence[MetricCurves]) -> str:
    """How many runs the curves are means of, as a line below a figure."""
    counts: dict[str, set[int]] = {}
    for shown in panels:
        for curve in shown.curves:
            counts.setdefault(algorithm_label(curve.algorithm), set()).add(len(curve.indices))
    distinct = set.union(*counts.values())
    if len(distinct) == 1:
        (number,) = distinct
        return "One run each." if number == 1 else f"Means of {runs_text(number)} each; shaded: ± 1 standard error."
    texts = [f"{label} {' or '.join(map(str, sorted(numbers)))}" for label, numbers in counts.items()]
    return f"Means; shaded: ± 1 standard error. Runs: {', '.join(texts)}."


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises UserError."""
    parser = results_parser("Draw the paper's figure, and test accuracies, from stored runs.")
    add_output_argument(parser)
    add_algorithms_argument(parser, "folders, in the order in which curves lie (default: the paper's five)")
    parsed = parser.parse_args(arguments)
    check_destinations(*(path for stem in STEMS for path in figure_paths(parsed.output_dir, stem)))
    return parsed


def figure_paths(folder: Path, stem: str) -> list[Path]:
    return [folder / f"{stem}{suffix}" for suffix in (".png", ".svg")]


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    chosen = parsed.algorithms or list(ALGORITHM_LABELS)
    panels, empty, gaps, found = [], [], [], set()
    for name in (*PANELS, TEST_ACCURACY):
        metric = metric_of(name)
        algorithms = [algorithm for algorithm in chosen if metric.per_epoch or algorithm != RETRAINED]
        runs = read_runs(parsed.results_dir, metric, algorithms)
        panels.append(make_curves(runs, metric))
        empty.append(why_empty(metric, runs))
        found |= runs.keys()
        if missing := [algorithm for algorithm in algorithms if algorithm not in runs]:
            gaps.append(f"{name}: no runs of {', '.join(missing)}")
    *panels, accuracy = panels
    has_panels = any(shown.curves for shown in panels)
    absent = [algorithm for algorithm in parsed.algorithms or [] if algorithm not in found]
    if absent or not (has_panels or accuracy.curves):
        raise UserError(f"{parsed.results_dir}: nothing here that the paper's figure shows of {', '.join(absent or chosen)}")
    others = [name for name in algorithm_folders(parsed.results_dir) if (parsed.results_dir / name / TEST_ACCURACY).is_dir()]
    if others := [name for name in others if name not in chosen]:
        gaps.append(f"here too, and drawn where --algorithms names them: {', '.join(others)}")

    of_panels, of_accuracy = panel_remarks(panels), [f"{remark}." for remark in accuracy.remarks]
    for note in [*gaps, *of_panels, *(f"{TEST_ACCURACY}: {remark}" for remark in of_accuracy)]:
        print("Note: " + note)
    figures = {}
    if has_panels:
        figures[STEMS[0]] = draw_three_panels(panels, empty[:-1], [count_note(panels), *of_panels])
    if accuracy.curves:
        figures[STEMS[1]] = draw_test_accuracy(accuracy, [count_note([accuracy]), *of_accuracy])
    for stem, figure in figures.items():
        write_figure(figure, *figure_paths(parsed.output_dir, stem))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
