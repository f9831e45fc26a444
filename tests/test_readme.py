"""What the README says exists, and its tables are those of the code."""

import re
import shlex

import pytest
from conftest import REPOSITORY

import incremental_cifar_experiment
from incremental_cifar.config import FIELDS, UserError, differing_keys, load_config
from incremental_cifar.learning_curves import METRICS

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "cfg" / "README.md"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_and_files_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    files = re.findall(r"`((?:incremental_cifar/|plots/|cfg/|tests/)?[\w/]+\.(?:py|json|md|txt))`", text)
    missing = [name for name in {*links, *files} if not any((folder / name).exists() for folder in (REPOSITORY, document.parent))]
    assert missing == []
    assert len(files) >= 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"(?:`|    )make ([a-z]+)", (REPOSITORY / "README.md").read_text()))
    assert {"demo", "test", "bench"} <= mentioned <= targets


def test_every_metric_has_its_row():
    rows = re.findall(r"^\| `(\w+)/index-K\.npy` \| ([\d,]+) \| (\w+) \| (.+) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    expected = [(name, metric.length, metric.dtype, metric.meaning) for name, metric in METRICS.items()]
    assert [row for row in rows if row[0] in METRICS] == expected


def test_commands_of_the_experiment_are_valid():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("    ") and "incremental_cifar_experiment.py --config" in line]
    assert commands != []
    for command in commands:
        words = shlex.split(command)
        config, indices, _ = incremental_cifar_experiment.parse_arguments(words[2:])
        assert indices == [0] and config.num_tasks == 20
    for overrides in re.findall(r"`--set ((?:[a-z_]+=[^\s`]+ ?)+)", (REPOSITORY / "README.md").read_text()):
        assert {word.partition("=")[0] for word in overrides.split()} <= set(FIELDS)


# The released code's settings (`IncrementalCIFARExperiment.__init__` and `main` there) and their defaults; None: it fails without them.
RELEASED = {
    "data_path": "",
    "results_dir": "",
    "experiment_name": None,
    "num_workers": 1,
    "debug": True,
    "stepsize": None,
    "weight_decay": None,
    "momentum": None,
    "noise_std": 0.0,
    "use_cbp": False,
    "replacement_rate": 0.0,
    "utility_function": "weight",
    "maturity_threshold": 0,
    "reset_head": False,
    "reset_network": False,
    "early_stopping": False,
}


def test_released_keys_have_the_released_defaults_but_for_those_named():
    assert set(RELEASED) <= set(FIELDS)
    sentence = re.search(r"but for these: (.+?)\n\n", (REPOSITORY / "cfg" / "README.md").read_text(), re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == {key for key, default in RELEASED.items() if FIELDS[key].default != default}


def test_settings_are_read_as_the_table_of_differences_says(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("{}")
    plain = load_config(path)
    assert (plain.stepsize, plain.weight_decay, plain.momentum, plain.experiment_name) == (0.1, 0.0005, 0.9, "mine")
    assert load_config(path, ["noise_std=0"]) == plain
    path.write_text('{"debug": false, "num_workers": 12, "noise_std": 0}')
    assert differing_keys(plain, load_config(path)) == differing_keys(plain, load_config(path, ["debug=true"])) == []
    path.write_text('{"debugging": false}')
    with pytest.raises(UserError, match='unknown key "debugging"; did you mean "debug"'):
        load_config(path)
    text = (REPOSITORY / "README.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \|.* \| (.+?) \|$", text.partition("## Differences")[2].partition("\n## ")[0], re.MULTILINE))
    assert rows["`debug`"] == "accepted, without effect" and rows["keys that are not known"] == "refused"
    assert rows["`num_workers`"].endswith(f"default {FIELDS['num_workers'].default}") and rows["`noise_std: 0`, not `0.0`"] == "no noise"
