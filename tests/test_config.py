import json
import shutil

import pytest
from conftest import ALGORITHMS, REFERENCE, REPOSITORY

import incremental_cifar_experiment
from incremental_cifar import explain
from incremental_cifar.command_line import run_script
from incremental_cifar.config import (
    FIELDS,
    METHODS,
    Config,
    UserError,
    differing_keys,
    grid_points,
    load_config,
    make_config,
    overrides_of,
    read_sizes,
    settled,
)
from incremental_cifar.explain import BEGIN, END, README, table
from incremental_cifar.run_files import RunFiles, Runs

PAPER = {"stepsize": 0.1, "weight_decay": 0.0005, "momentum": 0.9, "early_stopping": True}
EXPECTED = {
    "base_deep_learning_system": {},
    "continual_backpropagation": {
        "use_cbp": True,
        "replacement_rate": 1e-5,
        "utility_function": "contribution",
        "maturity_threshold": 1000,
    },
    "head_resetting": {"reset_head": True},
    "retrained_network": {"reset_network": True},
    "shrink_and_perturb": {"noise_std": 1e-5},
    "selective_weight_reinitialization": {"reinit_freq": 128, "reinit_factor": 0.0005},
    "l2_init": {"l2_init": 0.0005, "weight_decay": 0.0, "decay_batch_norm": False},
    "upgd": {"use_upgd": True, "momentum": 0.0},
    "soft_reset": {"soft_reset": 0.8},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_config_file_loads_and_names_its_own_experiment(algorithm):
    assert load_config(REPOSITORY / "cfg" / f"{algorithm}.json").experiment_name == algorithm


@pytest.mark.parametrize("algorithm", EXPECTED)
def test_each_config_is_its_algorithm_at_the_papers_settings(algorithm):
    config = load_config(REPOSITORY / "cfg" / f"{algorithm}.json")
    default = Config(
        experiment_name=algorithm,
        data_path=str(REPOSITORY / "data"),
        results_dir=str(REPOSITORY / "results"),
        **PAPER | EXPECTED[algorithm],
    )
    assert config == default
    assert (config.num_tasks, config.classes_per_task, config.epochs_per_task, config.batch_size) == (20, 5, 200, 90)
    assert config.steps_before(config.num_epochs) == 1_050_000 and config.num_epochs == 4000
    assert config.epochs_per_checkpoint == 200


def test_the_readmes_table_is_that_of_the_fields():
    assert README.read_text().partition(BEGIN)[2].partition(END)[0] == table(), "make docs writes it"
    assert {line.count(" | ") for line in table().splitlines()} == {3}


# What stands in the file before, {} being an outdated table; whether it can be written.
READMES = {
    "as it is": (f"# Keys\n{BEGIN}{{}}{END}And so on: é\n", True),
    "end edited": (f"# Keys\n{BEGIN}{{}}<!-- end of the keys -->\nAnd so on\n", False),
    "beginning edited": (f"# Keys\n<!-- the keys -->\n{{}}{END}And so on\n", False),
    "two beginnings": (f"{BEGIN}{BEGIN}{{}}{END}", False),
    "two ends": (f"{BEGIN}{{}}{END}And so on\n{END}", False),
    "other order": (f"{END}{{}}{BEGIN}", False),
    "not there": (None, False),
}


@pytest.mark.parametrize("case", READMES)
def test_the_table_is_written_between_its_two_lines_or_not_at_all(case, tmp_path, monkeypatch, capsys):
    text, is_written = READMES[case]
    readme = tmp_path / "README.md"
    monkeypatch.setattr(explain, "README", readme)
    if text is not None:
        readme.write_bytes(text.format("| outdated |\n").encode())
    status = run_script(explain.main, [])
    error = capsys.readouterr().err
    if is_written:
        assert status == 0 and error == "" and readme.read_bytes() == text.format(table()).encode()
        return
    assert status == 2 and error.startswith(f"error: {readme}: ") and error.count("\n") == 1
    assert text is None or (
        readme.read_bytes() == text.format("| outdated |\n").encode() and BEGIN.strip() in error and END.strip() in error
    )


@pytest.mark.parametrize("key", FIELDS)
def test_a_field_says_what_is_true(key):
    facts = FIELDS[key].metadata
    assert facts.keys() <= {"help", "rule", "unit", "method", "paper", "of", "size", "free"} and facts["help"].endswith(".")
    assert facts.get("of", "use_cbp") in METHODS.values()
    assert getattr(make_config({key: FIELDS[key].default}, "default"), key) == (
        FIELDS[key].default or getattr(make_config({}, "none"), key)
    )
    assert "method" not in facts or not FIELDS[key].default


def explained(capsys, *keys) -> list[str]:
    with pytest.raises(SystemExit) as ended:
        run_script(incremental_cifar_experiment.main, ["--explain", *keys])
    assert ended.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (
            ["maturity_threshold"],
            [
                "maturity_threshold: integer, steps, 0 or more, only with use_cbp; default 0",
                "    Time after its reset (or the start) in which a unit cannot be reset; not 0.",
            ],
        ),
        (
            ["l2_init", "combine"],
            [
                "l2_init: number, 0 or more; default 0.0",
                "    L2 Init. L2 penalty on the distance to the initial parameters; 0: none.",
                "combine: true or false, free; default false",
                "    Allow methods at once of which not all are the paper's.",
            ],
        ),
    ],
)
def test_settings_are_explained_without_a_config(capsys, keys, lines):
    assert explained(capsys, *keys) == lines


