import json
import subprocess
import sys

import pytest
import torch
from conftest import ALGORITHMS, GPU, REPOSITORY

import bench
import incremental_cifar_experiment
from incremental_cifar import cuda_graphs
from incremental_cifar.command_line import run_script
from incremental_cifar.cuda_graphs import Recorded

BASE, CBP = "base_deep_learning_system", "continual_backpropagation"
SMALL = ["--device", "cpu", "--width", "1", "--batch-size", "45", "--turns", "1"]
ONE = ["--configs", str(REPOSITORY / "cfg" / f"{CBP}.json")]  # beside the base system

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
    assert f"{threads} threads, PyTorch {torch.__version__}" in output.splitlines()[0]
    assert "width 1, batch 45, fp32: peak memory of a run " in output.splitlines()[0]
    found = tables(output)
    rows = found["variant"]
    assert [row[1] for row in rows] == ["bare loop", *ALGORITHMS]
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
    ((_, evaluated, plain, folded, faster),) = found["evaluation of"]
    assert evaluated == "1 class" and plain == measured[3]
    assert float(faster) == pytest.approx(float(plain.split()[0]) / float(folded.split()[0]), rel=0.2)
    assert "side by side" not in found  # on a GPU only
    operators = {row[1]: int(row[2].replace(",", "")) for row in found["step of"]}
    assert list(operators) == ["bare loop", *ALGORITHMS]
    assert 500 < operators["base_deep_learning_system"] == operators["head_resetting"] < operators["continual_backpropagation"]
    assert any("convolution" in row[1] for row in found["slowest operations"]) and len(found["slowest operations"]) == 10
    (released,) = found["an epoch's training"]
    assert released[1:3] == ["5 classes", "100.00 s"]
    assert float(released[4]) == pytest.approx(100 / float(released[3].split()[0]), rel=0.1)


def test_a_name_with_a_line_in_it_is_no_column_more():
    table = bench.markdown_table(("precision", "variant", "ms"), [("fp32", "a|b", "1.00"), ("fp32", "base", "2.00")]).splitlines()
    assert "a\\|b" in table[2] and len({len(line) for line in table}) == 1
    assert {line.replace("a\\|b", "").count("|") for line in table} == {4}


def test_seconds_between_measured_numbers_of_classes_lie_on_a_line():
    measured = {5: 1.0, 50: 10.0, 100: 30.0}
    assert [bench.at(measured, classes) for classes in (5, 50, 75, 100)] == [1, 10, 20, 30]
    assert bench.at({2: 3.0}, 10) == 15
    assert [bench.duration(total) for total in (3, 600, 10_000)] == ["3.0 s", "10.0 min", "2.8 h"]


