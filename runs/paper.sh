#!/usr/bin/env bash
# The paper's worth of runs, from nothing to figures and the rows of RESULTS.md: five algorithms, 15 indices each.
#
#     runs/paper.sh                                                        on all GPUs of this machine; docs/sweeps.md says what it costs
#     INDICES=0-2 runs/paper.sh --set precision=bf16 --runs-per-gpu 3
#     runs/paper.sh --slurm partition=gpu gres=gpu:1 time=4:00:00          submits; once the jobs are done, runs/paper.sh goes on
#
# The same command goes on after an interruption. Arguments go to run_sweep.py. In the environment: INDICES (0-14), RESULTS, the folder of
# results (results/ beside this one), LEDGER (RESULTS.md), and VENV, an environment of yours to use instead of .venv/.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
results=${RESULTS:-$root/results}
python=${VENV:-$root/.venv}/bin/python
ledger=${LEDGER:-$root/RESULTS.md}

[ -f "$ledger" ] || { echo "error: LEDGER=$ledger: this file is not there; a copy of RESULTS.md is right" >&2; exit 2; }
make -s -C "$root" setup
[ -x "$python" ] || { echo "error: $python is not there; VENV names an environment" >&2; exit 2; }
"$python" "$root/run_sweep.py" --indices "${INDICES:-0-14}" --set "results_dir=$results" --analyse --configs \
    "$root"/cfg/{base_deep_learning_system,continual_backpropagation,head_resetting,retrained_network,shrink_and_perturb}.json "$@"
for argument in "$@"; do
    case $argument in --slurm | --status | --dry-run) exit ;; esac # nothing to compare yet
done
"$python" "$root/plots/compare_with_paper.py" --results_dir "$results" --output-dir "$results/figures" --ledger "$ledger"