def test_all_settings_are_explained(capsys):
    assert [line.partition(":")[0] for line in explained(capsys, "all")[::2]] == list(FIELDS)


SWR = {"reinit_freq": 128, "reinit_factor": 0.0005}
CBP = EXPECTED["continual_backpropagation"]


@pytest.mark.parametrize(
    ("settings", "methods"),
    [
        ({}, []),
        ({"reset_network": True, "reset_head": True}, ["Retrained network"]),
        ({"reset_head": True, **CBP, "noise_std": 1e-5}, ["Shrink and perturb", "Continual backpropagation", "Head resetting"]),
        ({"weight_decay": 0, "decay_batch_norm": False, "l2_init": 0.001}, ["L2 Init"]),
        ({"redo_reinit_frequency": 1000}, ["ReDo"]),
        ({"use_snr": True}, ["Self-normalized resets"]),
        ({"use_upgd": True, "momentum": 0, "soft_reset": 0.8, "combine": True}, ["UPGD", "Soft reset"]),
        (
            {"reset_network": True, "fire_iterations": 10, **SWR, "combine": True},
            ["Retrained network", "Selective weight reinitialization", "FIRE"],
        ),
    ],
)
def test_methods_that_are_on(settings, methods):
    config = make_config(settings, "test")
    assert config.methods == methods
    assert differing_keys(config, make_config(settings | {"combine": True}, "test")) == []


def test_what_was_stored_before_other_methods_existed_is_the_same_as_ever(tmp_path):
    stored = json.loads((REFERENCE / "stored_config.json").read_text())
    assert "use_cbp" in stored and {"combine", "l2_init", "use_upgd"}.isdisjoint(stored)
    folder = tmp_path / "continual_backpropagation"
    (folder / "config_files").mkdir(parents=True)
    shutil.copy(REFERENCE / "stored_config.json", folder / "config_files" / "index-0.json")
    source = str(REPOSITORY / "cfg" / "continual_backpropagation.json")
    before, now = RunFiles(folder, 0).load_config(), settled(load_config(source, ["data_path=/data", "results_dir=/results"]), None, False)
    assert before == now and differing_keys(before, now) == []

    overrides = [f"results_dir={tmp_path}"]
    Runs(source, load_config(source, overrides), (0,)).check()
    with pytest.raises(UserError, match=r"l2_init \(0\.0 there, 0\.1 here\)"):
        Runs(source, load_config(source, [*overrides, "l2_init=0.1", "combine=true"]), (0,)).check()


