"""All numbers of a folder of results as one table, a row per value; docs/numbers.md says what the columns mean.

python plots/export.py --results_dir results --output results.csv
"""

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the parts are found wherever this script is called from

import numpy as np

from incremental_cifar.command_line import run_script
from incremental_cifar.config import NUM_CLASSES, STEPS_PER_WINDOW, Config, UserError, read_sizes
from incremental_cifar.safe_files import check_destinations, write_file
from plots.run_results import read_values, results_parser

ARRAY = re.compile(r"([^.].*)/(class_order|[^.].*_(?:in_order|per_epoch|runtime|per_checkpoint|analysis))/index-(0|[1-9][0-9]{0,8})\.npy")


def results_table(results_dir: str | os.PathLike) -> "pandas.DataFrame":  # noqa: F821 (imported below: it takes a second)
    """All values of all runs in a folder of results: columns algorithm, index, metric, task, number_of_classes, epoch, value.

    value is what is stored, NaN where a run has none; a metric of a run has its rows together, in the order of its array; tasks and epochs
    are counted from 1. Raises UserError naming the folder or file that cannot be used.
    """
    import pandas

    root, parts = Path(results_dir), []
    for path in root.glob("*/*/index-*.npy"):
        if match := ARRAY.fullmatch(path.relative_to(root).as_posix()):
            algorithm, metric, index = match.groups()
            config, _ = read_sizes(config_file := root / algorithm / "config_files" / f"{path.stem}.json")
            rows = pandas.DataFrame({"algorithm": algorithm, "index": int(index), "metric": metric} | positions(metric, config))
            values = read_values(path, len(rows), "values", -np.inf, np.inf)
            if len(values) != len(rows) and not config_file.is_file():
                raise UserError(f"{path}: not as long as the paper's; copy {config_file} too, which says what it holds")
            parts.append(rows[: len(values)].assign(value=values))
    if not parts:
        raise UserError(f"{root}: no runs here; --results_dir names the folder that holds one folder per algorithm")
    return pandas.concat(parts).sort_values(["algorithm", "index", "metric"], kind="stable", ignore_index=True)


def positions(metric: str, config: Config) -> dict[str, np.ndarray]:
    """Task, number of classes and epoch of each value that a finished run has of a metric: integers (values,)."""
    task, epoch = np.arange(1, config.num_tasks + 1), np.arange(1, config.num_epochs + 1)
    classes = np.arange(1, (NUM_CLASSES if metric == "class_order" else config.num_tasks * config.classes_per_task) + 1)
    if metric.endswith("_in_order") or metric == "class_order":  # in the task that brings a class; it is that number in the order
        return {"task": -(-classes // config.classes_per_task), "number_of_classes": classes, "epoch": classes * 0 + config.num_epochs}
    if metric.endswith("_per_checkpoint"):
        steps = [config.steps_before(done) for done in epoch]  # by its end
        epoch = epoch[np.searchsorted(steps, np.arange(STEPS_PER_WINDOW, steps[-1] + 1, STEPS_PER_WINDOW))]
    if metric.endswith("_analysis"):  # of the network as the task before left it, but for the accuracies of its training
        epoch = config.epochs_per_task * (task - (not metric.startswith("average_online")))
    else:
        task = -(-epoch // config.epochs_per_task)
    return {"task": task, "number_of_classes": config.classes_per_task * task, "epoch": epoch}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = results_parser("Write all numbers of stored runs into one table, a row per value.")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="the file to write, .csv or .parquet")
    parsed = parser.parse_args(arguments)
    output, needed = parsed.output, {".csv": ["pandas"], ".parquet": ["pandas", "pyarrow"]}
    if output.suffix not in needed:
        raise UserError(f"--output {output}: the name must end in .csv or .parquet")
    if missing := [name for name in needed[output.suffix] if importlib.util.find_spec(name) is None]:
        raise UserError(f"--output {output}: {missing[0]} is not installed; python -m pip install {' '.join(missing)}")
    check_destinations(output)
    table = results_table(parsed.results_dir)
    write_file(output, table.to_csv(index=False, na_rep="NaN").encode() if output.suffix == ".csv" else table.to_parquet(index=False))
    print(f"Wrote {output}: {len(table):,} values")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
