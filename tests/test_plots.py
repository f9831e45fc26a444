"""The scripts in plots/: what they draw, read from Matplotlib's artists, equals what is stored; and bad input is one line."""

import functools
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ALGORITHMS, REPOSITORY, everything_in
from matplotlib import rc_context
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text
from scipy.stats import ttest_ind

from incremental_cifar.command_line import run_script
from incremental_cifar.safe_files import around_block
from plots import compare_with_paper, draw_all, drawing, plot_incremental_cifar_results, plot_paper_figure, run_results
from plots.drawing import COLOURS, STYLE, spread, strokes
from plots.ledger import BEGIN, END, RESULTS
from plots.output_files import write_figure
from plots.published_curves import read_published_curves
from plots.run_results import ALGORITHM_LABELS, METRICS, algorithm_label, axis_text, find_metrics, mean_and_standard_error, metric_of

BASE, CBP, RETRAINED = "base_deep_learning_system", "continual_backpropagation", "retrained_network"
ACCURACY, RELATIVE, RANK = "test_accuracy_per_epoch", "relative_accuracy_per_epoch", "next_task_stable_rank_analysis"

# 3 tasks x 2 epochs, 4 classes a task; 8 x 2 = 16 units in the last layer.
SMALL = {"num_tasks": 3, "epochs_per_task": 2, "classes_per_task": 4, "network_width": 2}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def store(results, algorithm, index, sizes=None, **metrics):
    """Write metrics of one run as float32, and its config with these sizes; None: with none, as released."""
    folder = results / algorithm
    for metric, values in metrics.items():
        (folder / metric).mkdir(parents=True, exist_ok=True)
        np.save(folder / metric / f"index-{index}.npy", np.asarray(values, dtype=np.float32))
    (folder / "config_files").mkdir(parents=True, exist_ok=True)
    config = (sizes or {}) | {"stepsize": 0.1, "a_key_of_another_version": [1]}
    (folder / "config_files" / f"index-{index}.json").write_text(json.dumps(config))


def run(script, capsys, *arguments):
    """Run a script; return exit status and what it printed on standard output and standard error."""
    status = run_script(script.main, [str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.fixture
def draw(results, capsys, monkeypatch):
    """Run the script of single figures to the figure and no further; return the figure and what was printed."""

    def draw(metric, *arguments):
        figures = []
        monkeypatch.setattr(plot_incremental_cifar_results, "write_figure", lambda figure, *paths: figures.append(figure))
        status, out, err = run(plot_incremental_cifar_results, capsys, "--results_dir", results, "--metric", metric, *arguments)
        assert status == 0, err
        return figures[0], out

    return draw


def notes_of(out):
    """What the script of single figures printed but for its last line, the numbers."""
    return out[: out.rindex("\n", 0, -1) + 1]


def lines_of(figure):
    """Label to line of the first axes, lines that are not ours (label begins with _) left out."""
    return {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}


def line_values(line):
    return np.asarray(line.get_xdata()).tolist(), pytest.approx(np.asarray(line.get_ydata()).tolist(), abs=1e-4, nan_ok=True)


def band_at(axes, position, number=0):
    """Lower and upper edge of a band at an x."""
    vertices = axes.collections[number].get_paths()[0].vertices
    edge = vertices[vertices[:, 0] == position, 1]
    return edge.min(), edge.max()


def assert_texts_have_room(figure):
    """All that is drawn lies inside the figure, and no panel with its labels and names overlaps another panel, the legend or the notes."""
    figure.canvas.draw()
    boxes = [artist.get_tightbbox() for artist in (*figure.axes, *figure.legends, *figure.texts)]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, box
        assert not any(box.overlaps(other) for other in boxes[number + 1 :]), box


# --- What is drawn -------------------------------------------------------------------------------------------------------------------


def test_axes_of_values_that_cannot_be_negative_begin_at_zero(results, draw):
    store(results, BASE, 0, SMALL, next_task_dormant_units_analysis=[0.0, 0.0, 0.0])
    figure, _ = draw("next_task_dormant_units_analysis")
    bottom, top = figure.axes[0].get_ylim()
    assert top == 1.0 and -0.05 < bottom <= 0
    assert [tick for tick in figure.axes[0].get_yticks() if bottom <= tick < 0] == []


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("metric", METRICS)
def test_axes_end_where_values_end_and_lines_there_are_whole(results, draw, paper_figures, metric, value):
    most = 16 if METRICS[metric].kind == "rank" else 1
    for algorithm, index in ((BASE, 0), (BASE, 1), (RETRAINED, 0), (RETRAINED, 1)):
        values = np.full(6 if METRICS[metric].per_epoch else 3, value if algorithm == BASE else 1 - value)
        values[-1] -= 0.2 * index * values[-1]  # so that the band would reach beyond
        store(results, algorithm, index, SMALL, **{METRICS[metric].folder: most * values})
    figures = [draw(metric)[0], *(paper_figures(results)[0].values() if metric in (RELATIVE, RANK) else [])]
    least = -100 if METRICS[metric].is_relative else 0
    for axes in [axes for figure in figures for axes in figure.axes if axes.get_lines()]:
        bottom, top = axes.get_ylim()
        assert least <= bottom < top and (METRICS[metric].kind == "plain" or top <= 100)
        assert all(line.get_tightbbox().bounds == line.get_window_extent().bounds for line in axes.get_lines())


def test_best_of_each_task_mean_and_band(results, draw):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5, 0.7, 0.6, 0.4, 0.3, 0.3])
    store(results, BASE, 1, SMALL, test_accuracy_per_epoch=[0.9, 0.1, 0.2, 0.5, 0.1, 0.4])
    store(results, BASE, 5, SMALL, test_accuracy_per_epoch=[0.8, 0.8, 0.4, 0.1, 0.2, 0.3])
    figure, out = draw(ACCURACY)
    (axes,) = figure.axes
    ((label, line),) = lines_of(figure).items()
    assert label == "Base deep learning system (3 runs)"
    assert line_values(line) == ([4, 8, 12], [80.0, 50.0, 100 / 3])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Number of classes", "Test accuracy (%)")
    assert to_hex(line.get_color()) == "#d62728" and line.get_linestyle() == "-"
    # 70, 90, 80: sample deviation 10; 60, 50, 40: 10; 30, 40, 30: sqrt(100 / 3).
    for position, mean, deviation in ((4, 80, 10), (8, 50, 10), (12, 100 / 3, math.sqrt(100 / 3))):
        error = deviation / math.sqrt(3)
        assert band_at(axes, position) == pytest.approx((mean - error, mean + error), abs=1e-4)
    assert to_hex(axes.collections[0].get_facecolor()[0]) == "#d62728"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [label, "± 1 standard error"]
    assert out.splitlines() == ["test_accuracy_per_epoch: base_deep_learning_system 33.33 ± 3.333 at 12 classes (n = 3)"]


@pytest.mark.parametrize("metric", METRICS)
def test_wide_tick_labels_have_room(results, draw, metric):
    values = np.linspace(0.02161, 0.02166, 6 if METRICS[metric].per_epoch else 3)
    for algorithm in (BASE, RETRAINED):
        store(results, algorithm, 0, SMALL, **{METRICS[metric].folder: values * (0.999 if algorithm == BASE else 1)})
    assert_texts_have_room(draw(metric)[0])


def test_retrained_network_lies_beneath_and_coinciding_curves_show(results, draw):
    for algorithm in (BASE, CBP, RETRAINED):
        store(results, algorithm, 0, SMALL, next_task_dormant_units_analysis=[0, 0, 0])
    store(results, "other", 0, SMALL, next_task_dormant_units_analysis=[0, 0, 0.5])
    figure, _ = draw("next_task_dormant_units_analysis")
    lines = lines_of(figure)
    names = ["Retrained network", "Base deep learning system", "Continual backpropagation", "Other"]
    assert list(lines) == [f"{name} (1 run)" for name in names]  # in the order of drawing
    assert [line.is_dashed() for line in lines.values()] == [False, True, True, False]
    patterns = [lines[f"{name} (1 run)"]._unscaled_dash_pattern[1] for name in names[1:3]]
    assert [list(pattern) for pattern in patterns] == [[3, 3], [3, 9]]
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == [f"{name} (1 run)" for name in [*names[1:3], names[0]]]


def test_long_names_stay_distinct():
    one, other = (algorithm_label(f"continual_backpropagation_with_a_long_name_of_variant_{number}") for number in (1, 2))
    assert one != other and one.startswith("Continual back") and len(one) == 40


def test_a_shorter_retrained_network_is_named_as_what_ends_the_curve(results, draw):
    for index in (0, 1):
        store(results, BASE, index, SMALL, test_accuracy_per_epoch=[0.5] * 6)
        store(results, RETRAINED, index, SMALL, test_accuracy_per_epoch=[0.5] * (2 if index else 6))
    _, out = draw(RELATIVE)
    assert notes_of(out) == "Note: Retrained network: index 1 has only 1 of 3 tasks\n"


def test_runs_are_complete_by_their_own_number_of_tasks(results, draw):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    store(results, BASE, 1, SMALL | {"num_tasks": 2}, test_accuracy_per_epoch=[0.5] * 4)
    store(results, CBP, 0, SMALL | {"num_tasks": 2}, test_accuracy_per_epoch=[0.5] * 2)
    _, out = draw(ACCURACY)
    assert notes_of(out) == "Note: Continual backpropagation: index 0 has only 1 of 2 tasks\n"


def analysed(results, algorithm, index, **settings):
    path = results / algorithm / "analysis_settings" / f"index-{index}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(("batch_norm", "threshold"), [("running", 0.01), ("batch", 0.1)])
def test_different_analyses_are_not_mixed(results, capsys, tmp_path, draw, batch_norm, threshold):
    for index, algorithm in ((0, BASE), (1, BASE), (0, CBP)):
        store(results, algorithm, index, SMALL, **{RANK: [16, 8, 4], "weight_magnitude_analysis": [0.1] * 3})
    analysed(results, BASE, 1, batch_norm="batch", dormant_unit_threshold=0.01, images=1000)
    draw(RANK)  # no file: the released script's settings
    analysed(results, CBP, 0, batch_norm=batch_norm, dormant_unit_threshold=threshold)
    before = everything_in(tmp_path)
    message = (
        "batch_norm batch, dormant_unit_threshold 0.01 in base_deep_learning_system/analysis_settings/index-0.json and "
        f"batch_norm {batch_norm}, dormant_unit_threshold {threshold} in continual_backpropagation/analysis_settings/index-0.json"
    )
    arguments = ["--results_dir", results, "--metric", RANK, "--output", tmp_path / "figure.svg"]
    assert_one_line(*run(plot_incremental_cifar_results, capsys, *arguments), message)
    assert_one_line(*run(plot_paper_figure, capsys, "--results_dir", results, "--output-dir", tmp_path), message)
    assert everything_in(tmp_path) == before
    draw("weight_magnitude_analysis")