def test_a_config_in_the_released_form_loads_unchanged(tmp_path):
    """Keys, values and comments as in the released cfg/continual_backpropagation.json."""
    path = tmp_path / "mine.json"
    keys = {"data_path": "", "results_dir": "", "experiment_name": "continual_backpropagation", "num_workers": 12}
    settings = {"_model_description_": "a comment", **keys, **PAPER, "noise_std": 0.0, "_comment_4_": "another"}
    settings |= EXPECTED["continual_backpropagation"] | {"reset_head": False, "reset_network": False}
    path.write_text(json.dumps(settings))
    config = load_config(path)
    assert config.num_workers == 12 and config.use_cbp and config.experiment_name == "continual_backpropagation"
    path.write_text("{}", encoding="utf-8-sig")
    assert load_config(path).experiment_name == "mine"


def test_sizes_are_read_from_any_stored_config(tmp_path):
    path = tmp_path / "config_files" / "index-0.json"
    assert read_sizes(path) == (make_config({}, "the paper"), set())
    path.parent.mkdir()
    path.write_text(json.dumps({"num_tasks": 3, "network_width": 64, "stepsize": "unused", "current_epoch": 200}))
    sizes, keys = read_sizes(path)
    assert (sizes.num_tasks, sizes.epochs_per_task, sizes.stepsize, keys) == (3, 200, 0.1, {"num_tasks", "network_width"})


def test_overrides_are_typed_and_win(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"stepsize": 0.5}')
    overrides = ["stepsize=1e-2", "early_stopping=true", "device=cpu", "num_tasks=3", "experiment_name=12", "results_dir=r=1"]
    config = load_config(path, overrides)
    assert (config.stepsize, config.early_stopping, config.device, config.num_tasks) == (0.01, True, "cpu", 3)
    assert config.experiment_name == "12" and config.results_dir.endswith("r=1")
    path.write_text('{"stepsize": 1}')
    assert type(load_config(path).stepsize) is float


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stepsize=.1", 0.1),
        ("stepsize=1.e-2", 0.01),
        ("stepsize=+0.1", 0.1),
        ("weight_decay=00.5", 0.5),
        ("num_tasks=+3", 3),
        ("num_tasks=03", 3),
        ("num_tasks=3.0", 3),
        ("maturity_threshold=1e3", 1000),
    ],
)
def test_numbers_on_the_command_line_are_what_python_takes_for_numbers(tmp_path, override, expected):
    (tmp_path / "c.json").write_text("{}")
    key = override.partition("=")[0]
    value = getattr(load_config(tmp_path / "c.json", [override]), key)
    assert value == expected and type(value) is FIELDS[key].type
    ((point,),) = grid_points([override])
    assert getattr(load_config(tmp_path / "c.json", [point]), key) == expected


def test_a_whole_number_is_an_integer_in_a_file_too():
    assert type(make_config({"num_tasks": 3.0}, "test").num_tasks) is int


def config_with(folder, file=None, overrides=()):
    (folder / "c.json").write_text(json.dumps(file or {}))
    return load_config(folder / "c.json", overrides)


@pytest.mark.parametrize("text", ["$SCRATCH/results", "${SCRATCH}/results", "/$NOT_HERE/../$SCRATCH/results", "~/../$SCRATCH/results"])
@pytest.mark.parametrize("key", ["results_dir", "data_path"])
def test_environment_variables_are_put_into_folders(tmp_path, monkeypatch, key, text):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("NOT_HERE", "x")
    monkeypatch.chdir(tmp_path)
    assert getattr(config_with(tmp_path, {key: text}), key) == f"{tmp_path}/results"
    assert getattr(config_with(tmp_path, {key: "$UNUSED"}, [f"{key}={text}"]), key) == f"{tmp_path}/results"


