"""What the figures have in common: colours, axes, curves with their bands, and names beside the curves.

Figures are laid out in inches, so that text of a given size fits whatever the data are. Nothing here touches pyplot's global state: no
window system is needed, and `rc_context(STYLE)` surrounds whatever draws.
"""

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import StrMethodFormatter

from plots.published_curves import PublishedCurve
from plots.run_results import RETRAINED, Curve, algorithm_label, mean_and_standard_error

STYLE = {
    "font.family": "DejaVu Sans",  # comes with Matplotlib: the same figure on every machine
    "font.size": 7,
    "axes.labelsize": 7,
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
    "axes.unicode_minus": True,
    "svg.hashsalt": "incremental-cifar",  # otherwise every SVG gets other ids
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
}
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
# For other names: from the palettes of Okabe and Ito and of Tol, those that stay apart from each other and from the paper's colours in
# normal, red-blind and green-blind vision (CIELAB distance 12 or more, simulated after Machado).
FURTHER_COLOURS = ("#000000", "#56b4e9", "#332288", "#ddcc77", "#882255", "#ee99aa")

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

    Plain dashes stay free for the paper's curves.
    """
    chosen = {}
    num_others = 0
    for algorithm in algorithms:
        if algorithm in COLOURS:
            chosen[algorithm] = Stroke(COLOURS[algorithm])
        elif algorithm not in chosen:
            repeats, colour = divmod(num_others, len(FURTHER_COLOURS))
            line_style = (0.0, (2.0 * repeats + 3.0, 1.5, 1.0, 1.5)) if repeats else "-"
            chosen[algorithm] = Stroke(FURTHER_COLOURS[colour], line_style)
            num_others += 1
    return chosen


# --- Figures and axes ------------------------------------------------------------------------------------------------------------


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches that can measure its text."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the figure's lower left corner, without a frame and with a light grid."""
    full_width, full_height = figure.get_size_inches()
    axes = figure.add_axes((left / full_width, bottom / full_height, width / full_width, height / full_height))
    tidy(axes)
    return axes


def tidy(axes: Axes) -> None:
    """Leave two of the frame's four lines, and put a light grid beneath everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)


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
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.set_xlabel("Epoch")


def limit_to_possible_values(axes: Axes, is_percent: bool) -> None:
    """End the vertical axis at 0 for values that cannot be negative; where all are 0, show 0 to 1 % rather than a blown-up nothing."""
    axes.autoscale_view(scalex=False)
    bottom, top = axes.get_ylim()
    if bottom < 0:
        top = max(top, 1.0) if is_percent else top
        bottom = -0.03 * top  # the line at 0 is drawn whole
    axes.set_ylim(bottom, top)


def wrapped(notes: Sequence[str], width: float) -> list[str]:
    """Notes as lines that fit `width` inches at the size of notes."""
    return [line for note in notes for line in textwrap.wrap(note, int(width * 72 / NOTE_SIZE / 0.56))]


def add_notes(figure: Figure, lines: Sequence[str]) -> None:
    """Write lines of notes at the foot of a figure; each takes 0.1 inches."""
    if lines:
        width, height = figure.get_size_inches()
        figure.text(0.1 / width, 0.06 / height, "\n".join(lines), fontsize=NOTE_SIZE, color=GREY, va="bottom", linespacing=1.15)


# --- Curves ----------------------------------------------------------------------------------------------------------------------


def draw_curve(axes: Axes, curve: Curve, stroke: Stroke, line_width: float = LINE_WIDTH) -> Line2D:
    """Draw mean and band of +- 1 standard error; return the line, labelled with the algorithm and its number of runs.

    There is no band where there are less than two runs. A point without a neighbour, which no line would show, gets a dot.
    """
    mean, standard_error, _ = mean_and_standard_error(curve.values)
    (line,) = axes.plot(
        curve.positions, mean, color=stroke.colour, linestyle=stroke.line_style, linewidth=line_width, label=curve_label(curve), zorder=3
    )
    there = np.isfinite(mean)
    has_neighbour = np.append(False, there[:-1]) | np.append(there[1:], False)
    lonely = np.flatnonzero(there & ~has_neighbour)
    if len(lonely):
        line.set(marker="o", markersize=2.5, markevery=lonely.tolist())
    if np.isfinite(standard_error).any():
        axes.fill_between(
            curve.positions,
            mean - standard_error,
            mean + standard_error,
            where=np.isfinite(standard_error),
            color=stroke.colour,
            alpha=BAND_OPACITY,
            linewidth=0,
            zorder=2,
        )
    return line


def draw_published(axes: Axes, curve: PublishedCurve, stroke: Stroke) -> Line2D:
    """Draw the paper's mean, thin and dashed, beneath everything else."""
    (line,) = axes.plot(
        curve.number_of_classes, curve.mean, color=stroke.colour, linestyle=(0, (4, 2)), linewidth=0.7, zorder=1.5, label="_published"
    )
    return line