@pytest.mark.parametrize("text", ["{}", "[1]", '{"batch_norm": "other", "dormant_unit_threshold": 0.01}', '{"batch_norm": "batch"}'])
def test_analysis_settings_that_say_nothing(results, capsys, tmp_path, text):
    store(results, BASE, 0, SMALL, **{RANK: [16, 8, 4]})
    analysed(results, BASE, 0)
    (results / BASE / "analysis_settings" / "index-0.json").write_text(text)
    arguments = ["--results_dir", results, "--metric", RANK, "--output", tmp_path / "figure.svg"]
    assert_one_line(*run(plot_incremental_cifar_results, capsys, *arguments), "analysis_settings/index-0.json: ")


def test_comparison_leaves_out_other_analyses(results):
    papers_runs(results, num_runs=3, algorithms=[BASE])
    analysed(results, BASE, 1, batch_norm="running", dormant_unit_threshold=0.01)
    points, remarks = compare_with_paper.compare(results, read_published_curves())
    assert {(point.metric, point.num_runs) for point in points} == {("test_accuracy", 3), ("dormant_units", 2), ("stable_rank", 2)}
    settings = "batch_norm running, dormant_unit_threshold 0.01"
    assert f"{BASE}: index 1 left out, analysed otherwise than the paper ({settings})" in remarks


def test_losses_count_by_their_minimum_and_one_run_has_no_band(results, draw):
    store(results, CBP, 0, SMALL, test_loss_per_epoch=[2, 1, 3, 4, 9, 0.5])
    figure, out = draw("test_loss_per_epoch")
    ((label, line),) = lines_of(figure).items()
    assert out.endswith(": continual_backpropagation 0.5 at 12 classes (n = 1)\n")
    assert label == "Continual backpropagation (1 run)" and to_hex(line.get_color()) == "#1f77b4"
    assert line_values(line) == ([4, 8, 12], [1, 3, 0.5])
    assert not figure.axes[0].collections and len(figure.legends[0].get_texts()) == 1


def test_relative_accuracy_pairs_runs_of_the_same_index(results, draw):
    for index, accuracy in ((0, 0.5), (1, 0.7), (2, 0.1)):
        store(results, BASE, index, SMALL, test_accuracy_per_epoch=[accuracy, 0, 0.2, 0.2, 0.3, 0.3])
    for index, accuracy in ((1, 0.6), (0, 0.2), (7, 1.0)):
        store(results, RETRAINED, index, SMALL, test_accuracy_per_epoch=[0, accuracy, 0.1, 0.1, 0.6, 0.5])
    figure, out = draw(RELATIVE)
    lines = lines_of(figure)
    assert list(lines) == ["Base deep learning system (2 runs)", "Retrained network (2 runs)"]
    assert line_values(lines["Base deep learning system (2 runs)"]) == ([4, 8, 12], [20, 10, -30])  # (30 + 10) / 2
    assert band_at(figure.axes[0], 4) == pytest.approx((10, 30), abs=1e-4)  # deviation sqrt(200), over sqrt(2)
    assert list(lines["Retrained network (2 runs)"].get_ydata()) == [0, 0]
    assert "Base deep learning system: no retrained network of index 2; left out" in out
    assert "percentage points" in figure.axes[0].get_ylabel()


def test_relative_accuracy_is_a_difference_of_bests_not_the_best_difference(results, draw):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5, 0.4, 0, 0, 0, 0])
    store(results, RETRAINED, 0, SMALL, test_accuracy_per_epoch=[0.1, 0.6, 0, 0, 0, 0])
    figure, _ = draw(RELATIVE)
    assert lines_of(figure)["Base deep learning system (1 run)"].get_ydata()[0] == pytest.approx(-10, abs=1e-4)
    figure, _ = draw(RELATIVE, "--per-epoch")
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([1, 2, 3, 4, 5, 6], [40, -20, 0, 0, 0, 0])


def test_runs_in_progress_are_drawn_as_far_as_they_go_and_said_so(results, draw):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.2, 0.2, 0.4, 0.4, 0.6, 0.6])
    store(results, BASE, 3, SMALL, test_accuracy_per_epoch=[0.4, 0.4, 0.9])  # the second task is not complete
    store(results, CBP, 0, SMALL, test_accuracy_per_epoch=[0.4])
    store(results, RETRAINED, 0, SMALL, test_accuracy_per_epoch=[0.1, 0.3, 0.1, 0.1])
    figure, out = draw(ACCURACY)
    lines = lines_of(figure)
    assert set(lines) == {"Base deep learning system (2 runs)", "Retrained network (1 run)"}
    assert line_values(lines["Base deep learning system (2 runs)"]) == ([4, 8, 12], [30, 40, 60])
    assert line_values(lines["Retrained network (1 run)"]) == ([4, 8], [30, 10])
    assert set(figure.axes[0].collections[0].get_paths()[0].vertices[:, 0]) == {4}  # one run has no standard error
    notes = [
        "Base deep learning system: index 3 has only 1 of 3 tasks",
        "Continual backpropagation: index 0 without a complete task yet; left out",
        "Retrained network: index 0 has only 2 of 3 tasks",
    ]
    in_figure = " ".join(figure.texts[0].get_text().split())
    for note in notes:
        assert note in out and note in in_figure
    assert figure.axes[0].get_xlim()[1] > 12  # the axis of a complete run

    figure, out = draw(ACCURACY, "--per-epoch", "--algorithms", f"{CBP},{BASE}")
    lines = lines_of(figure)
    assert list(lines) == ["Continual backpropagation (1 run)", "Base deep learning system (2 runs)"]
    assert line_values(lines["Base deep learning system (2 runs)"]) == ([1, 2, 3, 4, 5, 6], [30, 30, 65, 40, 60, 60])
    assert lines["Continual backpropagation (1 run)"].get_marker() == "o"  # a single point is visible
    assert "index 3 has only 3 of 6 epochs" in out and figure.axes[0].get_xlabel() == "Epoch"


def test_analysis_metrics_stand_at_the_task_about_to_be_trained(results, draw):
    store(results, BASE, 0, SMALL, **{RANK: [16, 8, 4], "next_task_dormant_units_analysis": [0, 0.25, np.nan]})
    figure, _ = draw(RANK)
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([4, 8, 12], [100, 50, 25])
    assert figure.axes[0].get_ylabel() == "Stable rank (% of 16)"
    assert figure.axes[0].get_title(loc="left") == "Images of the next task's classes"
    figure, out = draw("next_task_dormant_units_analysis")
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([4, 8, 12], [0, 25, np.nan])
    assert "index 0 has only 2 of 3 tasks" in out


def test_previous_tasks_begin_with_the_second(results, draw):
    store(results, BASE, 0, SMALL, previous_tasks_effective_rank_analysis=[0, 8, 4])
    figure, out = draw("previous_tasks_effective_rank_analysis")
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([4, 8, 12], [np.nan, 50, 25])
    assert "Note" not in out and figure.axes[0].get_ylabel() == "Effective rank (% of 16)"


def test_networks_of_several_widths_are_each_in_percent_of_their_own_units(results, draw):
    store(results, BASE, 0, SMALL, **{RANK: [16, 8, 4]})
    store(results, "wide", 0, SMALL | {"network_width": 4}, **{RANK: [16, 8, 4]})
    figure, _ = draw(RANK)
    assert line_values(lines_of(figure)["Wide (1 run)"]) == ([4, 8, 12], [50, 25, 12.5])
    assert figure.axes[0].get_ylabel() == "Stable rank (% of the last layer)"


def test_every_metric_of_the_released_script_is_drawn(results, draw):
    stored = {metric.folder: [0.5] * (6 if metric.per_epoch else 3) for metric in METRICS.values()}
    for algorithm in (BASE, RETRAINED):
        store(results, algorithm, 0, SMALL, **stored)
    assert len(METRICS) == 10
    for metric in METRICS:
        figure, _ = draw(metric)
        assert "Base deep learning system (1 run)" in lines_of(figure)


# Folders that nobody has listed anywhere: label, what counts of the epochs 3, 1, 2, 4, 0, 0 (or the tasks 3, 1, 2), least of the axis.
FOUND_METRICS = {
    "units_reset_per_epoch": ("Units reset per epoch", [2, 3, 0], 0),
    "validation_loss_per_epoch": ("Validation loss", [1, 2, 0], 0),
    "a_penalty_analysis": ("A penalty", [3, 1, 2], 0),
    "next_task_gradient_norm_analysis": ("Norm of the gradient", [3, 1, 2], 0),
    "next_task_zero_gradients_analysis": ("Gradients that are exactly 0 (%)", [30, 10, 20], 0),
    "average_online_accuracy_analysis": ("Mean training accuracy of a task (%)", [30, 10, 20], 0),
    "validation_accuracy_per_epoch": ("Validation accuracy (%)", [30, 40, 0], 0),
    "cosine_analysis": ("Cosine", [-3, -1, -2], -np.inf),
    "distance_{units}_analysis": ("distance_{units}", [3, 1, 2], 0),
    "dormant_units_reset_per_epoch": ("Dormant units reset per epoch", [2, 3, 0], 0),
    "plasticity_loss_of_units_per_epoch": ("Plasticity loss of units per epoch", [2, 3, 0], 0),
    "inaccuracy_per_epoch": ("Inaccuracy per epoch", [2, 3, 0], 0),
    "accuracy_of_the_bound_analysis": ("Accuracy of the bound", [3, 1, 2], 0),
}


