"""What the scripts have in common: texts of --experiment-index, users without a name."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY
from tqdm import tqdm

from incremental_cifar.command_line import parse_indices, warn
from incremental_cifar.config import UserError


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        (" 4 - 5, 2-4,3", [2, 3, 4, 5]),
        ("99999", [99_999]),
        (",".join(["0-99999"] * 10_000), list(range(100_000))),  # in no time
    ],
    ids=lambda value: str(value)[:20],
)
def test_indices_are_sorted_and_without_repeats(text, indices):
    assert parse_indices(text) == indices


@pytest.mark.parametrize(
    "text",
    ["", "first", "-1", "3-1", "1-2-3", "100000", "0-100000", "0,", "1.5", "\u0663", "0\n1", "9" * 10_000],
    ids=lambda text: text[:10],
)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(UserError) as caught:
        parse_indices(text)
    message = str(caught.value)
    assert message.startswith("--experiment-index: got ") and "from 0 to 99999" in message and len(message) < 200


@pytest.mark.parametrize("script", ["incremental_cifar_experiment.py", "plots/plot_paper_figure.py"])
def test_a_user_without_a_name_and_a_home_can_start_the_scripts(script):
    """A number without an entry in /etc/passwd, as with `docker run --user 12345`."""
    nameless = ["unshare", "--user", "--map-user=12345"]
    if shutil.which("unshare") is None or subprocess.run([*nameless, "true"], capture_output=True).returncode != 0:
        pytest.skip("cannot become another user here")
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME")}
    command = [*nameless, sys.executable, str(REPOSITORY / script), "--help"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert completed.returncode == 0 and completed.stdout.startswith("usage: "), completed.stderr


def test_a_warning_has_a_line_of_its_own_above_a_bar(capsys):
    with tqdm(total=2) as bar:
        bar.update()
        warn("it rains")
    assert re.search(r"%.*[\r\n]warning: it rains\n.*50%", capsys.readouterr().err, re.DOTALL)
