"""What the README says exists, and its tables are those of the code."""

import re
import shlex

import pytest
from conftest import REPOSITORY

import incremental_cifar_experiment
from incremental_cifar.config import FIELDS
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