def test_a_folder_whose_name_has_a_dollar_can_be_used(tmp_path, monkeypatch):
    """And variables are put in once, whatever they hold: a completed config can be completed again, as is done with stored ones."""
    folder = tmp_path / "$SCRATCH" / "a$b c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SCRATCH", "/elsewhere")
    config = config_with(folder, {"results_dir": "c$/results", "data_path": "$SCRATCH/data"})
    assert config.results_dir == f"{folder}/c$/results" and config.data_path == "/elsewhere/data"
    (folder / "c$" / "results").mkdir(parents=True)
    assert load_config(REPOSITORY / "cfg" / "head_resetting.json", overrides_of(config)) == config  # as a sweep starts its runs
    monkeypatch.setenv("HOME", "/of/$SCRATCH")
    monkeypatch.setenv("PLACE", "/its/$SCRATCH")
    config = config_with(folder, {"results_dir": "~/results", "data_path": "$PLACE/data"})
    assert (config.results_dir, config.data_path) == ("/of/$SCRATCH/results", "/its/$SCRATCH/data")
    assert make_config(config.to_dict(), "test") == config  # as a stored one
    assert incremental_cifar_experiment.IncrementalCIFARExperiment(config, str(folder / "run"), 0).config.data_path == config.data_path


def test_numbers_of_steps_with_a_last_smaller_batch():
    config = make_config(
        {"num_tasks": 3, "classes_per_task": 2, "epochs_per_task": 4, "train_images_per_class": 7, "batch_size": 10}, "test"
    )
    assert [config.steps_per_epoch(task) for task in range(3)] == [2, 3, 5]
    assert [config.steps_before(epoch) for epoch in (0, 1, 4, 5, 11, 12)] == [0, 2, 8, 11, 35, 40]


def test_only_keys_that_can_change_results_count_as_different():
    stored = make_config({}, "test")
    assert (
        differing_keys(stored, make_config({"data_path": "x", "num_workers": 3, "checkpoint_save_frequency": 7, "device": "cpu"}, "t"))
        == []
    )
    assert differing_keys(stored, make_config({"stepsize": 0.2, "precision": "fp32"}, "t")) == ["stepsize", "precision"]