@pytest.mark.parametrize("metric", FOUND_METRICS)
def test_any_metric_of_a_run_is_found_and_drawn(results, draw, metric):
    label, expected, least = FOUND_METRICS[metric]
    values = np.array([3, 1, 2, 4, 0, 0] if metric.endswith("_per_epoch") else [3, 1, 2]) * (0.1 if "%" in label else 1)
    store(results, BASE, 0, SMALL, **{metric: values if least == 0 else -values, "class_order": [0], ACCURACY: [0.5] * 6})
    (results / BASE / "empty_analysis").mkdir()
    assert list(find_metrics(results)) == [ACCURACY, metric]
    store(results, RETRAINED, 0, SMALL, **{ACCURACY: [0.5] * 6})
    assert list(find_metrics(results)) == [RELATIVE, ACCURACY, metric]
    figure, _ = draw(metric)
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([4, 8, 12], expected)
    axes = figure.axes[0]
    assert axes.get_ylabel() == label and least <= axes.get_ylim()[0] <= min(expected)
    assert axes.get_title(loc="left") == ("Images of the next task's classes" if metric.startswith("next_task") else "")
    assert_texts_have_room(figure)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("my_norm_per_epoch", [1, np.nan, 6]), ("my_loss_per_epoch", [1, np.nan, np.nan]), ("my_accuracy_per_epoch", [100, np.nan, np.nan])],
)
def test_gaps_in_a_metric_of_ones_own_are_gaps(results, draw, metric, expected):
    """Of a task, accuracies and losses count where every epoch is there, and means over those that are."""
    values = np.array([1, 1, np.nan, np.nan, np.nan, 6 if "norm" in metric else 1])
    store(results, BASE, 0, SMALL, **{metric: values})
    figure, out = draw(metric)
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == ([4, 8, 12], expected)
    assert f"index 0 has only {np.isfinite(expected).sum()} of 3 tasks" in out
    figure, out = draw(metric, "--per-epoch")
    drawn = lines_of(figure)["Base deep learning system (1 run)"]
    assert line_values(drawn) == ([*range(1, 7)], list(values * (100 if "accuracy" in metric else 1)))
    assert "index 0 has only 3 of 6 epochs" in out and drawn.get_markevery() == [5]  # a point that no line would show


def test_a_long_name_of_a_metric_is_written_in_lines_that_fit(results, draw):
    store(results, BASE, 0, SMALL, **{"deviation_of_the_convolutions_from_an_isometry_实_per_epoch": [1] * 6})
    figure, _ = draw("deviation_of_the_convolutions_from_an_isometry_实_per_epoch")
    assert "\\u5b9e" in figure.axes[0].get_ylabel() and "\n" in figure.axes[0].get_ylabel()
    assert_texts_have_room(figure)
    assert axis_text(metric_of(RANK), "512") == "Stable rank (% of 512)"


def test_published_curves_lie_beneath_thin_and_dashed(results, draw):
    rng = np.random.default_rng(0)
    for algorithm in (BASE, CBP, "mine"):
        store(results, algorithm, 0, test_accuracy_per_epoch=rng.random(4000))
    figure, out = draw(ACCURACY, "--published")
    published = [line for line in figure.axes[0].get_lines() if line.get_label() == "_published"]
    assert [to_hex(line.get_color()) for line in published] == [COLOURS[BASE], COLOURS[CBP]]
    for line, algorithm in zip(published, (BASE, CBP), strict=True):
        curve = read_published_curves()["test_accuracy", algorithm]
        assert line_values(line) == (list(range(5, 101, 5)), curve.mean.tolist())
        ours = lines_of(figure)[f"{ALGORITHM_LABELS[algorithm]} (1 run)"]
        assert line.is_dashed() and line.get_linewidth() < ours.get_linewidth() and line.get_zorder() < ours.get_zorder()
    assert "The paper (15 runs)" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert "another experiment" not in out and "The paper has no such curve of: Mine" in out and "of: Mine" in figure.texts[0].get_text()


def test_published_curves_beside_another_experiment_are_marked(results, draw):
    store(results, BASE, 0, SMALL, **{RANK: [16, 8, 4]})
    figure, out = draw(RANK, "--published")
    assert "another experiment" in out and "epochs_per_task 2 instead of 200" in out
    assert "another experiment" in figure.texts[0].get_text()
    assert figure.axes[0].get_xlim()[1] > 100


def test_released_results_have_the_papers_sizes(results, draw, capsys, tmp_path):
    """No sizes stored, an index list without a dimension, 4,000 epochs, 20 tasks, 512 units."""
    rng = np.random.default_rng(0)
    accuracies = rng.random((2, 4000)).astype(np.float32)
    for algorithm, values in zip((BASE, RETRAINED), accuracies, strict=True):
        store(results, algorithm, 0, test_accuracy_per_epoch=values, **{RANK: np.linspace(512, 256, 20)})
        np.save(results / algorithm / "experiment_indices.npy", np.array(0))
    figure, out = draw(RELATIVE)
    assert "Note" not in out
    bests = accuracies.reshape(2, 20, 200).max(axis=2)
    expected = (100 * (bests[0] - bests[1])).tolist()
    assert line_values(lines_of(figure)["Base deep learning system (1 run)"]) == (list(range(5, 101, 5)), expected)
    assert figure.axes[0].get_xticks().tolist() == [5, 20, 40, 60, 80, 100]
    figure, _ = draw(RANK)
    assert figure.axes[0].get_ylabel() == "Stable rank (% of 512)"
    assert lines_of(figure)["Base deep learning system (1 run)"].get_ydata()[[0, -1]].tolist() == [100, 50]
    for script in (plot_paper_figure, compare_with_paper):
        status, _, err = run(script, capsys, "--results_dir", results, "--output-dir", tmp_path)
        assert status == 0 and not err


def test_without_config_files_the_papers_sizes_are_assumed_and_said_so(results, draw, capsys, tmp_path):
    for index, algorithm in ((0, BASE), (1, BASE), (0, CBP), (0, RETRAINED), (1, RETRAINED)):
        store(results, algorithm, index, test_accuracy_per_epoch=np.full(4000, 0.5), **{RANK: np.full(20, 256)})
    for algorithm in (BASE, RETRAINED):
        (results / algorithm / "config_files" / "index-0.json").unlink()
    remark = "Taken to be of the paper's sizes, as config_files/ holds none of: Base deep learning system index 0"
    retrained = ", Retrained network index 0"
    for metric in (RELATIVE, ACCURACY, RANK):
        figure, out = draw(metric)
        assert notes_of(out) == f"Note: {remark}{retrained}\n" and " ".join(figure.texts[0].get_text().split()) == remark + retrained
        assert all(len(line.get_xdata()) in (2, 20) for line in lines_of(figure).values())
    status, out, _ = run(plot_paper_figure, capsys, "--results_dir", results, "--output-dir", tmp_path)
    assert status == 0 and f"Note: Panel a: {remark}{retrained}.\n" in out and f"Note: Panel c: {remark}.\n" in out
    status, out, _ = run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path)
    assert status == 0 and f"Note: stable_rank: {remark}\n" in out


@pytest.mark.parametrize(
    ("metric", "length"), [(ACCURACY, 400), (ACCURACY, 3999), (ACCURACY, 4001), (RANK, 2), (RANK, 21), ("weight_magnitude_analysis", 19)]
)
def test_without_config_files_other_lengths_than_the_papers_are_refused(results, capsys, tmp_path, metric, length):
    store(results, BASE, 0, **{metric: np.full(length, 0.5)})
    config_file(results).unlink()
    message = f"{BASE}/{metric}/index-0.npy: holds {length:,} values, not the paper's "
    before = everything_in(tmp_path)
    arguments = ["--results_dir", results, "--metric", metric, "--output", tmp_path / "figure.svg"]
    assert_one_line(*run(plot_incremental_cifar_results, capsys, *arguments), message)
    assert everything_in(tmp_path) == before


def test_default_algorithms_are_the_papers_in_order_then_others(results, draw):
    for algorithm in ("zeta", RETRAINED, "_my $x$ run", CBP, BASE):
        store(results, algorithm, 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    (results / "empty").mkdir()
    figure, _ = draw(ACCURACY)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Base deep learning system (1 run)",
        "Continual backpropagation (1 run)",
        "Retrained network (1 run)",
        "“_my $x$ run” (1 run)",
        "Zeta (1 run)",
    ]


def test_labels_and_colours_are_the_algorithms_own(monkeypatch):
    """A method has its name and place from the config, and another name its colour from its letters, whatever is drawn beside it."""
    monkeypatch.setattr(run_results, "METHOD_LABELS", {CBP: "Not this", "redo": "ReDo", "self_normalized_resets": "Self-normalized resets"})
    monkeypatch.setattr(drawing, "METHOD_LABELS", run_results.METHOD_LABELS)
    labels = {CBP: "Continual backpropagation", "redo": "ReDo", "self_normalized_resets": "Self-normalized resets"}
    labels |= {"my_method2": "My method2", "My_method": "My_method", "stepsize=0.1_x": "stepsize=0.1_x", "_x": "“_x”"}
    assert {name: algorithm_label(name) for name in labels} == labels
    alone = {name: strokes([name])[name] for name in labels}
    assert [alone[name].colour for name in ("redo", "self_normalized_resets")] == list(drawing.FURTHER_COLOURS[:2])
    names = ["self_normalized_resets", "redo", "my_method2", CBP]
    assert strokes(names) == strokes(reversed(names)) == {name: alone[name] for name in names}
    clashing = next(f"x{n}" for n in range(1000) if strokes([f"x{n}"])[f"x{n}"] == alone["redo"])
    assert strokes([clashing, "redo"])["redo"] == alone["redo"] != strokes([clashing, "redo"])[clashing]


def test_any_number_of_algorithms_are_told_apart():
    names = [f"algorithm {number}" for number in range(100)]
    chosen = strokes([*ALGORITHM_LABELS, *names])
    assert len(set(chosen.values())) == 105
    assert len({algorithm_label(algorithm) for algorithm in ALGORITHMS}) == len(set(strokes(ALGORITHMS).values())) == len(ALGORITHMS)
    assert not {chosen[name].colour for name in names} & set(COLOURS.values())
    assert {algorithm: stroke.colour for algorithm, stroke in chosen.items() if algorithm in COLOURS} == COLOURS


def test_mean_and_standard_error_equal_a_plain_twin():
    values = np.random.default_rng(0).normal(size=(6, 8))
    values[np.random.default_rng(1).random((6, 8)) < 0.5] = np.nan
    values[:, 0], values[1:, 1], values[0, 1] = np.nan, np.nan, 3
    mean, standard_error, count = mean_and_standard_error(values)
    for point, column in enumerate(values.T):
        there = [value for value in column if not math.isnan(value)]
        assert count[point] == len(there)
        expected_mean = sum(there) / len(there) if there else math.nan
        assert mean[point] == pytest.approx(expected_mean, nan_ok=True)
        squares = sum((value - expected_mean) ** 2 for value in there)
        expected = math.sqrt(squares / (len(there) - 1)) / math.sqrt(len(there)) if len(there) > 1 else math.nan
        assert standard_error[point] == pytest.approx(expected, nan_ok=True)


