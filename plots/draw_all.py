"""Every figure of a folder of results: the paper's, the comparison with it, and one of each metric that is there.

    python plots/draw_all.py --results_dir results/

They are written into figures/ in that folder, or to `--output-dir`. What cannot be drawn is said in a line, and the exit status is 1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the parts are found wherever this script is called from

from incremental_cifar.command_line import run_script
from incremental_cifar.config import UserError
from plots import compare_with_paper, plot_incremental_cifar_results, plot_paper_figure
from plots.drawing import COLOURS, FURTHER_COLOURS
from plots.run_results import ALGORITHM_LABELS, find_metrics, results_parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = results_parser("Draw every figure that stored runs give.")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where to write (default: figures/ in --results_dir)")
    parsed = parser.parse_args(arguments)
    results, output = parsed.results_dir, parsed.output_dir or parsed.results_dir / "figures"
    statuses, places = [], ["--results_dir", str(results), "--output-dir", str(output)]
    metrics = find_metrics(results)
    there = {name for names in metrics.values() for name in names if "," not in name}
    papers = [name for name in ALGORITHM_LABELS if name in there]
    if papers:
        names = [*papers, *sorted(there.difference(papers))][: len(COLOURS) + len(FURTHER_COLOURS)]
        with_others = ["--algorithms", ",".join(names)] if names != papers else []
        drawn = run_script(plot_paper_figure.main, [*places, *with_others]) and (run_script(plot_paper_figure.main, places) or 1)
        statuses += [drawn, run_script(compare_with_paper.main, places)]
    for name in metrics:
        metric = ["--metric", name, "--output", str(output / f"{name}.svg")]
        statuses.append(run_script(plot_incremental_cifar_results.main, [*places[:2], *metric]))
    if not statuses:
        raise UserError(f"{results}: no runs here; --results_dir names the folder that holds one folder per algorithm")
    return max(statuses) if max(statuses) > 128 else int(any(statuses))


if __name__ == "__main__":
    sys.exit(run_script(main))