def draw_zero_line(axes: Axes, num_runs: int) -> Line2D:
    """The retrained network, in a figure of accuracies relative to it."""
    label = f"{algorithm_label(RETRAINED)} ({runs_text(num_runs)})"
    return axes.axhline(0, color=COLOURS[RETRAINED], linewidth=LINE_WIDTH, zorder=1, label=label)


def curve_label(curve: Curve) -> str:
    """An algorithm's label with its number of runs."""
    return f"{algorithm_label(curve.algorithm)} ({runs_text(len(curve.indices))})"


def runs_text(num_runs: int) -> str:
    return "1 run" if num_runs == 1 else f"{num_runs} runs"


def band_handle() -> Patch:
    """What the legend says about the bands."""
    return Patch(color=GREY, alpha=BAND_OPACITY, linewidth=0, label="± 1 standard error")


def published_handle() -> Line2D:
    """What the legend says about the paper's curves."""
    return Line2D([], [], color=GREY, linestyle=(0, (4, 2)), linewidth=0.7, label="The paper (15 runs)")


# --- Names beside the curves -----------------------------------------------------------------------------------------------------

SPACING = 3.0  # pixels between the points that stand for a line when places for names are compared


def label_curves(axes: Axes, lines: dict[str, Line2D], size: float = 6.5) -> list[Text] | None:
    """Write each name beside its line, in its colour, where it covers no line, no edge of a band and no other name.

    lines: name to line, at most 6; where a name has a line break, a space is tried too. The limits of the axes must be final. A name goes
    to the free place nearest to its line, where that line is apart from the others, with a thin pointer if the place is not close.
    Returns the names as drawn, in the order of the lines; or None, and nothing is drawn, if they do not all fit: then a legend has to do.
    """
    renderer = axes.figure.canvas.get_renderer()
    point = axes.figure.dpi / 72  # pixels
    area = axes.get_window_extent(renderer)
    outlines = {name: _outline(axes, line) for name, line in lines.items()}  # name to (m, 2) pixels
    if not all(len(outline) for outline in outlines.values()) or len(lines) > 6:
        return None
    bands = np.concatenate([np.empty((0, 2)), *(_band_outline(axes, band) for band in axes.collections)])
    grid = np.stack(np.meshgrid(np.linspace(area.x0, area.x1, 49), np.linspace(area.y0, area.y1, 49)), axis=-1).reshape(-1, 2)

    # For every name, its variants' places: centres (c, 2), half sizes (c, 2) and costs (c,), infinite where it would cover something.
    texts, candidates = [], []
    for name, line in lines.items():
        texts.append(axes.text(0, 0, name, color=line.get_color(), fontsize=size, ha="center", va="center", linespacing=1.0, zorder=5))
        halves = []
        for variant in _variants(name):
            texts[-1].set_text(variant)
            extent = texts[-1].get_window_extent(renderer)
            halves.append(np.tile((extent.width / 2, extent.height / 2), (len(grid), 1)))
        centres, half = np.tile(grid, (len(halves), 1)), np.concatenate(halves)
        inside = (centres - half >= (area.x0 + 2 * point, area.y0 + 2 * point)) & (centres + half <= (area.x1, area.y1))
        gaps = {other: _gap(centres, half, outline) for other, outline in outlines.items()}
        nearest = np.min(list(gaps.values()), axis=0)
        nearest_other = np.min([np.full(len(centres), np.inf), *(gap for other, gap in gaps.items() if other != name)], axis=0)
        free = inside.all(axis=1) & (nearest > 1.5 * point) & (_gap(centres, half, bands) > 0)
        to_line = _gap(centres, half, _apart(outlines, name, 6 * point))
        cost = to_line + 3 * np.maximum(0, to_line + 2 * point - nearest_other)
        candidates.append((centres, half, np.where(free, cost, np.inf)))

    # The first to choose has the best choice: try all orders.
    least, choices = np.inf, {}
    for order in itertools.permutations(range(len(texts))):
        total, chosen = 0.0, {}
        for number in order:
            centres, half, cost = candidates[number]
            for other, choice in chosen.items():
                apart = half + candidates[other][1][choice] + 2 * point
                cost = np.where((np.abs(centres - candidates[other][0][choice]) < apart).all(axis=1), np.inf, cost)
            chosen[number] = int(np.argmin(cost))
            total += cost[chosen[number]]
        if total < least:
            least, choices = total, chosen
    if not choices:
        for text in texts:
            text.remove()
        return None

    to_data = axes.transData.inverted()
    for number, (name, line) in enumerate(lines.items()):
        centres, half, _ = candidates[number]
        choice = choices[number]
        centre = centres[choice]
        texts[number].set_text(_variants(name)[choice // len(grid)])
        texts[number].set_position(to_data.transform(centre))
        goal = _apart(outlines, name, 6 * point)
        margin = half[choice] + point
        beside = np.clip(goal, centre - margin, centre + margin)  # the point of the text's box that is nearest to each point of the line
        distances = np.hypot(*(goal - beside).T)
        nearest = int(np.argmin(distances))
        if distances[nearest] > 7 * point:
            ends = to_data.transform([beside[nearest], goal[nearest]])
            axes.plot(*ends.T, color=line.get_color(), linewidth=0.5, zorder=2.5, label="_pointer")
    return texts


def _variants(name: str) -> list[str]:
    return [name, name.replace("\n", " ")] if "\n" in name else [name]


def _apart(outlines: dict[str, np.ndarray], name: str, enough: float) -> np.ndarray:
    """The points of a line that no other is near: those at least `enough` pixels away, or if there are none, the farthest ones."""
    distances = np.full(len(outlines[name]), np.inf)
    for other, outline in outlines.items():
        if other != name:
            distances = np.minimum(distances, _gap(outlines[name], np.zeros(2), outline))
    return outlines[name][distances >= min(enough, 0.8 * distances.max())]


def _outline(axes: Axes, line: Line2D) -> np.ndarray:
    """Points along a line, (m, 2) pixels, about SPACING apart."""
    positions = np.asarray(line.get_xdata(), dtype=float)
    if line.get_transform() != axes.transData:  # a line across the axes, whose x is a fraction of their width
        positions = np.array(axes.get_xlim())
    path = np.stack([positions, np.resize(np.asarray(line.get_ydata(), dtype=float), len(positions))], axis=1)
    return _dense(axes.transData.transform(path[np.isfinite(path).all(axis=1)]))


def _band_outline(axes: Axes, band: Collection) -> np.ndarray:
    return np.concatenate([_dense(axes.transData.transform(path.vertices)) for path in band.get_paths()])


def _dense(path: np.ndarray) -> np.ndarray:
    if len(path) < 2:
        return path
    pieces = []
    for start, end in itertools.pairwise(path):
        steps = max(int(np.hypot(*(end - start)) / SPACING), 1)
        pieces.append(start + np.linspace(0, 1, steps, endpoint=False)[:, None] * (end - start))
    return np.concatenate([*pieces, path[-1:]])


def _gap(centres: np.ndarray, half: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Least distance of any point from a box around each centre: (c, 2), (c, 2) or (2,), and (m, 2) pixels to (c,); 0 inside the box."""
    least = np.full(len(centres), np.inf)
    for point in points:
        outside = np.maximum(np.abs(centres - point) - half, 0)
        np.minimum(least, np.hypot(outside[:, 0], outside[:, 1]), out=least)
    return least