# --- Files ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".PNG", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_formats_and_equal_bytes(results, capsys, tmp_path, suffix, start):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5, 0.7, 0.6, 0.4, 0.3, 0.3])
    store(results, BASE, 1, SMALL, test_accuracy_per_epoch=[0.5, 0.7, 0.6, 0.4, 0.3, 0.3])
    contents = []
    for folder in ("first", "second"):
        path = tmp_path / folder / f"figure{suffix}"
        status, out, _ = run(plot_incremental_cifar_results, capsys, "--results_dir", results, "--metric", ACCURACY, "--output", path)
        assert status == 0 and str(path) in out
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        contents.append(path.read_bytes())
    assert contents[0] == contents[1] and contents[0].startswith(start)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("größe β≥0.9 $x$", "größe β≥0.9 $x$"),
        ("实验 1", r"\u5b9e\u9a8c 1"),
        ("try 🚀", r"try \U0001f680"),
        ("ניסוי", r"\u05e0\u05d9\u05e1\u05d5\u05d9"),  # the font has these, but Matplotlib draws them from left to right
        ("a\nb\x1b[31m", r"a\nb\x1b[31m"),
        ("caf\udce9", r"caf\udce9"),  # not UTF-8
    ],
)
def test_names_that_the_font_cannot_show_are_escaped_with_one_note(results, tmp_path, draw, name, label):
    store(results, name, 0, SMALL, test_accuracy_per_epoch=[0.5] * 4)
    figure, out = draw(ACCURACY, "--algorithms", name)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{label} (1 run)"]
    note = f"Note: in the figure, characters that its font cannot show are escaped: {name!r} is {label}\n" if name != label else ""
    assert notes_of(out) == f"Note: {label}: index 0 has only 2 of 3 tasks\n" + note
    write_figure(figure, *(tmp_path / f"figure{suffix}" for suffix in (".png", ".svg", ".pdf")))


def test_all_figures_are_those_of_what_is_there_and_others_are_said(results, capsys, tmp_path):
    status, _, error = run(draw_all, capsys, "--results_dir", results)
    assert status == 2 and error.count("\n") == 1 and "no runs here" in error
    store(results, BASE, 0, SMALL, **{ACCURACY: np.full(6, 0.5), RANK: [1, 2, 3]})
    store(results, "mine", 0, SMALL, **{RANK: [3, 2, 1]})
    status, *_ = run(draw_all, capsys, "--results_dir", results, "--output-dir", tmp_path / "out")
    figures = {f"{stem}{suffix}" for stem in plot_paper_figure.STEMS for suffix in (".png", ".svg")}
    assert status == 0 and set(os.listdir(tmp_path / "out")) == figures | {f"{ACCURACY}.svg", f"{RANK}.svg"}
    (results / "mine" / RANK / "index-0.npy").write_bytes(b"")
    status, _, error = run(draw_all, capsys, "--results_dir", results)
    assert status == 1 and f"mine/{RANK}/index-0.npy: cannot read this metric" in error
    assert (results / "figures" / f"{ACCURACY}.svg").exists()


def test_all_figures_have_other_algorithms_in_the_papers(results, capsys, tmp_path, monkeypatch):
    """As many as have a colour; where one cannot be used, the paper's alone; and without others nothing is asked for."""
    asked = []
    parse_arguments = plot_paper_figure.parse_arguments
    monkeypatch.setattr(plot_paper_figure, "parse_arguments", lambda arguments: asked.append(arguments[4:]) or parse_arguments(arguments))
    for algorithm in (BASE, CBP):
        store(results, algorithm, 0, SMALL, **{ACCURACY: [0.5] * 6})
    (results / RETRAINED).mkdir()
    arguments = "--results_dir", results, "--output-dir", tmp_path / "out"
    assert run(draw_all, capsys, *arguments)[0] == 0
    for name in ("a,b", *"abcdefghijk"):
        store(results, name, 0, SMALL, **{RANK: [3, 2, 1], **({ACCURACY: [0.5] * 6} if name != "a" else {})})
    status, out, _ = run(draw_all, capsys, *arguments)
    assert status == 0 and "here too, and drawn where --algorithms names them: a,b\n" in out
    store(results, "l", 0, SMALL, **{ACCURACY: [0.5] * 6})
    assert "names them: a,b, l\n" in run(draw_all, capsys, *arguments)[1]
    store(results, "b", 0, SMALL | {"epochs_per_task": 3}, **{ACCURACY: [0.5] * 9})
    status, out, error = run(draw_all, capsys, *arguments)
    assert status == 1 and "test_accuracy_figure.svg" in out and "epochs_per_task is 2 in" in error.splitlines()[0]
    all_names = ["--algorithms", ",".join([BASE, CBP, *"abcdefghijk"])]
    assert asked == [[], all_names, all_names, all_names, []]


def test_default_output_is_beside_the_script():
    parsed = plot_incremental_cifar_results.parse_arguments(["--metric", RANK])
    assert parsed.output == REPOSITORY / "plots" / f"{RANK}.svg" and parsed.results_dir == REPOSITORY / "results"


def test_scripts_do_without_torch():
    scripts = "plot_incremental_cifar_results, plot_paper_figure, compare_with_paper"
    code = f"import sys; from plots import {scripts}; assert not {{'torch', 'matplotlib.pyplot'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_scripts_run_from_anywhere(results, tmp_path):
    store(results, BASE, 0, SMALL, **{RANK: [16, 8, 4]})
    script = REPOSITORY / "plots" / "plot_incremental_cifar_results.py"
    command = [sys.executable, str(script), "--results_dir", "results", "--metric", RANK, "--output", "rank.svg"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "rank.svg").is_file()


