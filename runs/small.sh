#!/usr/bin/env bash
# The small-scale experiment on real CIFAR-100, from nothing to figures, without a GPU: the paper's five algorithms, a run per core.
#
#     runs/small.sh
#     INDICES=3-12 RESULTS=/scratch/small runs/small.sh --keep results
#
# The same command goes on after an interruption. Arguments go to run_sweep.py. In the environment: INDICES (3-5), RESULTS, the folder of
# results (results/small), CONFIGS (cfg/small/*.json), and VENV, an environment of yours to use instead of .venv/. The figures are in
# figures/ in the folder of results.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
configs=("$root"/cfg/small/*.json)
[ -z "${CONFIGS:-}" ] || configs=($CONFIGS) # unquoted: patterns are put in
python=${VENV:-$root/.venv}/bin/python

make -s -C "$root" setup
[ -x "$python" ] || { echo "error: $python is not there; VENV names an environment" >&2; exit 2; }
export OMP_NUM_THREADS=1 # so narrow a network gains nothing from a second one
"$python" "$root/run_sweep.py" --configs "${configs[@]}" --indices "${INDICES:-3-5}" \
    --set "results_dir=${RESULTS:-$root/results/small}" --analyse "$@"
