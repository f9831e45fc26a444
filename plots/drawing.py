"""What the figures have in common: colours, axes, curves with their bands, and names at their ends.

Figures are laid out in inches, so that text of a given size fits whatever the data are. Nothing here touches pyplot's global state: no
window system is needed, and whatever draws is decorated with `in_style`.
"""

import itertools
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from plots.plain_matplotlib import DEFAULTS, FONT, Axes, Figure, FigureCanvasAgg, Line2D, ScaledTranslation, Text, rc_context
from plots.run_results import METHOD_LABELS, RETRAINED, Curve, Metric, MetricCurves, algorithm_label, mean_and_standard_error

STYLE = DEFAULTS | {
    "font.family": FONT,
    "font.size": 7,  # also of the axes' labels
    "axes.titlesize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "text.parse_math": False,  # a folder's name may contain dollar signs
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "svg.hashsalt": "incremental-cifar",  # otherwise every SVG gets other ids
    "pdf.fonttype": 42,
}
in_style = rc_context(STYLE)  # a decorator of functions that draw
SINGLE_COLUMN = 3.5  # inches
FULL_WIDTH = 7.2

# The paper's colours.
COLOURS = {
    "base_deep_learning_system": "#d62728",
    "continual_backpropagation": "#1f77b4",
    "head_resetting": "#2ca02c",
    "shrink_and_perturb": "#ff7f0e",
    "retrained_network": "#7f7f7f",
}
# For other names: from the palettes of Okabe and Ito and of Tol, and two more, those that stay apart from each other and from the paper's
# colours in normal, red-blind and green-blind vision (CIELAB distance 12 or more, simulated after Machado).
FURTHER_COLOURS = ("#000000", "#56b4e9", "#332288", "#882255", "#ee99aa", "#8c564b", "#0000ff", "#ddcc77")

DARKER = {"#ddcc77": "#8a7a20", "#ee99aa": "#c05a74"}  # for names, which would be hardly legible on white

GREY = "#555555"
NOTE_SIZE = 5.5  # points
LINE_WIDTH = 1.2
BAND_OPACITY = 0.2


class Stroke(NamedTuple):
    """How a curve is drawn."""

    colour: str
    line_style: str | tuple[float, tuple[float, ...]] = "-"


def strokes(algorithms: Iterable[str]) -> dict[str, Stroke]:
    """A stroke for each algorithm, no two alike: the paper's colours, then further colours, then these with ever longer dash-dots.

    A method of the config has its place in that order, whatever else is drawn; any other name one that its letters choose, or the next
    that is free. Plain dashes stay free for the paper's curves.
    """
    chosen, taken = {}, set()
    methods = [name for name in METHOD_LABELS if name not in COLOURS]
    num_colours = len(FURTHER_COLOURS)
    for name in sorted(set(algorithms), key=lambda name: (name not in methods, name)):
        if name in COLOURS:
            chosen[name] = Stroke(COLOURS[name])
            continue
        first = zlib.crc32(name.encode(errors="surrogatepass"))
        places = (turn * num_colours + (first + number) % num_colours for turn in itertools.count() for number in range(num_colours))
        place = methods.index(name) if name in methods else next(place for place in places if place not in taken)
        taken.add(place)
        repeats, colour = divmod(place, num_colours)
        chosen[name] = Stroke(FURTHER_COLOURS[colour], (0.0, (2.0 * repeats + 3.0, 1.5, 1.0, 1.5)) if repeats else "-")
    return chosen


# --- Figures and axes ------------------------------------------------------------------------------------------------------------


def wrapped(notes: Sequence[str], width: float) -> tuple[list[str], float]:
    """Notes as lines that fit a figure of this width, and the inches that they take at its foot."""
    lines = [line for note in notes for line in textwrap.wrap(note, int((width - 0.2) * 72 / NOTE_SIZE / 0.56))]
    return lines, 0.1 * len(lines) + 0.08 * bool(lines)