PAPER_FIGURE = ("plot_paper_figure.py", "--output-dir", ".")
PDF = ("plot_incremental_cifar_results.py", "--metric", RANK, "--output", "rank.pdf")
# A command, and what of the user's reaches Matplotlib: environment variables, and a matplotlibrc in the working directory.
OF_THE_USER = {
    "backend of a notebook": (PDF, {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}, b""),
    "dark and with TeX": (
        PAPER_FIGURE,
        {},
        b"text.usetex: True\nfigure.facecolor: black\nsavefig.facecolor: black\nsavefig.bbox: tight\npath.sketch: 1, 100, 2\n"
        b"lines.marker: x\naxes.ymargin: 0.5\naxes.formatter.use_locale: True\nsvg.fonttype: none\npdf.compression: 0\n",
    ),
    "faulty settings": (PDF, {}, b"no colon\nno.such.key: 1\nfont.size: large\nbackend: none\n"),
    "not text": (PDF, {}, b"\xff\xfe"),
    "nowhere to write": (PDF, {"MPLCONFIGDIR": os.devnull, "MATPLOTLIBRC": "/nowhere"}, b""),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The files that the scripts write, in processes of their own, for these variables and settings of Matplotlib: name to content."""
    folder = tmp_path_factory.mktemp("figures")
    store(folder / "results", BASE, 0, SMALL, test_accuracy_per_epoch=[0.5, 0.7, 0.6, 0.4, 0.3, 0.3], **{RANK: [16, 8, 4]})

    @functools.cache
    def drawn(command, variables=(), settings=b""):
        working = folder / f"working-{len(os.listdir(folder))}"
        working.mkdir()
        if settings:
            (working / "matplotlibrc").write_bytes(settings)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MPL", "MATPLOTLIB"))}
        arguments = [sys.executable, REPOSITORY / "plots" / command[0], "--results_dir", "../results", *command[1:]]
        ended = subprocess.run(arguments, cwd=working, env=environment | dict(variables), capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        return {file.name: file.read_bytes() for file in working.iterdir() if file.name != "matplotlibrc"}

    return drawn


@pytest.mark.parametrize("case", OF_THE_USER)
def test_nothing_of_the_users_gets_into_figures(case, drawn):
    command, variables, settings = OF_THE_USER[case]
    files = drawn(command, tuple(variables.items()), settings)
    assert len(files) == (4 if command is PAPER_FIGURE else 1) and files == drawn(command)


@pytest.mark.parametrize("first", ["os", "matplotlib"])
def test_a_process_that_imports_the_plots_stays_as_it_is(first, tmp_path):
    """Also a notebook's, which has imported Matplotlib before."""
    (tmp_path / "matplotlibrc").write_text("font.size: 3\n")
    variables = {"MPLBACKEND": "svg", "MATPLOTLIBRC": str(tmp_path / "own")}
    (tmp_path / "own").write_text("")
    code = f"""
import {first}, logging, os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
def state():
    return dict(os.environ), os.getcwd(), {"logging.getLogger('matplotlib').level, dict(matplotlib.rcParams)" if first != "os" else None}
before, moves, chdir = state(), [], os.chdir
os.chdir = lambda folder: moves.append(folder) or chdir(folder)
import plots.drawing
assert state() == before and (not moves or {first!r} == "os"), moves
"""
    environment = os.environ | variables
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("target", "reason"), [("gone", "is a link to gone, which is not there; make that folder"), ("results", "is a link that leads back to")]
)
def test_a_folder_of_results_that_is_a_broken_link_is_named(target, reason, tmp_path, capsys):
    link = tmp_path / "results"
    link.symlink_to(target)
    assert run_script(plot_paper_figure.main, ["--results_dir", str(link), "--output-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {link} {reason}") and error.count("\n") == 1


# --- The paper's figure --------------------------------------------------------------------------------------------------------------


def papers_runs(results, num_runs=2, algorithms=tuple(ALGORITHM_LABELS), shift=0.0):
    """Runs whose mean is the paper's curve plus `shift`, and whose values lie 0.5 apart."""
    published = read_published_curves()
    for algorithm in algorithms:
        for index in range(num_runs):
            spread = 0.5 * (index - (num_runs - 1) / 2)
            offset = shift + (-spread if algorithm == RETRAINED else spread)  # so that differences have a spread too
            accuracy = published["test_accuracy", algorithm].mean + offset
            metrics = {ACCURACY: np.repeat(accuracy / 100, 200)}
            if algorithm != RETRAINED:
                metrics["next_task_dormant_units_analysis"] = np.maximum(published["dormant_units", algorithm].mean + offset, 0) / 100
                metrics[RANK] = (published["stable_rank", algorithm].mean + offset) / 100 * 512
            store(results, algorithm, index, **metrics)


@pytest.fixture
def paper_figures(monkeypatch, capsys):
    """Draw the paper's figures without writing them: stem to figure, and what was printed."""

    def draw(results, *arguments):
        figures = {}
        monkeypatch.setattr(plot_paper_figure, "write_figure", lambda figure, *paths: figures.update({paths[0].stem: figure}))
        status, out, err = run(plot_paper_figure, capsys, "--results_dir", results, *arguments)
        assert status == 0, err
        return figures, out

    return draw


def test_paper_figure_has_the_papers_panels_and_names_at_the_curves(results, paper_figures):
    papers_runs(results)
    figures, out = paper_figures(results)
    assert list(figures) == ["paper_figure", "test_accuracy_figure"] and "Note" not in out
    published = read_published_curves()
    panels = figures["paper_figure"].axes
    for axes, metric in zip(panels, ("relative_accuracy", "dormant_units", "stable_rank"), strict=True):
        lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
        zero_line = ["Retrained network (2 runs)"] if metric == "relative_accuracy" else []
        assert list(lines) == [f"{ALGORITHM_LABELS[algorithm]} (2 runs)" for algorithm in list(ALGORITHM_LABELS)[:4]] + zero_line
        for algorithm in list(ALGORITHM_LABELS)[:4]:
            line = lines[f"{ALGORITHM_LABELS[algorithm]} (2 runs)"]
            tolerance = 0.13 if metric == "dormant_units" else 0.006  # near 0 the lower of the two runs is cut off
            np.testing.assert_allclose(line.get_ydata(), published[metric, algorithm].mean, atol=tolerance)
            assert to_hex(line.get_color()) == COLOURS[algorithm]
    for figure in figures.values():
        assert_texts_have_room(figure)
        for axes in figure.axes:
            lines = {line.get_label().split(" (")[0]: line for line in axes.get_lines()}
            names = {" ".join(text.get_text().split()): text for text in axes.texts}
            assert set(names) == set(lines) and len(names) >= 4
            assert all(text.get_color() == lines[name].get_color() for name, text in names.items())
            area = axes.get_window_extent()
            assert all(Text.get_window_extent(text).x0 > area.x1 for text in names.values())  # so no name covers a curve
            ends = {name: line.get_ydata()[-1] for name, line in lines.items()}
            assert sorted(names, key=lambda name: names[name].xyann[1]) == sorted(ends, key=ends.get)
    assert figures["paper_figure"].texts[0].get_text() == "Means of 2 runs each; shaded: ± 1 standard error."


def test_paper_figure_draws_what_is_there_and_says_what_is_missing(results, paper_figures):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    store(results, CBP, 0, SMALL, next_task_dormant_units_analysis=[0, 0.5])
    figures, out = paper_figures(results)
    texts = [[" ".join(text.get_text().split()) for text in axes.texts] for axes in figures["paper_figure"].axes]
    for figure in figures.values():
        assert_texts_have_room(figure)
    assert texts == [["No retrained network"], ["Continual backpropagation"], ["Not analysed yet"]]
    assert f"{RANK}: no runs of base_deep_learning_system, continual_backpropagation, head_resetting, shrink_and_perturb" in out
    assert "Panel a: Base deep learning system: no retrained network of index 0; left out." in out
    assert "Panel b: Continual backpropagation: index 0 has only 2 of 3 tasks." in figures["paper_figure"].texts[0].get_text()
    assert "One run each." in figures["test_accuracy_figure"].texts[0].get_text()


@pytest.mark.parametrize(
    ("index", "accuracies", "text"),
    [
        (0, {BASE: [0.5]}, "No retrained network"),
        (1, {BASE: [0.5] * 6}, "No retrained network of these indices"),
        (0, {BASE: [0.5], RETRAINED: [0.5]}, "No complete task yet"),
        (0, {RETRAINED: [0.5] * 6}, "No test accuracies yet"),
        (0, {}, "No test accuracies yet"),
    ],
)
def test_an_empty_panel_says_why(results, paper_figures, index, accuracies, text):
    for algorithm, values in accuracies.items():
        store(results, algorithm, 0, SMALL, test_accuracy_per_epoch=values)
    store(results, RETRAINED, index, SMALL, **({ACCURACY: [0.5] * 6} if index else {}))
    store(results, "x" * 90, 0, SMALL, **{RANK: [16, 15, 14]})
    figure = paper_figures(results, "--algorithms", f"{BASE},{'x' * 90}" if BASE in accuracies else "x" * 90)[0]["paper_figure"]
    assert [" ".join(text.get_text().split()) for text in figure.axes[0].texts] == [text]
    assert [text.get_text() for text in figure.axes[1].texts] == ["Not analysed yet"]
    assert_texts_have_room(figure)


@pytest.mark.parametrize("colour", [*COLOURS.values(), *drawing.FURTHER_COLOURS])
def test_names_are_as_dark_as_the_papers_lightest_or_nearly(colour):
    """Relative luminance as in WCAG 2: contrast with white is 1.05 / (luminance + 0.05)."""
    assert colour not in COLOURS.values() or colour not in drawing.DARKER
    channels = np.array(to_rgb(drawing.DARKER.get(colour, colour)))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) > 2.3


@pytest.mark.parametrize("names", [[CBP, "redo", RETRAINED], [*ALGORITHMS, *"abcdefg", "mine_0.1"], [*ALGORITHMS, "x" * 90, "two_words"]])
def test_paper_figure_of_chosen_algorithms(results, paper_figures, names):
    for name in [*names, BASE]:
        analyses = {RANK: [16, 15, 14], "next_task_dormant_units_analysis": [0, 0.1, 0.2]}
        store(results, name, 0, SMALL, test_accuracy_per_epoch=[0.5, 0.5, 0.4, 0.4, 0.3 - 0.01 * len(name) / 90, 0.1], **analyses)
    figures, out = paper_figures(results, "--algorithms", ",".join(names))
    assert ("Note" in out) == (BASE not in names)
    assert BASE in names or out == f"Note: here too, and drawn where --algorithms names them: {BASE}\n"
    with_retrained = {" ".join(algorithm_label(name).split()) for name in {*names, RETRAINED}}
    for figure in figures.values():
        assert_texts_have_room(figure)
        for axes in figure.axes:
            shown = [text.get_text() for text in axes.texts]
            assert len(shown) == len(with_retrained) - (axes in figure.axes[1:])  # the retrained network has no curve in the other panels
            boxes = sorted((Text.get_window_extent(text) for text in axes.texts), key=lambda box: box.y0)
            assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))


def test_wide_tick_labels_have_room_in_the_papers_figure(results, paper_figures):
    accuracies = {BASE: [0.5, 0.5, 0.491, 0.491, 0.483, 0.483], RETRAINED: [0.5, 0.5, 0.55, 0.55, 0.61, 0.61]}
    for algorithm, values in accuracies.items():
        analyses = {RANK: [16, 15.99, 15.98], "next_task_dormant_units_analysis": [0, 0.0001, 0.0002]}
        store(results, algorithm, 0, SMALL, test_accuracy_per_epoch=values, **analyses)
    for figure in paper_figures(results)[0].values():
        assert_texts_have_room(figure)


def test_names_are_spread_near_where_they_are_wanted():
    heights = np.array([0.1, 0.2, 0.1])
    np.testing.assert_allclose(spread(np.array([0.2, 0.5, 0.8]), heights), [0.2, 0.5, 0.8])
    np.testing.assert_allclose(spread(np.array([0.5, 0.5, 0.5]), heights), [0.35, 0.5, 0.65])
    np.testing.assert_allclose(spread(np.array([0.0, 0.0, 0.9]), heights), [0.05, 0.2, 0.9])
    np.testing.assert_allclose(spread(np.array([1.0, 1.0, 1.0]), heights), [0.65, 0.8, 0.95])


# --- The comparison ------------------------------------------------------------------------------------------------------------------


def test_published_curves_are_consistent_and_begin_with_initial_networks():
    """Relative accuracy is test accuracy minus the retrained network's; at 5 classes stand networks that saw no class yet."""
    published = read_published_curves()
    assert len(published) == 17 and all(len(curve.mean) == 20 for curve in published.values())
    for algorithm in list(ALGORITHM_LABELS)[:4]:
        difference = published["test_accuracy", algorithm].mean - published["test_accuracy", RETRAINED].mean
        np.testing.assert_allclose(published["relative_accuracy", algorithm].mean, difference, atol=0.005)
        rank, dormant = published["stable_rank", algorithm], published["dormant_units", algorithm]
        assert rank.number_of_classes[0] == 5 and rank.mean[0] == pytest.approx(95.55, abs=0.03) and dormant.mean[0] < 0.02
        assert rank.mean[1] < 92


def test_comparison_by_hand(results, tmp_path, capsys):
    """Base at 100 classes: the paper has 71.093 +- 0.120 (reading error 0.005), and at 10 classes 87.681, its standard error hidden."""
    accuracy = np.full((2, 20), 0.5)
    accuracy[:, 19] = 0.7100, 0.7140  # mean 71.2, standard error 0.2
    accuracy[:, 1] = 0.8760, 0.8770  # mean 87.65, standard error 0.05
    for index, values in enumerate(accuracy):
        store(results, BASE, index, test_accuracy_per_epoch=np.repeat(values, 200))
    points, _ = compare_with_paper.compare(results, read_published_curves())
    assert [point.number_of_classes for point in points] == list(range(5, 101, 5))
    last, hidden = points[19], points[1]
    assert (last.metric, last.algorithm, last.num_runs) == ("test_accuracy", BASE, 2)
    assert (last.ours, last.standard_error) == pytest.approx((71.2, 0.2), abs=1e-4)
    assert (last.paper, last.paper_standard_error, last.reading_error) == (71.093, 0.120, 0.005)
    assert last.error == pytest.approx(math.sqrt(0.2**2 + 0.12**2 + 0.005**2), abs=1e-4) and last.verdict == "agrees"
    assert hidden.difference == pytest.approx(-0.031, abs=1e-4) and hidden.verdict == "agrees"
    # Shown are 0.492 at 25 classes and 0.411 at 50, and nothing else up to there.
    assert [point.is_hidden for point in points[:10]] == [True] * 4 + [False] + [True] * 4 + [False]
    neighbours = [0.492] * 5 + [0.492 - number * (0.492 - 0.411) / 5 for number in range(1, 6)]
    assert [point.paper_standard_error for point in points[:10]] == pytest.approx(neighbours)

    arguments = "--results_dir", results, "--output-dir", tmp_path
    status, out, _ = run(compare_with_paper, capsys, *arguments)
    row = "test_accuracy  base_deep_learning_system  100  71.200  0.200  2  71.093  0.120  +0.107  0.799  agrees"  # 20 / 19 of 0.759
    lines = out.splitlines()
    assert status == 0 and row.split() in [line.split() for line in lines]
    least = "test_accuracy of base_deep_learning_system at 95 classes, -21.969."
    assert lines[-1] == f"0 of 1 curves agree, 2 of 20 points; the smallest adjusted p-value is <0.001, {least}"
    assert "relative_accuracy: Base deep learning system: no retrained network of indices 0, 1; left out" in out
    assert "stable_rank: nothing to compare of base_deep_learning_system, continual_backpropagation" in out
    text = (tmp_path / "comparison_with_paper.md").read_text()
    cells = "test_accuracy | base_deep_learning_system | 10 | 87.650 | 0.050 | 2 | 87.681 | hidden, ~0.492 | -0.031 | 0.982 | agrees"
    assert f"| {cells} |" in text.splitlines() and lines[-1] in text
    assert "| test_accuracy | base_deep_learning_system | 2 of 20 | -39.320 | 5 | <0.001 | differs |" in text.splitlines()
    assert (tmp_path / "comparison_with_paper.png").is_file() and (tmp_path / "comparison_with_paper.svg").is_file()
    assert run(compare_with_paper, capsys, *arguments, "--strict")[0] == 1


