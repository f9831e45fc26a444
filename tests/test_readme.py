"""What the README and the other pages say exists and works, and their tables are those of the code."""

import glob
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, TINY

from incremental_cifar.config import FIELDS, UserError, differing_keys, load_config
from incremental_cifar.learning_curves import METRICS

OWN = "gradient_clipping"  # the algorithm that docs/your_algorithm.md writes as an example
DOCS = REPOSITORY / "docs"
DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "RESULTS.md", REPOSITORY / "cfg" / "README.md", *sorted(DOCS.glob("*.md"))]
of_each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def test_the_readme_is_two_screens_long():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 110 and [line for line in lines if len(line) > 120] == []


@of_each_document
def test_links_and_files_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    files = re.findall(r"`([\w/]+\.(?:py|json|md|txt|sh|cff|csv))`", text)
    parts = REPOSITORY / "incremental_cifar"
    folders = (REPOSITORY, document.parent, parts, parts / "algorithms")
    missing = [name for name in {*links, *files} if not any((folder / name).exists() for folder in folders) and OWN not in name]
    assert missing == []


def test_every_page_is_found_from_the_readme():
    """By links, the pages' own among them."""
    found, todo = set(), [REPOSITORY / "README.md"]
    while todo:
        page = todo.pop().resolve()
        if page not in found and page.suffix == ".md" and page.exists():
            found.add(page)
            todo += [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())]
    assert found >= set(DOCUMENTS)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    mentioned = set(re.findall(r"(?:`|    )make ([a-z]+)", "".join(document.read_text() for document in DOCUMENTS)))
    assert {"demo", "test", "bench"} <= mentioned <= targets


def test_every_metric_has_its_row():
    rows = re.findall(r"^\| `(\w+)/index-K\.npy` \| ([\d,]+) \| (\w+) \| (.+) \|$", (DOCS / "files.md").read_text(), re.MULTILINE)
    expected = [(name, metric.length, metric.dtype, metric.meaning) for name, metric in METRICS.items()]
    assert [row for row in rows if row[0] in METRICS] == expected


@of_each_document
def test_documented_commands_are_valid(document, monkeypatch):
    """Each command in a block is one that its script understands; of a shell's loop, with the first of the values."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("bench.check_released", lambda checkout: None)  # the released code's, a PATH in the command
    text = document.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    (.*\.py\b.*)$", text, re.MULTILINE):
        for name, value in re.findall(r"for (\w+) in (\S+)", line):
            line = line.replace(f"${name}", value)
        words = shlex.split(line.partition(" do ")[2].partition(";")[0] if " do " in line else line, comments=True)
        assert words[0] == ".venv/bin/python", line
        if words[1] == "-m":  # mlproj-manager's runner
            continue
        arguments = [path for word in words[2:] for path in (glob.glob(word) if "*" in word else [word])]
        script = importlib.import_module(words[1].removesuffix(".py").replace("/", "."))
        if words[1] == "plots/export.py":
            monkeypatch.setattr(script, "results_table", lambda results_dir: next(iter(())))  # what follows the arguments
            with pytest.raises(StopIteration):
                script.main(arguments)
        elif arguments or words[1] != "plots/draw_all.py":
            script.parse_arguments(arguments)
    assert all((REPOSITORY / name).is_file() for name in re.findall(r"^    (runs/\S+)", text, re.MULTILINE))
    for overrides in re.findall(r"`--set ((?:[a-z_]+=[^\s`]+ ?)+)", text):
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
    rows = dict(re.findall(r"^\| (.+?) \|.* \| (.+?) \|$", (DOCS / "released_code.md").read_text(), re.MULTILINE))
    assert rows["`debug`"] == "accepted, without effect" and rows["keys that are not known"] == "refused"
    assert rows["`num_workers`"].endswith(f"default {FIELDS['num_workers'].default}") and rows["`noise_std: 0`, not `0.0`"] == "no noise"


def test_ones_own_algorithm_works_like_those_that_are_there(tmp_path):
    """Put where its page says: interrupted, recorded, analysed, drawn and explained, and the table of keys is made with it."""
    section = (DOCS / "your_algorithm.md").read_text()
    (own_file, field, switch), (config,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)[:3] for kind in ("python", "json"))
    copy = tmp_path / "repository"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "data", "results", "__pycache__"))

    def edit(name, before, text):
        path = copy / name
        assert path.read_text().count(before) == 1
        path.write_text(path.read_text().replace(before, text + before))

    (copy / "incremental_cifar/algorithms/gradient_clipping.py").write_text(own_file)
    edit("incremental_cifar/config.py", "\n    @property\n    def num_epochs(", field)
    edit("incremental_cifar/algorithms/__init__.py", "    return algorithms\n", switch)
    line = "from incremental_cifar.algorithms.gradient_clipping import GradientClipping\n"
    edit("incremental_cifar/algorithms/__init__.py", "from incremental_cifar.algorithms.task_reset import", line)
    (copy / "cfg/gradient_clipping.json").write_text(config)

    def python(*command, expected=0):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout

    python("-m", "pytest", "-q", "-n", "0", "-k", "gradient_clipping", "tests/test_cuda_graphs.py", "tests/test_experiment.py")
    assert "Gradient clipping. Longest gradient" in python("incremental_cifar_experiment.py", "--explain", "gradient_length")
    tiny = [f"{key}={value}" for key, value in TINY.items()]
    python("incremental_cifar_experiment.py", "--config", "cfg/gradient_clipping.json", "--set", *tiny)
    folder = copy / "results" / "gradient_clipping"
    python("post_run_analysis.py", "--results_dir", folder)
    assert np.load(folder / "clipped_steps_per_epoch/index-0.npy").min() > 0
    for metric in ("clipped_steps_per_epoch", "next_task_dormant_units_analysis"):
        python("plots/plot_incremental_cifar_results.py", "--results_dir", "results", "--metric", metric, "--output", f"{metric}.png")
        assert (copy / f"{metric}.png").stat().st_size > 5000