def test_bad_arguments_are_one_line(capsys, checkout, tmp_path):
    bad = (["--width", "0"], ["--turns", "many"], ["--device", "tpu"], ["--precisions", "fp8"], ["--batch-size", "0"], ["--classes", "101"])
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({"experiment_name": CBP}))
    for arguments in (*bad, ["--released", str(tmp_path)], [*ONE, str(tmp_path / "mine.json")], [*ONE, str(copy)]):
        assert run_script(bench.main, arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
    module = checkout / "lop" / "incremental_cifar" / "incremental_cifar_experiment.py"
    module.write_text("raise ImportError('no GPU here')")
    assert run_script(bench.main, [*SMALL, "--precisions", "fp32", "--released", str(checkout)]) == 2
    assert "the released code failed there (ImportError: no GPU here)" in capsys.readouterr().err


@pytest.fixture
def imagined_gpu(monkeypatch):
    """From here on, this CPU passes for a GPU, of few and small classes; what is given records a function."""

    def use(record):
        monkeypatch.setattr(bench, "is_gpu", lambda device: True)
        monkeypatch.setattr(incremental_cifar_experiment, "has_graphs", lambda device: True)
        monkeypatch.setattr(Recorded.__init__, "__defaults__", (record,))
        monkeypatch.setattr(Recorded, "first_failure", None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2**30)
        monkeypatch.setattr(bench, "IMAGES_PER_CLASS", 9, raising=False)
        monkeypatch.setattr(bench, "CLASSES_OF_EPOCHS", (1, 2), raising=False)

    return use


def test_on_a_gpu_there_are_more_rows_and_several_runs_side_by_side(imagined_gpu, capsys):
    imagined_gpu(lambda function, device: (function, function()))
    assert run_script(bench.main, [*SMALL, *ONE, "--batch-size", "9", "--classes", "2", "--precisions", "bf16", "--profile"]) == 0
    output, errors = capsys.readouterr()
    assert errors.splitlines() == ["warning: the profiler saw no kernels; it may lack the permission to"] and "not recorded" not in output
    assert f"CUDA {torch.version.cuda}" in output and "one run has the GPU reserve 1.00 GiB" in output.splitlines()[0]
    found = tables(output)
    steps = ["bare loop", BASE, CBP, "base, cuda_graphs=false", "base, deterministic=false"]
    assert [row[1] for row in found["variant"]] == [row[1] for row in found["step of"]] == steps
    assert [row[1] for row in found["evaluation of"]] == ["1 class", "2 classes"]
    assert [row[1] for row in found["side by side"]] == ["1 run", "2 runs", "3 runs", "4 runs", "6 runs"]
    for count, row in zip((1, 2, 3, 4, 6), found["side by side"], strict=True):
        assert float(row[3]) == pytest.approx(
            float(row[2].replace(",", "")) / float(found["side by side"][0][2].replace(",", "")), abs=0.02
        )
        assert 0.1 < float(row[3]) <= count + 0.5
    assert torch.are_deterministic_algorithms_enabled()  # the row without determinism is not the others' setting


def test_a_row_whose_recording_failed_says_so(imagined_gpu, capsys):
    """The step of the first run is recorded, its evaluation cannot be, and after that nothing can."""
    recorded = []

    def refuse_the_second(function, device):
        if recorded:
            raise cuda_graphs.CaptureError("operation not permitted")
        recorded.append(function)
        return function, function()

    imagined_gpu(refuse_the_second)
    assert run_script(bench.main, [*SMALL, *ONE, "--batch-size", "9", "--classes", "2", "--precisions", "fp32"]) == 0
    output, errors = capsys.readouterr()
    assert "the bare loop cannot be recorded as a CUDA graph (operation not permitted)" in errors
    found = tables(output)
    neither = " (step and evaluation not recorded)"
    expected = ["bare loop (not recorded)", f"{BASE} (evaluation not recorded)", CBP + neither]
    expected += ["base, cuda_graphs=false", "base, deterministic=false" + neither]
    assert [row[1] for row in found["variant"]] == [row[1] for row in found["step of"]] == expected
    assert all(row[1].endswith(neither) for heading in ("evaluation of", "side by side") for row in found[heading])
    assert [row[1].endswith(neither) for row in found["epoch or run"]] == [True, True, False]


@pytest.mark.parametrize(("ended", "status"), [((0, 0), 0), ((2, 0), 2), ((0, -9), 137)])
def test_each_precision_is_measured_in_a_process_of_its_own(ended, status, monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, ended[len(commands) - 1])

    monkeypatch.setattr(subprocess, "run", run)
    assert run_script(bench.main, [*SMALL, "--profile", "--precisions", "fp32", "bf16"]) == status
    assert [command[-2:] for command in commands] == [["--precisions", "fp32"], ["--precisions", "bf16"]]
    for command in commands:
        parsed = bench.parse_arguments(command[2:])
        assert parsed.profile and parsed.width == 1 and len(parsed.precisions) == 1


def test_a_full_memory_is_one_line_below_the_tables_so_far(monkeypatch, capsys, tmp_path):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    monkeypatch.setattr(bench.Bench, "epochs", fail)
    mine = tmp_path / "mine.json"
    mine.write_text('{"noise_std": 0.001}')
    assert run_script(bench.main, [*SMALL, "--configs", str(mine), "--precisions", "fp32"]) == 2
    output, errors = capsys.readouterr()
    assert [row[1] for row in tables(output)["variant"]] == ["bare loop", BASE, "mine"]
    assert errors.startswith("error: the GPU's memory is full (CUDA out of memory. Tried to allocate)") and errors.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [["--precisions", "tf32", "bf16", "--profile", "--released"], ["--precisions", "bf16", "--compile"]], ids=" ".join
)
def test_on_a_gpu_every_option_of_the_bench_works(options, checkout):
    """In a process of its own, as a user would. In none of its rows may a recording have failed."""
    if "--released" in options:
        options = [*options, str(checkout), "--data-path", "data"]
    command = [sys.executable, str(REPOSITORY / "bench.py"), "--device", str(GPU), "--width", "8", "--batch-size", "45", "--classes", "2"]
    command += [*ONE, "--turns", "1", *options]
    benched = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert benched.returncode == 0, benched.stderr
    warnings = [line for line in benched.stderr.splitlines() if line.startswith("warning: ") and "--profile" not in line]
    assert warnings == []
    found = tables(benched.stdout)
    variants = [row[1] for row in found["variant"]]
    assert {"bare loop", BASE, CBP} <= set(variants) and all(float(row[2]) > 0 for row in found["variant"])
    assert {row[0] for row in found["variant"]} == {"tf32", "bf16"} & set(options)
    assert "--compile" not in options or any("compile" in name for name in variants)
    assert {"epoch or run", "side by side"} <= found.keys()
    assert "--released" not in options or len(found["an epoch's training"]) == 1  # the released code has no bf16
    assert "--profile" not in options or found["slowest operations"] != [] or "the profiler saw no kernels" in benched.stderr
