"""What `make demo` shows, on its own settings: units fall dormant in the base system, and not with continual backpropagation."""

import re
import shlex
import subprocess

import numpy as np
import pytest
from conftest import REPOSITORY, STRESS


def demo_command(results_dir):
    """The command that `make demo` runs, as words, of index 0 of the two algorithms, with these results."""
    recipe = subprocess.run(["make", "-n", "demo", f"OUT={results_dir}"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    words = shlex.split(next(line for line in recipe.replace("\\\n", " ").splitlines() if "run_sweep.py" in line))
    words.remove("cfg/retrained_network.json")
    words[words.index("--indices") + 1] = "0"
    return words


def test_the_demo_has_both_algorithms_and_its_settings_are_a_small_scale(tmp_path):
    words = demo_command(tmp_path)
    assert {"cfg/base_deep_learning_system.json", "cfg/continual_backpropagation.json", "--analyse"} <= set(words)
    assert any(re.fullmatch(r"weight_decay=[\d.]+", word) for word in words) and f"results_dir={tmp_path}" in words


@pytest.mark.skipif(not STRESS, reason="two runs of 90 s: `make effect`")
def test_units_fall_dormant_in_the_base_system_and_not_with_continual_backpropagation(tmp_path):
    subprocess.run(["env", *demo_command(tmp_path)], cwd=REPOSITORY, check=True)
    dormant = {
        name: np.load(tmp_path / name / "next_task_dormant_units_analysis" / "index-0.npy")
        for name in ("base_deep_learning_system", "continual_backpropagation")
    }
    base, continual = dormant.values()
    assert (base[:3] < 0.02).all() and base[-1] > 0.2 and (np.diff(base[2:]) > 0).all(), dormant
    assert (continual < 0.1).all() and continual[-1] < base[-1] / 3, dormant
