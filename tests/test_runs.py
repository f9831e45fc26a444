"""The scripts in runs/: what they call, and one of them from nothing to figures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY

import run_sweep
from plots import compare_with_paper
from plots.ledger import BEGIN, END
from plots.run_results import ALGORITHM_LABELS


def run(script: str, *arguments: object, status: int = 0, **environment: object) -> str:
    """Run one of the scripts, which must end with this status; return what it printed, or where that is not 0, as an error."""
    variables = {key: value for key, value in os.environ.items() if key not in ("INDICES", "RESULTS", "CONFIGS", "LEDGER", "VENV")}
    command = [str(REPOSITORY / "runs" / script), *map(str, arguments)]
    variables |= {key: str(value) for key, value in environment.items()}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture
def calls(tmp_path):
    """Run a script with a Python that only says what it is called with; return those arguments, of each call, by the called script."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\nprintf "%s\\n" "$@" ""\n')
    python.chmod(0o755)

    def calls(script: str, *arguments: object, **environment: object) -> dict[str, list[str]]:
        said = run(script, *arguments, VENV=tmp_path, **environment)
        return {Path(lines[1]).name: [lines[0], *lines[2:]] for call in said.strip().split("\n\n") if (lines := call.split("\n"))}

    return calls


def test_the_papers_runs_are_its_algorithms_with_its_indices(calls):
    called = calls("paper.sh", "--set", "precision=bf16")
    sweep = run_sweep.parse_arguments(called["run_sweep.py"][1:])
    assert {Path(path).stem for path in sweep.configs} == set(ALGORITHM_LABELS) and sweep.indices == list(range(15)) and sweep.analyse
    assert sweep.overrides == [f"results_dir={REPOSITORY / 'results'}", "precision=bf16"]
    compared = compare_with_paper.parse_arguments(called["compare_with_paper.py"][1:])
    assert compared.ledger == REPOSITORY / "RESULTS.md" and compared.output_dir == REPOSITORY / "results" / "figures"
    assert list(calls("paper.sh", "--slurm", "partition=gpu", INDICES=3)) == ["run_sweep.py"]  # submitted, not finished


def test_the_small_runs_are_those_of_its_configs(calls, tmp_path):
    threads, *arguments = calls("small.sh", "--retries", "0", CONFIGS="a.json b.json", RESULTS=tmp_path)["run_sweep.py"]
    sweep = run_sweep.parse_arguments(arguments)
    assert (sweep.configs, sweep.indices, sweep.retries, threads) == (["a.json", "b.json"], [3, 4, 5], 0, "threads 1")
    assert sweep.overrides == [f"results_dir={tmp_path}"]
    default = run_sweep.parse_arguments(calls("small.sh", INDICES="7")["run_sweep.py"][1:])
    assert {Path(path).parent for path in default.configs} == {REPOSITORY / "cfg" / "small"} and default.indices == [7]


def test_patterns_of_configs_are_put_in(calls):
    arguments = calls("small.sh", CONFIGS=f"{REPOSITORY}/cfg/small/*_network.json")["run_sweep.py"][1:]
    assert run_sweep.parse_arguments(arguments).configs == [f"{REPOSITORY}/cfg/small/retrained_network.json"]


@pytest.mark.parametrize(("script", "variable"), [("paper.sh", "LEDGER"), ("paper.sh", "VENV"), ("small.sh", "VENV")])
def test_what_a_script_lacks_is_one_line_before_any_work(script, variable, tmp_path):
    error = run(script, "--dry-run", status=2, **{"VENV": sys.prefix, variable: tmp_path / "nowhere"})
    assert error.startswith("error: ") and error.count("\n") == 1 and "nowhere" in error and variable in error


def test_from_nothing_to_figures(tmp_path):
    """The paper's script on one algorithm at a tiny size, of which there is nothing to compare."""
    ledger, results = tmp_path / "RESULTS.md", tmp_path / "results"
    ledger.write_text(BEGIN + END)
    tiny = [f"{key}={value}" for key, value in (TINY | {"num_tasks": 2, "network_width": 1}).items()]
    configs = ["--configs", REPOSITORY / "cfg" / "continual_backpropagation.json"]
    said = run("paper.sh", *configs, "--set", *tiny, INDICES=0, RESULTS=results, LEDGER=ledger, VENV=sys.prefix)
    assert "Nothing compared: no run of the paper's experiment here" in said and ledger.read_text() == BEGIN + END
    assert (results / "figures" / "paper_figure.png").exists()
    assert (results / "continual_backpropagation" / "analysis_settings" / "index-0.json").exists()
