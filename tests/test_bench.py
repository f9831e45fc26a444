import pytest
import torch

import bench
from incremental_cifar.command_line import run_script

SMALL = ["--device", "cpu", "--width", "1", "--batch-size", "45", "--turns", "1"]

# What `--released` needs of the released code: the same attributes, a training loop that takes a known time.
FAKE_RELEASED = """
import numpy as np
class IncrementalCIFARExperiment:
    def __init__(self, exp_params, results_dir, run_index, verbose):
        assert results_dir
        assert exp_params["use_cbp"] and exp_params["stepsize"] == 0.1 and exp_params["data_path"] and not verbose
        self.current_num_classes, self.num_epochs = 5, 4000
        self.results_dict = {"epoch_runtime": np.zeros(4000)}
    def run(self):
        print("something else")
        for epoch in range(self.num_epochs):
            self.results_dict["epoch_runtime"][epoch] = (50.0, 20.0)[epoch] * self.current_num_classes
"""


def tables(output):
    """The cells of each Markdown table of an output, by the heading of the second column."""
    found, rows = {}, None
    for line in output.splitlines():
        if not line.startswith("|"):
            rows = None
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if rows is None:
            rows = found.setdefault(cells[1], [])
        elif not cells[0].startswith("-"):
            rows.append(cells)
    return found


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "released" / "lop" / "incremental_cifar"
    folder.mkdir(parents=True)
    (folder / "incremental_cifar_experiment.py").write_text(FAKE_RELEASED)
    return tmp_path / "released"


def test_the_tables_have_all_rows_and_their_numbers_add_up(capsys, checkout):
    threads = torch.get_num_threads()
    assert run_script(bench.main, [*SMALL, "--precisions", "fp32", "--profile", "--released", str(checkout)]) == 0
    output = capsys.readouterr().out
    assert f"{threads} threads, PyTorch {torch.__version__}" in output.splitlines()[0] and "width 1, batch 45" in output.splitlines()[0]
    found = tables(output)
    rows = found["variant"]
    assert [row[1] for row in rows] == ["bare loop", *bench.ALGORITHMS]
    for row in rows:
        milliseconds, images = float(row[2]), float(row[3].replace(",", ""))
        assert abs(45_000 / milliseconds - images) < 0.01 * images + 1
        if row[1] != "bare loop":
            assert abs(sum(map(float, row[4:7])) - milliseconds) < 0.05
    assert rows[0][7] == rows[1][8] == "1.000" and 0.5 < float(rows[1][7]) < 10
    # A full run from an epoch of one class: 200 epochs each of 5, 10, ..., 100 classes are 210,000 of them.
    measured, projected = found["epoch or run"]
    assert measured[1] == "epoch of 1 class" and projected[1].startswith("4,000 epochs (projected): ")
    hours, unit = projected[2].split()
    assert float(hours) * {"h": 3600, "min": 60}[unit] == pytest.approx(210_000 * float(measured[2].split()[0]), rel=0.1)
    assert measured[4] == projected[4] and measured[4].endswith("%")
    assert "side by side" not in found  # on a GPU only
    assert any("convolution" in row[1] for row in found["slowest operations"]) and len(found["slowest operations"]) == 10
    (released,) = found["an epoch's training"]
    assert released[1:3] == ["5 classes", "100.00 s"]
    assert float(released[4]) == pytest.approx(100 / float(released[3].split()[0]), rel=0.1)


def test_seconds_between_measured_numbers_of_classes_lie_on_a_line():
    measured = {5: 1.0, 50: 10.0, 100: 30.0}
    assert [bench.at(measured, classes) for classes in (5, 50, 75, 100)] == [1, 10, 20, 30]
    assert bench.at({2: 3.0}, 10) == 15
    assert [bench.duration(total) for total in (3, 600, 10_000)] == ["3.0 s", "10.0 min", "2.8 h"]


def test_bad_arguments_are_one_line(capsys, checkout, tmp_path):
    bad = (["--width", "0"], ["--turns", "many"], ["--device", "tpu"], ["--precisions", "fp8"], ["--batch-size", "0"], ["--classes", "101"])
    for arguments in (*bad, ["--released", str(tmp_path)]):
        assert run_script(bench.main, arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
    module = checkout / "lop" / "incremental_cifar" / "incremental_cifar_experiment.py"
    module.write_text("raise ImportError('no GPU here')")
    assert run_script(bench.main, [*SMALL, "--precisions", "fp32", "--released", str(checkout)]) == 2
    assert "the released code failed there (ImportError: no GPU here)" in capsys.readouterr().err