SYNTHETIC = '"dataset": "synthetic"'
BAD_CONFIGS = {
    "unknown key": ('{"step_size": 0.1}', 'unknown key "step_size"; did you mean "stepsize"?'),
    "text for a number": ('{"stepsize": "fast"}', 'stepsize is "fast"; it must be a number, greater than 0'),
    "negative": ('{"stepsize": -0.1}', "stepsize is -0.1; it must be a number, greater than 0"),
    "variable not set": ('{"data_path": "$NOT_HERE/data"}', 'data_path is "$NOT_HERE/data"; the environment variable NOT_HERE is not set'),
    "fraction for an integer": ('{"num_tasks": 2.5}', "num_tasks is 2.5; it must be an integer, from 1 to 100"),
    "number for a boolean": ('{"use_cbp": 1}', "use_cbp is 1; it must be true or false"),
    "boolean for a number": ('{"momentum": true}', "momentum is true; it must be a number, from 0 to below 1"),
    "null": ('{"noise_std": null}', "noise_std is null; it must be a number, 0 or more"),
    "list": ('{"device": ["cpu"]}', 'device is ["cpu"]; it must be a string'),
    "no such choice": ('{"utility_function": "age"}', 'one of "weight", "contribution"'),
    "no such device": ('{"device": "gpu"}', '"auto", "cpu", "cuda" or "cuda:N"'),
    "not finite": ('{"weight_decay": Infinity}', "and finite"),
    "not a number": ('{"weight_decay": NaN}', "and finite"),
    "too large a number": ('{"stepsize": 1' + "0" * 400 + "}", "and finite"),
    "beyond single precision": ('{"stepsize": 1e39}', "and finite in single precision"),
    "too many epochs": ('{"epochs_per_task": 10000000000}', "from 1 to 100000"),
    "lone surrogate": ('{"experiment_name": "\\ud800"}', "Unicode text"),
    "name too long": ('{"experiment_name": "' + "é" * 150 + '"}', "at most 200 bytes"),
    "an integer of more than 64 bits": ('{"snr_update_frequency": 1e300}', "it must be an integer, 1 or more, and fit into 64 bits"),
    "too many classes": ('{"num_tasks": 21}', "num_tasks 21 x classes_per_task 5 is 105 classes; CIFAR-100 has 100"),
    "too many images": ('{"train_images_per_class": 460}', "is 510; a class has 500 training images"),
    "no rate": ('{"use_cbp": true, "maturity_threshold": 5}', "use_cbp is true but replacement_rate is 0"),
    "no maturity": ('{"use_cbp": true, "replacement_rate": 0.1}', "use_cbp is true but maturity_threshold is 0"),
    "no factor": ('{"reinit_freq": 128}', "reinit_freq is 128 but reinit_factor is 0; it must be greater than 0"),
    "more than all": (
        '{"reinit_freq": 9, "reinit_factor": 1.5, "pruning_method": "proportional"}',
        'pruning_method is "proportional" but reinit_factor is 1.5; it must be at most 1',
    ),
    "no such utility": ('{"swr_utility": "contribution"}', 'one of "gradient", "magnitude"'),
    "UPGD with momentum": ('{"use_upgd": true}', "use_upgd is true but momentum is 0.9; it must be 0"),
    "quantile of 0": ('{"snr_percentile": 0}', "snr_percentile is 0; it must be a number, greater than 0, and at most 1"),
    "first above largest": (
        '{"use_snr": true, "snr_first_threshold": 300}',
        "snr_first_threshold is 300 but snr_max_threshold is 222; it must be 300 or more",
    ),
    "too many iterations": ('{"fire_iterations": 101}', "fire_iterations is 101; it must be an integer, from 0 to 100"),
    "more than back": ('{"soft_reset": 1.1}', "soft_reset is 1.1; it must be a number, from 0 to 1"),
    "two methods": (
        '{"l2_init": 0.1, "noise_std": 1e-5}',
        "Shrink and perturb (noise_std) and L2 Init (l2_init) are on at once; turn all but one off, or set combine to true",
    ),
    "three methods": (
        '{"redo_reinit_frequency": 9, "reset_network": true, "reset_head": true, "soft_reset": 1}',
        "Retrained network (reset_network) and ReDo (redo_reinit_frequency) and Soft reset (soft_reset) are on at once",
    ),
    "name with a folder": ('{"experiment_name": "../../etc"}', "the name of one folder"),
    "key twice": ('{"stepsize": 0.1, "stepsize": 0.2}', 'key "stepsize" appears twice'),
    "not JSON": ('{"stepsize": 0.1,}', "not valid JSON"),
    "not an object": ("[1, 2]", "expected a JSON object of keys and values, found a list"),
    "empty": ("", "not valid JSON"),
    "binary": ("\udcff\udcfe", "not a JSON text file"),
    "deeply nested": ("[" * 100_000, "not a JSON text file"),
}


def refused(capsys, arguments) -> str:
    """The one line with which the script refuses these arguments."""
    status = run_script(incremental_cifar_experiment.main, arguments)
    output = capsys.readouterr()
    assert status == 2 and output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_one_line_and_writes_nothing(case, tmp_path, capsys):
    text, message = BAD_CONFIGS[case]
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    arguments = ["--config", str(path), "--set", f"results_dir={tmp_path / 'results'}"]
    line = refused(capsys, arguments)
    assert message in line and str(path) in line
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