def test_gaps_to_the_retrained_network_by_hand(results, tmp_path, capsys):
    """At c classes the retrained network has 60 %, "redo" 60 + 2 - 0.04 c and 60 - 0.08 c; the mean of 5, ..., 100 is 52.5."""
    classes = np.arange(5, 101, 5)
    for index, gap in enumerate((2 - 0.04 * classes, -0.08 * classes, np.zeros(20))):
        store(results, RETRAINED, index, test_accuracy_per_epoch=np.repeat([0.6] * 20, 200))
        store(results, "redo", index, test_accuracy_per_epoch=np.repeat(0.6 + gap / 100, 200)[: 4000 if index < 2 else 3999])
    store(results, "redo", 3, test_accuracy_per_epoch=np.full(4000, 0.9))  # without a partner
    store(results, CBP, 1, test_accuracy_per_epoch=np.repeat([0.6, 0.61] * 10, 200))
    gaps, remarks = compare_with_paper.gaps_to_retrained(results)
    assert [gap.algorithm for gap in gaps] == [CBP, "redo"]
    np.testing.assert_allclose(gaps[1].mean, [-0.1, -4.2], atol=1e-5)
    np.testing.assert_allclose(gaps[1].slope, [-4, -8], atol=1e-4)
    assert remarks == ["gap to the retrained network: redo: index 2 without all tasks; left out"]
    _, out, _ = run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path)
    # Standard errors: half the distance of two runs. Of +1 at 10, 20, ...: the sum of (c - 52.5) there is 25, of all squares 16,625.
    cells = [f"{CBP} | 1 | +0.500 | - | ", "redo | 2 | -2.150 | 2.050 | - | -6.000 | 2.000 | - |"]
    text = (tmp_path / "comparison_with_paper.md").read_text()
    assert all(f"| {cell}" in text for cell in cells) and "| +0.150 | - | " in text
    assert " ".join(cells[1].replace("|", "").split()) in [" ".join(line.split()) for line in out.splitlines()]


def test_folders_that_are_not_the_papers_leave_the_comparison_alone(results, tmp_path, capsys):
    """Without a retrained network they are not read; with it, those that cannot be used are named, and a | in a name is no column."""
    papers_runs(results, num_runs=2, algorithms=[BASE])
    store(results, "a|b", 0, test_accuracy_per_epoch=[0.5] * 4000)
    (results / "scratch" / ACCURACY).mkdir(parents=True)
    np.save(results / "scratch" / ACCURACY / "index-0.npy", np.full(3000, 0.5))
    arguments = "--results_dir", results, "--output-dir", tmp_path
    status, alone, _ = run(compare_with_paper, capsys, *arguments)
    assert status == 0 and "scratch" not in alone and "gap to" not in alone
    papers_runs(results, num_runs=2, algorithms=[RETRAINED])
    status, out, _ = run(compare_with_paper, capsys, *arguments)
    note = "gap to the retrained network: scratch left out, scratch/test_accuracy_per_epoch/index-0.npy: holds 3,000 values"
    text = (tmp_path / "comparison_with_paper.md").read_text()
    assert status == 0 and f"Note: {note}" in out and f"- {note}" in text
    table = text[text.index("| gap to") :].partition("\n\n")[0].replace("a\\|b", "").splitlines()
    assert len(table) == 4 and {row.count("|") for row in table} == {9}
    np.save(results / RETRAINED / ACCURACY / "index-0.npy", np.full(4001, 0.5))
    assert_one_line(*run(compare_with_paper, capsys, *arguments), f"{RETRAINED}/{ACCURACY}/index-0.npy: holds 4001 values")


def test_gaps_of_the_papers_own_curves_are_its(results, tmp_path, capsys):
    papers_runs(results, num_runs=2)
    gaps, _ = compare_with_paper.gaps_to_retrained(results)
    for _, _, mean, _, papers_mean, slope, _, papers_slope in compare_with_paper.gap_rows(gaps, read_published_curves()):
        assert float(mean) == pytest.approx(float(papers_mean), abs=0.002) and float(slope) == pytest.approx(float(papers_slope), abs=0.02)
    assert len(gaps) == 4


def test_the_papers_own_numbers_agree_everywhere(results, tmp_path, capsys):
    papers_runs(results, num_runs=3)
    status, out, _ = run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path, "--strict")
    assert status == 0
    assert (
        out.splitlines()[-1].startswith("17 of 17 curves agree, 340 of 340 points; the smallest adjusted p-value is ") and "Note" not in out
    )


@pytest.mark.parametrize("num_runs", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("spread", [0.1, 1, 10])
def test_p_values_are_those_of_the_runs(num_runs, spread):
    """Of SciPy's tests on single values, the larger p; of the paper's there are 15, whose deviation includes the reading error."""
    ours, paper = 80 + spread * np.random.default_rng(num_runs).normal(size=num_runs), np.random.default_rng(9).normal(80.5, 1, size=15)
    (mean,), (error,), _ = mean_and_standard_error(ours[:, np.newaxis])
    shown_error = math.sqrt(paper.var(ddof=1) / 15 - 0.1**2)
    point = compare_with_paper.Point("test_accuracy", BASE, 5, mean, error, num_runs, paper.mean(), shown_error, False, 0.1)
    (point,) = compare_with_paper.judged([point])
    if num_runs == 1:
        assert math.isnan(point.p_value) and point.verdict == "not judged"
        return
    expected = [ttest_ind(ours, paper, equal_var=equal_var).pvalue for equal_var in (False, True)]
    assert point.p_value == pytest.approx(max(expected)) and point.verdict == ("differs" if max(expected) < 0.05 else "agrees")


def test_p_values_are_adjusted_within_curves_and_over_them():
    """By hand: p times the number over the rank, and no larger than that of a later rank; then the curves' smallest, 0.03 and 0.008."""
    adjusted = compare_with_paper.adjusted_p_values(np.array([0.01, 0.004, 0.04, 0.5, np.nan, 0.03, np.nan]), np.array(list("ABABAAC")))
    np.testing.assert_allclose(adjusted, [0.03, 0.016, 0.04, 0.5, np.nan, 0.04, np.nan])


def simulated_verdicts(num_runs, shift=0.0, correlation=0.0, spread=1.0, repetitions=1500):
    """Test accuracies of many normally distributed papers of 15 runs, and of as many reproductions whose first curve's true mean is moved.

    shift: in standard deviations of a run. correlation: of a run's points. spread: our standard deviation over the paper's. Returns
    (repetitions, 5 curves, 20 points), True where a point differs.
    """
    generator = np.random.default_rng(num_runs)
    curves = [curve for (metric, _), curve in read_published_curves().items() if metric == "test_accuracy"]
    classes, shown = curves[0].number_of_classes, np.isfinite([curve.standard_error for curve in curves])
    errors = np.array([np.interp(classes, classes[here], curve.standard_error[here]) for curve, here in zip(curves, shown, strict=True)])
    deviation, reading_error = errors * math.sqrt(15), np.array([curve.reading_error for curve in curves])

    def means_and_errors(runs, deviation):
        own, common = generator.standard_normal((repetitions, runs, *errors.shape)), generator.standard_normal((repetitions, runs, 1, 1))
        values = math.sqrt(1 - correlation) * own + math.sqrt(correlation) * common
        return deviation * values.mean(axis=1), deviation * values.std(axis=1, ddof=1) / math.sqrt(runs)

    ours, standard_error = means_and_errors(num_runs, spread * deviation)
    ours[:, 0] += shift * deviation[0]
    paper, paper_error = means_and_errors(15, deviation)
    paper += reading_error * generator.standard_normal(paper.shape)
    for number, here in enumerate(shown):
        paper_error[:, number] = [np.interp(classes, classes[here], error[here]) for error in paper_error[:, number]]
    p = compare_with_paper.p_values(ours, standard_error, num_runs, paper, np.hypot(paper_error, reading_error))
    labels = np.repeat(np.arange(len(curves)), len(classes))
    adjusted = [compare_with_paper.adjusted_p_values(of_one.ravel(), labels) for of_one in p]
    return np.reshape(adjusted, p.shape) < compare_with_paper.LEVEL


@pytest.mark.parametrize(("num_runs", "power"), [(2, 0.85), (3, 0.97), (5, 0.99), (15, 0.99)])
def test_chance_seldom_differs_and_three_standard_deviations_do(num_runs, power):
    """Of equal truths at most 5 % of metrics may differ somewhere, give or take what so many repetitions can tell."""
    assert simulated_verdicts(num_runs).any(axis=(1, 2)).mean() <= 0.06
    differs = simulated_verdicts(num_runs, shift=3.0)
    assert differs[:, 0].any(axis=1).mean() >= power
    assert differs[:, 1:].any(axis=2).mean() <= 0.06  # of the curves that are the paper's


def test_what_the_comparison_says_to_expect():
    """In the script's docstring, where points are not independent or deviations not equal."""
    for num_runs, power in ((2, 0.56), (3, 0.66), (5, 0.93)):
        differs = simulated_verdicts(num_runs, shift=3.0, correlation=0.8)
        assert differs[:, 0].any(axis=1).mean() == pytest.approx(power, abs=0.04)
    assert simulated_verdicts(2, spread=1.5).any(axis=(1, 2)).mean() == pytest.approx(0.14, abs=0.03)


def test_comparison_is_written_before_it_is_printed(results, tmp_path, monkeypatch):
    papers_runs(results, num_runs=2, algorithms=[BASE])

    def printed(*texts, **_):
        raise BrokenPipeError

    monkeypatch.setattr(compare_with_paper, "print", printed, raising=False)
    with pytest.raises(BrokenPipeError):
        compare_with_paper.main(["--results_dir", str(results), "--output-dir", str(tmp_path)])
    assert {path.suffix for path in tmp_path.glob("comparison_with_paper.*")} == {".md", ".png", ".svg"}


def test_strict_says_what_chance_does(capsys):
    with pytest.raises(SystemExit):
        compare_with_paper.parse_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "at least one curve differs" in text and "1 of 20" in text


def test_one_run_is_too_few_to_claim_anything(results, tmp_path, capsys):
    papers_runs(results, num_runs=1, algorithms=[BASE, RETRAINED])
    arguments = "--results_dir", results, "--output-dir", tmp_path
    status, out, _ = run(compare_with_paper, capsys, *arguments)
    assert status == 0 and out.splitlines()[-1] == "Nothing compared: one run is too few for a standard error."
    assert "not judged" in out and "agrees" not in out and "differs" not in out
    assert run(compare_with_paper, capsys, *arguments, "--strict")[0] == 1


def test_runs_of_fewer_tasks_are_the_beginning_of_the_papers(results, tmp_path, capsys):
    accuracies = read_published_curves()["test_accuracy", CBP].mean[:3] / 100
    for index, offset in enumerate((-0.005, 0, 0.005)):
        store(results, CBP, index, {"num_tasks": 3}, test_accuracy_per_epoch=np.repeat(accuracies + offset, 200))
    status, out, _ = run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path, "--strict")
    assert status == 0 and out.splitlines()[-1].startswith("1 of 1 curves agree, 3 of 3 points") and "another experiment" not in out