def new_figure(width: float, height: float, note_lines: Sequence[str]) -> Figure:
    """A figure of so many inches that can measure its text; empty but for lines of notes at its foot."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    if note_lines:
        text = "\n".join(note_lines)
        figure.text(0.1 / width, 0.06 / height, text, fontsize=NOTE_SIZE, color=GREY, va="bottom", linespacing=1.15)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner, without a frame and with a light grid."""
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


def number_of_classes_axis(axes: Axes, positions: np.ndarray) -> None:
    """An x axis over tasks, from the first to the last number of classes. positions: (p,) rising; ticks are among them."""
    spacing = positions[0]
    every = 1 if len(positions) <= 6 else spacing * -(-len(positions) // 5)
    axes.set_xticks(sorted({positions[0], *(position for position in positions if position % every == 0)}))
    margin = 0.02 * (positions[-1] - positions[0]) or 1
    axes.set_xlim(positions[0] - margin, positions[-1] + margin)
    axes.set_xlabel("Number of classes")


def epoch_axis(axes: Axes, num_epochs: int) -> None:
    """An x axis over epochs, counted from 1 through all tasks."""
    axes.set_xlim(0, num_epochs)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.set_xlabel("Epoch")


def limit_to_possible_values(axes: Axes, metric: Metric) -> None:
    """End the vertical axis where values end; lines there are drawn whole. Where all are 0 %, show 0 to 1 % and no blown-up nothing.

    Of a plain metric nothing is known but what is there: without a value below 0, the axis ends at 0 too.
    """
    axes.autoscale_view(scalex=False)
    bottom, top = axes.get_ylim()
    lines = axes.get_lines()
    is_negative = any(np.nanmin(line.get_ydata()) < 0 for line in lines)
    least = -100.0 if metric.is_relative else -np.inf if metric.kind == "plain" and is_negative else 0.0
    most = np.inf if metric.kind == "plain" else 100.0
    if bottom < 0 and metric.kind == "fraction" and not metric.is_relative:
        top = max(top, 1.0)
    axes.set_ylim(max(bottom, least), min(top, most))
    for line in lines:
        line.set_clip_on(False)


# --- Curves ----------------------------------------------------------------------------------------------------------------------


def draw_curves(axes: Axes, shown: MetricCurves, line_width: float = LINE_WIDTH) -> dict[str, Line2D]:
    """Draw curves, the retrained network's beneath the others; return algorithm to line, in the given order.

    Where accuracies are relative to the retrained network, its line lies at 0 and is the last. Curves that coincide would hide each other:
    each further one is dashed, with gaps that show all beneath.
    """
    stroke_of = strokes(curve.algorithm for curve in shown.curves)
    lines: dict[str, Line2D] = {}
    for curve in sorted(shown.curves, key=lambda curve: curve.algorithm != RETRAINED):
        line = draw_curve(axes, curve, stroke_of[curve.algorithm], line_width)
        beneath = sum(np.array_equal(line.get_xydata(), other.get_xydata(), equal_nan=True) for other in lines.values())
        if beneath:
            line.set_linestyle((0, (3, 3 * (2**beneath - 1))))
        lines[curve.algorithm] = line
    lines = {curve.algorithm: lines[curve.algorithm] for curve in shown.curves}
    if shown.metric.is_relative:
        label = label_with_runs(RETRAINED, len({index for curve in shown.curves for index in curve.indices}))
        lines[RETRAINED] = axes.axhline(0, color=COLOURS[RETRAINED], linewidth=LINE_WIDTH, zorder=1, label=label)
    return lines


def draw_curve(axes: Axes, curve: Curve, stroke: Stroke, line_width: float) -> Line2D:
    """Draw mean and band of +- 1 standard error; return the line, labelled with the algorithm and its number of runs.

    There is no band where there are less than two runs. A point without a neighbour, which no line would show, gets a dot.
    """
    mean, standard_error, _ = mean_and_standard_error(curve.values)
    (line,) = axes.plot(curve.positions, mean, color=stroke.colour, linestyle=stroke.line_style, linewidth=line_width, zorder=3)
    line.set_label(label_with_runs(curve.algorithm, len(curve.indices)))
    there = np.isfinite(mean)
    has_neighbour = np.append(False, there[:-1]) | np.append(there[1:], False)
    lonely = np.flatnonzero(there & ~has_neighbour)
    if len(lonely):
        line.set(marker="o", markersize=2.5, markevery=lonely.tolist())
    has_band = np.isfinite(standard_error)
    if has_band.any():
        edges = mean - standard_error, mean + standard_error
        axes.fill_between(curve.positions, *edges, where=has_band, color=stroke.colour, alpha=BAND_OPACITY, linewidth=0, zorder=2)
    return line


def label_with_runs(algorithm: str, num_runs: int) -> str:
    """An algorithm's label in a legend."""
    return f"{algorithm_label(algorithm)} ({runs_text(num_runs)})"


def runs_text(num_runs: int) -> str:
    return "1 run" if num_runs == 1 else f"{num_runs} runs"


# --- Names at the curves' ends ---------------------------------------------------------------------------------------------------


POINTER = {"arrowstyle": "-", "linewidth": 0.6, "linestyle": (0, (1, 1)), "shrinkA": 1, "shrinkB": 1, "relpos": (0, 0.5)}


def label_ends(axes: Axes, named: Sequence[tuple[str, Line2D]]) -> None:
    """Write each name right of the axes, in its line's colour, or DARKER: level with the line's end, or as near as the other names allow.

    A dotted pointer leads from the end to the name. Names are in the order of the ends, so that pointers of complete curves do not cross.
    The limits and the height of the axes must be final; their width may change.
    """
    bottom, top = axes.get_ylim()
    beside = axes.transAxes + ScaledTranslation(9 / 72, 0, axes.figure.dpi_scale_trans)
    ends = []
    for name, line in named:
        is_across = line.get_transform() != axes.transData  # its x is a fraction of the axes' width
        there = np.flatnonzero(np.isfinite(line.get_ydata()))[-1]
        ends.append((name, line, (axes.get_xlim()[1] if is_across else line.get_xdata()[there], line.get_ydata()[there])))
    ends.sort(key=lambda end: end[2][1])
    texts = []
    for name, line, point in ends:
        colour = line.get_color()
        style = {"color": DARKER.get(colour, colour), "fontsize": 6, "va": "center", "linespacing": 0.95}
        pointer = POINTER | {"color": colour}
        texts.append(axes.annotate(name, point, (1, 0), textcoords=beside, annotation_clip=False, arrowprops=pointer, **style))
    renderer = axes.figure.canvas.get_renderer()
    heights = np.array([Text.get_window_extent(text, renderer).height for text in texts]) / axes.get_window_extent(renderer).height
    wanted = np.array([(point[1] - bottom) / (top - bottom) for _, _, point in ends])
    for text, height in zip(texts, spread(wanted, 1.08 * heights), strict=True):
        text.set_position((1, height))


def spread(wanted: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Centres of boxes between 0 and 1, near where they are wanted (rising), none over another: (n,) and (n,) to (n,)."""
    offsets = np.cumsum(np.append(0, (heights[1:] + heights[:-1]) / 2))  # of the centres, if the boxes touch each other
    shifts = wanted - offsets  # must not fall
    shifts = (np.maximum.accumulate(shifts) + np.minimum.accumulate(shifts[::-1])[::-1]) / 2
    return offsets + np.clip(shifts, heights[0] / 2, max(1 - heights[-1] / 2 - offsets[-1], heights[0] / 2))


def room_beside(axes: Axes) -> tuple[float, float]:
    """Inches that labels and names take to the left and to the right of the axes."""
    renderer = axes.figure.canvas.get_renderer()
    area, whole = axes.get_window_extent(renderer), axes.get_tightbbox(renderer)
    return (area.x0 - whole.x0) / axes.figure.dpi, (whole.x1 - area.x1) / axes.figure.dpi


def place(axes: Axes, left: float, width: float) -> None:
    """Move the axes to these inches from the figure's left edge, at the same height."""
    full_width = axes.figure.get_figwidth()
    _, bottom, _, height = axes.get_position().bounds
    axes.set_position((left / full_width, bottom, width / full_width, height))