BAD_COMMAND_LINES = {
    "no config": ([], "--config"),
    "no such config": (["--config", "nowhere.json"], "nowhere.json: cannot read this config file"),
    "a folder": (["--config", "."], "cannot read this config file"),
    "index with letters": (["--config", "c.json", "--experiment-index", "one"], '--experiment-index: got "one"; it must be'),
    "negative index": (["--config", "c.json", "--experiment-index", "-1"], "an integer from 0 to 99999"),
    "index too large": (["--config", "c.json", "--experiment-index", "100000"], "an integer from 0 to 99999"),
    "unknown argument": (["--config", "c.json", "--fast"], "--fast"),
    "override without a value": (["--config", "c.json", "--set", "stepsize"], 'expected KEY=VALUE, got "stepsize"'),
    "override of an unknown key": (["--config", "c.json", "--set", "stepsiez=1"], 'did you mean "stepsize"?'),
    "override of the wrong type": (["--config", "c.json", "--set", "num_tasks=many"], 'num_tasks is "many"; it must be an integer'),
    "not finite": (
        ["--config", "c.json", "--set", "stepsize=inf"],
        "stepsize is Infinity; it must be a number, greater than 0, and finite",
    ),
    "not a number": (
        ["--config", "c.json", "--set", "momentum=nan"],
        "momentum is NaN; it must be a number, from 0 to below 1, and finite",
    ),
    "infinitely many": (["--config", "c.json", "--set", "num_tasks=inf"], "num_tasks is Infinity; it must be an integer, from 1 to 100"),
    "half a task": (["--config", "c.json", "--set", "num_tasks=+.5"], "num_tasks is 0.5; it must be an integer, from 1 to 100"),
    "override out of range": (["--config", "c.json", "--set", "momentum=1"], "from 0 to below 1"),
    "explanation of an unknown key": (["--explain", "stepsize", "l2_innit"], '--explain: unknown key "l2_innit"; did you mean "l2_init"?'),
    "override twice": (["--config", "c.json", "--set", "stepsize=1", "stepsize=2"], 'key "stepsize" appears twice'),
    "name too long for a folder": (["--config", "c.json", "--set", "results_dir=" + "e" * 300], "File name too long"),
    "capitalised boolean": (["--config", "c.json", "--set", "use_cbp=True"], 'use_cbp is "True"; it must be true or false'),
    "no such GPU": (["--config", "c.json", "--set", "device=cuda:99"], '"cuda:99" is not here'),
    "data set not there": (["--config", "c.json", "--set", "data_path=c.json"], "CIFAR-100 is not there"),
    "variable not set": (
        ["--config", "c.json", "--set", "results_dir=$NOPE/x"],
        '--set: results_dir is "$NOPE/x"; the environment variable',
    ),
    "no such user": (["--config", "c.json", "--set", "results_dir=~nobody-here/x"], 'is "~nobody-here/x"; there is no user "nobody-here"'),
    "results in a file": (["--config", "c.json", "--set", "results_dir=c.json"], "cannot write this file"),
}


@pytest.mark.parametrize("case", BAD_COMMAND_LINES)
def test_a_bad_command_line_is_one_line_and_writes_nothing(case, tmp_path, capsys, monkeypatch):
    arguments, message = BAD_COMMAND_LINES[case]
    monkeypatch.chdir(tmp_path)
    dataset = "cifar100" if "data set" in case else "synthetic"
    (tmp_path / "c.json").write_text(json.dumps({"dataset": dataset, "results_dir": "results", "network_width": 1}))
    assert message in refused(capsys, arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["c.json"]


def test_user_errors_name_their_source():
    with pytest.raises(UserError, match=r"^here: stepsize is 0;"):
        make_config({"stepsize": 0}, source="here")


def test_auto_is_settled_when_a_run_starts_and_kept():
    paper = Config()
    assert (paper.compile_network, paper.fold_batch_norm) == (False, "auto")
    assert settled(paper, None, is_gpu=False).fold_batch_norm is False and settled(paper, None, is_gpu=True).fold_batch_norm is True
    on_gpu = settled(paper, None, is_gpu=True)
    assert settled(paper, on_gpu, is_gpu=False) == on_gpu  # resumed elsewhere
    assert differing_keys(on_gpu, paper) == [] and differing_keys(on_gpu, settled(paper, None, is_gpu=False)) == ["fold_batch_norm"]
    explicit = make_config({"fold_batch_norm": True, "compile_network": "auto"}, source="test")
    assert settled(explicit, None, is_gpu=False) == make_config({"fold_batch_norm": True, "compile_network": False}, source="test")


def test_a_run_started_before_batch_norm_could_be_folded_goes_on_without(tmp_path):
    files = RunFiles(tmp_path / "experiment", 0)
    files.save_config(Config(), {})
    settings = json.loads(files.config_file.read_text())
    del settings["fold_batch_norm"]
    files.config_file.write_text(json.dumps(settings))
    assert settled(Config(), files.load_config(), is_gpu=True).fold_batch_norm is False