def test_other_experiments_are_named_and_left_out(results, tmp_path, capsys):
    store(results, BASE, 0, SMALL | {"dataset": "synthetic"}, test_accuracy_per_epoch=[0.5] * 6)
    store(results, BASE, 1, SMALL | {"dataset": "synthetic"}, test_accuracy_per_epoch=[0.5] * 6)
    output = tmp_path / "output"
    arguments = "--results_dir", results, "--output-dir", output
    status, out, _ = run(compare_with_paper, capsys, *arguments)
    assert status == 0 and out.splitlines()[-1] == "Nothing compared: no run of the paper's experiment here; nothing written."
    notes = [line for line in out.splitlines() if "another experiment" in line]
    assert len(notes) == 1 and "base_deep_learning_system: indices 0, 1 left out" in notes[0]
    assert "(dataset synthetic instead of cifar100, classes_per_task 4" in notes[0]  # that there are fewer tasks is no other experiment
    assert not output.exists()
    assert run(compare_with_paper, capsys, *arguments, "--strict")[0] == 1
    papers_runs(results, num_runs=4, algorithms=[CBP])
    status, out, _ = run(compare_with_paper, capsys, *arguments, "--strict")
    assert status == 0 and "3 of 3 curves agree, 60 of 60 points" in out and "another experiment" in out


def test_figure_of_differences_shows_the_points(results):
    papers_runs(results, num_runs=2, algorithms=[CBP], shift=2.0)
    points, _ = compare_with_paper.compare(results, read_published_curves())
    with rc_context(STYLE):
        figure = compare_with_paper.draw_differences(points)
    assert len(figure.axes) == 3  # without retrained networks there is no relative accuracy
    assert_texts_have_room(figure)
    axes = figure.axes[0]
    of_accuracy = [point for point in points if point.metric == "test_accuracy"]
    differing = next(line for line in axes.get_lines() if line.get_label() == "_differs")
    assert line_values(differing)[0] == [point.number_of_classes for point in of_accuracy if point.verdict == "differs"]
    np.testing.assert_allclose(differing.get_ydata(), 2.0, atol=1e-4)
    assert band_at(axes, 100) == pytest.approx((-of_accuracy[-1].error, of_accuracy[-1].error))


# --- The ledger ----------------------------------------------------------------------------------------------------------------------

CLAIM = "# Results\n\nBy hand: é.\n\n"


@pytest.fixture
def ledger(results, tmp_path, monkeypatch, capsys):
    """Compare, without drawing, and put the verdicts into a ledger; returns what was printed, and the rows by metric and algorithm."""
    monkeypatch.setattr(compare_with_paper, "draw_differences", lambda *_: None)
    monkeypatch.setattr(compare_with_paper, "write_figure", lambda *_: None)
    path = tmp_path / "RESULTS.md"
    path.write_text(f"{CLAIM}{BEGIN}{END}\nAfter.\n")

    def write():
        status, out, err = run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path, "--ledger", path)
        assert status == 0, err
        text = path.read_text()
        assert text.startswith(CLAIM + BEGIN) and text.endswith(END + "\nAfter.\n")
        lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
        return out, {tuple(cells[1:3]): cells[3:-1] for line in lines[2:] if (cells := [cell.strip() for cell in line.split("|")])}

    return write


def test_the_ledger_has_a_row_for_every_curve_of_the_paper(results, ledger, tmp_path):
    papers_runs(results, num_runs=3, algorithms=[BASE])
    papers_runs(results, num_runs=3, algorithms=[CBP], shift=-9)
    for index, commit in enumerate(("a" * 40, "a" * 40, f"{'b' * 40}-dirty")):
        path = results / BASE / "config_files" / f"index-{index}.json"
        environment = {"date": f"2026-01-0{index + 1}", "device": "A|B", "commit": commit}
        resumed = [{"device": "C", "date": "2026-02-01"}] if index == 1 else "damaged"
        config = {"_environment": environment, "_resumptions": resumed, "precision": "bf16", "stepsize": 0.1, "results_dir": "/x"}
        path.write_text(json.dumps(config))
    out, rows = ledger()
    assert list(rows) == list(read_published_curves()) and "recorded" not in out
    row = rows["test_accuracy", BASE]
    assert row[3] == "71.093 ± 0.289, paper 71.093, verified"  # values 0.5 apart: a standard deviation of 0.5
    origin = ["2026-01-01 to 2026-02-01", "A/B, C", "precision=bf16", "aaaaaaaaaaaa, bbbbbbbbbbbb-dirty"]
    assert row[4:] == ["3 (index 0-2)", "verified", *origin]
    assert rows["test_accuracy", CBP][3:] == ["67.136 ± 0.289, paper 76.136, differs", "3 (index 0-2)", "differs", "-", "-", "-", "-"]
    assert rows["relative_accuracy", BASE] == ["paper -0.277", "paper 0.936", "paper -0.248", "paper -4.969", "-", "not run yet", *"----"]
    before = (tmp_path / "RESULTS.md").read_bytes()
    assert ledger()[1] == rows and (tmp_path / "RESULTS.md").read_bytes() == before


def test_the_ledger_keeps_what_had_more_runs_or_numbers(results, ledger):
    papers_runs(results, num_runs=2, algorithms=[BASE, CBP])
    _, rows = ledger()
    shutil.rmtree(results)
    papers_runs(results, num_runs=1, algorithms=[BASE], shift=1)
    store(results, "head_resetting", 4, test_accuracy_per_epoch=[0.9] * 1000)
    store(results, RETRAINED, 4, test_accuracy_per_epoch=[0.9] * 1000)
    out, again = ledger()
    assert again.pop(("test_accuracy", "head_resetting"))[:6] == [
        *("90.000, paper 89.841", "90.000, paper 85.059", "paper 80.854", "paper 73.690"),
        *("1 (index 4)", "one run, not judged"),
    ]
    new = [("relative_accuracy", "head_resetting"), ("test_accuracy", RETRAINED)]
    assert [key for key in again if again[key] != rows[key]] == new
    assert (
        "Note: RESULTS.md: what is recorded of test_accuracy, base_deep_learning_system has as many numbers "
        "and runs, or more, and stays\n" in out
    )
    papers_runs(results, num_runs=3, algorithms=[BASE], shift=1)
    out, again = ledger()
    assert again["test_accuracy", BASE][4] == "3 (index 0-2)" and "recorded" not in out


@pytest.mark.parametrize("text", [None, "", BEGIN, END + BEGIN, BEGIN + BEGIN + END], ids=range(5))
def test_a_ledger_without_its_two_lines_is_one_line_before_any_work(results, tmp_path, capsys, text):
    papers_runs(results, num_runs=2, algorithms=[BASE])
    path = tmp_path / "RESULTS.md"
    if text is not None:
        path.write_text(text)
    before = everything_in(tmp_path)
    message = f"{path}: what is written goes between two lines" if text is not None else str(path)
    assert_one_line(*run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path, "--ledger", path), message)
    assert everything_in(tmp_path) == before


def test_the_ledger_of_this_repository_has_the_papers_curves():
    _, block, _ = around_block(RESULTS, BEGIN, END)
    assert re.findall(r"^\| (\w+) \| (\w+) \| .*paper", block.decode(), re.MULTILINE) == list(read_published_curves())


# --- Bad input -----------------------------------------------------------------------------------------------------------------------


class MaliciousObject:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def save_pickle(path):
    np.save(path, np.array([MaliciousObject()], dtype=object), allow_pickle=True)


def save_archive(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(6))


def save_impossible_shape(path, shape):
    np.save(path, np.ones(6))
    path.write_bytes(path.read_bytes().replace(b"(6,), }" + b" " * (len(shape) - 4), shape.encode() + b", }", 1))  # of equal length


def metric_file(results):
    return results / BASE / ACCURACY / "index-0.npy"


def config_file(results):
    return results / BASE / "config_files" / "index-0.json"


