"""Every figure of a folder of results: the paper's, the comparison with it, and one of each metric that is there.

    python plots/draw_all.py --results_dir results/

They are written into figures/ in that folder, or to `--output-dir`. The paper's figure shows other algorithms beside the paper's, as many
as have a colour of their own, or if they cannot be drawn there, the paper's alone. What cannot be drawn is said in a line, and the exit
status is 1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # the parts are found wherever this script is called from

from incremental_cifar.command_line import OneLineArgumentParser, run_script
from incremental_cifar.config import UserError
from plots import compare_with_paper, plot_incremental_cifar_results, plot_paper_figure
from plots.drawing import COLOURS, FURTHER_COLOURS
from plots.run_results import ALGORITHM_LABELS, TEST_ACCURACY, add_results_argument, find_metrics


def algorithms_argument(there: set[str]) -> list[str]:
    """What has the paper's figure show the others of these algorithms too, as many as have a colour; nothing if they are the paper's."""
    papers = [name for name in ALGORITHM_LABELS if name in there]
    others = sorted(name for name in there.difference(papers) if name == name.strip() and not {*name} & {*",\\"})  # that can be named
    names = [*papers, *others][: len(COLOURS) + len(FURTHER_COLOURS)]
    return ["--algorithms", ",".join(names)] if others else []


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineArgumentParser(description="Draw every figure that stored runs give.")
    add_results_argument(parser)
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where to write (default: figures/ in --results_dir)")
    parsed = parser.parse_args(arguments)
    results, output = parsed.results_dir, parsed.output_dir or parsed.results_dir / "figures"
    statuses, places = [], ["--results_dir", str(results), "--output-dir", str(output)]
    metrics = find_metrics(results)
    if any((results / name).is_dir() for name in ALGORITHM_LABELS):
        with_others = algorithms_argument({name for panel in (*plot_paper_figure.PANELS, TEST_ACCURACY) for name in metrics.get(panel, [])})
        statuses.append(run_script(plot_paper_figure.main, [*places, *with_others]))
        if statuses[0] and with_others:
            run_script(plot_paper_figure.main, places)  # the paper's alone
        statuses.append(run_script(compare_with_paper.main, places))
    for name in metrics:
        command = ["--results_dir", str(results), "--metric", name, "--output", str(output / f"{name}.svg")]
        statuses.append(run_script(plot_incremental_cifar_results.main, command))
    if not statuses:
        raise UserError(f"{results}: no runs here; --results_dir names the folder that holds one folder per algorithm")
    return 1 if any(statuses) else 0


if __name__ == "__main__":
    sys.exit(run_script(main))