# What is done to good results, and a part of the message.
BAD_RESULTS = {
    "pickled array": (lambda results: save_pickle(metric_file(results)), "index-0.npy: cannot read"),
    "bare pickle": (lambda results: metric_file(results).write_bytes(pickle.dumps(MaliciousObject())), "index-0.npy: cannot read"),
    "empty file": (lambda results: metric_file(results).write_bytes(b""), "index-0.npy: cannot read"),
    "truncated": (lambda results: metric_file(results).write_bytes(metric_file(results).read_bytes()[:-3]), "index-0.npy: cannot read"),
    "text": (lambda results: metric_file(results).write_text("0.5 0.6"), "index-0.npy: cannot read"),
    "archive": (lambda results: save_archive(metric_file(results)), "index-0.npy: cannot read"),
    "broken archive": (lambda results: metric_file(results).write_bytes(b"PK\x03\x04 and so on"), "index-0.npy: cannot read"),
    "two dimensions": (lambda results: np.save(metric_file(results), np.ones((2, 3))), "index-0.npy: expected one number"),
    "complex": (lambda results: np.save(metric_file(results), np.ones(6, dtype=complex)), "index-0.npy: expected one number"),
    "texts": (lambda results: np.save(metric_file(results), np.array(["0.5"])), "index-0.npy: expected one number"),
    "too long": (lambda results: np.save(metric_file(results), np.ones(7)), "holds 7 values, but by its config this run has 6 epochs"),
    "percent": (lambda results: np.save(metric_file(results), np.full(6, 76.0)), "value 0 is 76; values of this metric are from 0 to 1"),
    "negative": (lambda results: np.save(metric_file(results), np.full(6, -0.1)), "value 0 is -0.1"),
    "infinite": (lambda results: np.save(metric_file(results), np.full(6, np.inf)), "value 0 is inf"),
    "not a number": (lambda results: np.save(metric_file(results), [0.1, np.nan]), "the value of epoch 2 is not a number"),
    "a folder": (lambda results: (metric_file(results).unlink(), metric_file(results).mkdir()), "index-0.npy: cannot read"),
    "negative shape": (lambda results: save_impossible_shape(metric_file(results), "(-1,)"), "index-0.npy: cannot read"),
    "huge shape": (lambda results: save_impossible_shape(metric_file(results), "(10000000000000,)"), "index-0.npy: cannot read"),
    "metric a file": (
        lambda results: (metric_file(results).unlink(), metric_file(results).parent.rmdir(), metric_file(results).parent.touch()),
        "test_accuracy_per_epoch: expected a folder here",
    ),
    "config a pipe": (lambda results: (config_file(results).unlink(), os.mkfifo(config_file(results))), "(not a file)"),
    "config not JSON": (lambda results: config_file(results).write_text("{"), "index-0.json: cannot read the stored config"),
    "config a list": (lambda results: config_file(results).write_text("[]"), "index-0.json: cannot read the stored config"),
    "config not text": (lambda results: config_file(results).write_bytes(b"\xff\xfe"), "index-0.json: cannot read the stored config"),
    "config deep": (lambda results: config_file(results).write_text("[" * 100_000), "index-0.json: cannot read the stored config"),
    "config size": (lambda results: config_file(results).write_text('{"num_tasks": 0}'), "index-0.json: num_tasks is 0"),
    "config type": (lambda results: config_file(results).write_text('{"epochs_per_task": "200"}'), "index-0.json: epochs_per_task is"),
    "other epochs": (
        lambda results: store(results, BASE, 1, SMALL | {"epochs_per_task": 3}, test_accuracy_per_epoch=[0.5]),
        "epochs_per_task is 2 in base_deep_learning_system/config_files/index-0.json and 3 in",
    ),
    "other classes": (
        lambda results: store(results, CBP, 0, SMALL | {"classes_per_task": 5}, test_accuracy_per_epoch=[0.5]),
        "classes_per_task is 4",
    ),
    "other width": (
        lambda results: store(results, BASE, 1, SMALL | {"network_width": 3}, test_accuracy_per_epoch=[0.5]),
        "network_width is 2",
    ),
    "other batches": (
        lambda results: store(results, BASE, 1, SMALL | {"batch_size": 30}, test_accuracy_per_epoch=[0.5]),
        "batch_size is 90 in base_deep_learning_system/config_files/index-0.json and 30 in",
    ),
}


def assert_one_line(status, out, err, message):
    assert status == 2 and not out and err.count("\n") == 1 and err.startswith("error: ") and message in err, err


@pytest.mark.parametrize("case", BAD_RESULTS)
def test_bad_results_are_one_line_and_nothing_is_written(results, tmp_path, capsys, case):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    spoil, message = BAD_RESULTS[case]
    spoil(results)
    before = everything_in(tmp_path)
    outcome = run(
        plot_incremental_cifar_results, capsys, "--results_dir", results, "--metric", ACCURACY, "--output", tmp_path / "figure.svg"
    )
    assert_one_line(*outcome, message)
    assert_one_line(*run(plot_paper_figure, capsys, "--results_dir", results, "--output-dir", tmp_path), message)
    if not case.startswith("other"):  # the comparison leaves those out
        assert_one_line(*run(compare_with_paper, capsys, "--results_dir", results, "--output-dir", tmp_path), message)
    assert everything_in(tmp_path) == before


# Arguments of the script of single figures, and a part of the message; {} is the folder of results.
BAD_ARGUMENTS = {
    "no metric": (["--results_dir", "{}"], "--metric"),
    "unknown metric": (["--metric", "accuracy"], "no algorithm here has accuracy; what there is: test_accuracy_per_epoch\n"),
    "path as metric": (["--metric", f"../{BASE}/{ACCURACY}"], f"has ../{BASE}/{ACCURACY}; what there is: test_accuracy_per_epoch\n"),
    "suffix": (["--metric", ACCURACY, "--output", "figure.jpg"], "must end in one of .png, .svg, .pdf"),
    "no suffix": (["--metric", ACCURACY, "--output", "figure"], "must end in one of"),
    "folder as output": (["--metric", ACCURACY, "--output", "{}/folder.svg"], "folder.svg: cannot write this file (what has"),
    "output in a file": (
        ["--metric", ACCURACY, "--output", "{}/file/figure.svg"],
        "figure.svg: cannot write this file (file is not a folder)",
    ),
    "output name too long": (["--metric", ACCURACY, "--output", "x" * 300 + ".svg"], "cannot write this file (File name too long)"),
    "no results": (["--metric", ACCURACY, "--results_dir", "{}/nowhere"], "no such folder"),
    "name too long": (["--metric", ACCURACY, "--results_dir", "x" * 5000], "no such folder"),
    "results of one algorithm": (["--metric", ACCURACY, "--results_dir", "{}/base_deep_learning_system"], "is one algorithm's"),
    "a file as algorithm": (["--metric", ACCURACY, "--algorithms", "file"], "results/file: expected a folder here"),
    "no such algorithm": (["--metric", ACCURACY, "--algorithms", f"{BASE},mine"], "mine/test_accuracy_per_epoch: no run's metric here"),
    "empty name": (["--metric", ACCURACY, "--algorithms", f"{BASE},"], "expected names of folders"),
    "path as name": (["--metric", ACCURACY, "--algorithms", "../results"], "expected names of folders"),
    "name twice": (["--metric", ACCURACY, "--algorithms", f"{BASE},{BASE}"], "appears twice"),
    "no retrained network": (["--metric", RELATIVE], "retrained_network/test_accuracy_per_epoch: no run's metric here"),
    "retrained alone": (["--metric", RELATIVE, "--algorithms", RETRAINED], "name at least one"),
    "not analysed": (["--metric", RANK], f"no algorithm here has {RANK} (post_run_analysis.py writes it); what there is: test_"),
    "per epoch": (["--metric", RANK, "--per-epoch"], "one value per task"),
    "published loss": (["--metric", "test_loss_per_epoch", "--published"], "the paper shows no test_loss_per_epoch"),
    "published per epoch": (["--metric", ACCURACY, "--published", "--per-epoch"], "leave out --per-epoch"),
    "leftover": (["--metric", ACCURACY, "more"], "unrecognized arguments: more"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_nothing_is_written(results, tmp_path, capsys, case, monkeypatch):
    store(results, BASE, 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    (results / "folder.svg").mkdir()
    (results / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)
    arguments, message = BAD_ARGUMENTS[case]
    arguments = [argument.replace("{}", str(results)) for argument in arguments]
    if "--results_dir" not in arguments:
        arguments += ["--results_dir", str(results)]
    assert_one_line(*run(plot_incremental_cifar_results, capsys, *arguments), message)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize(
    ("script", "script_outputs"),
    [
        (plot_paper_figure, ["paper_figure.png", "paper_figure.svg", "test_accuracy_figure.png", "test_accuracy_figure.svg"]),
        (compare_with_paper, ["comparison_with_paper.md", "comparison_with_paper.png", "comparison_with_paper.svg"]),
    ],
    ids=["paper_figure", "comparison"],
)
def test_bad_arguments_of_the_other_scripts(script, script_outputs, results, tmp_path, capsys):
    papers_runs(results, num_runs=1, algorithms=[BASE])
    (tmp_path / "file").write_text("")
    before = everything_in(tmp_path)
    assert_one_line(*run(script, capsys, "--results_dir", tmp_path / "nowhere"), "no such folder")
    assert_one_line(*run(script, capsys, "--results_dir", results / BASE), "is one algorithm's")
    assert_one_line(*run(script, capsys, "--no-such-argument"), "unrecognized arguments")
    status, out, err = run(script, capsys, "--results_dir", results, "--output-dir", tmp_path / "file")
    assert_one_line(status, out, err, "cannot write this file")
    assert everything_in(tmp_path) == before
    for name in script_outputs:  # whichever cannot be written, the others are not written either
        (tmp_path / "output" / name).mkdir(parents=True)
        before = everything_in(tmp_path)
        assert_one_line(*run(script, capsys, "--results_dir", results, "--output-dir", tmp_path / "output"), f"{name}: cannot write")
        assert everything_in(tmp_path) == before
        (tmp_path / "output" / name).rmdir()


def test_nothing_at_all_for_the_papers_figure(results, capsys):
    assert_one_line(*run(plot_paper_figure, capsys, "--results_dir", results), f"nothing here that the paper's figure shows of {BASE}, ")
    store(results, "redo", 0, SMALL, test_accuracy_per_epoch=[0.5] * 6)
    for names, message in (("redo,rdo", "shows of rdo\n"), ("redo,", "expected names of folders"), ("a,a", "a appears twice")):
        assert_one_line(*run(plot_paper_figure, capsys, "--results_dir", results, "--algorithms", names), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("metric,algorithm\ntest_accuracy,x\n", "line 2: not a row"),
        ("metric,algorithm,number_of_classes,mean,standard_error,reading_error\ntest_accuracy,x,5,high,,0.1\n", "line 2: not a row"),
        ("metric,algorithm,number_of_classes,mean,standard_error,reading_error\ntest_accuracy,x,5,80,,0\n", "reading_error must be"),
    ],
)
def test_damaged_published_curves(tmp_path, capsys, content, message):
    path = tmp_path / "published_curves.csv"
    path.write_text(content)

    def main(arguments):
        read_published_curves(path)
        return 0

    assert run_script(main, []) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and message in err
