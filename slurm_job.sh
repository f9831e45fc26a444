#!/bin/bash
# A job of Slurm, or a task of an array, that runs a resumable command in pieces that fit into the time limit. By hand:
#
#   sbatch --array=0-14 --time=4:00:00 --gres=gpu:1 slurm_job.sh .venv/bin/python run_sweep.py --configs cfg/head_resetting.json --indices %a
#
# The word %a stands for the number of the task. Five minutes before the limit (a quarter of it, if that is less) the command gets SIGUSR1,
# and in SECONDS_TO_STOP, two thirds of that, what it may take. Its answer 138 (128 + SIGUSR1; to die of it is the same) says that it came
# further: the job is queued again, or, where that is refused, submitted again with the options in this file. So it is after Slurm's own
# limit, and after kill -9 until it was queued again five times; what is cancelled stays so, what is pre-empted Slurm queues again. No srun:
# it may cut off what a command does after SIGTERM. Without it, a pre-empted command has Slurm's KillWait (30 s) to stop.
: "${1:?slurm_job.sh: there is no command to run; its first lines show how}"
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}; job=${job:-$SLURM_JOB_ID} # the last task has the array's own
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-${OMP_NUM_THREADS:-1}}
end=$(squeue --noheader --jobs="$job" --format=%e)
end=$(date -d "${end:-none}" +%s 2>/dev/null) # none without a limit or an answer: then timeout waits for ever
seconds=$((${end:-$(date +%s)} - $(date +%s)))
((seconds > 0)) || seconds=${end:+1}
margin=$((seconds / 4 < 300 ? seconds / 4 : 300))
export SECONDS_TO_STOP=$((margin * 2 / 3))
trap 'is_ended=1' TERM # all processes of the job get it
command=()
for word in "$@"; do
    [[ $word == %a ]] && word=${SLURM_ARRAY_TASK_ID:?slurm_job.sh: %a is the number of a task of an array; see --array}
    command+=("$word")
done
timeout --preserve-status --signal=USR1 --kill-after=$((margin * 5 / 6)) $((seconds - margin)) "${command[@]}"
status=$?

reason=$(squeue --noheader --jobs="$job" --format=%r)
case $status in
    138) [[ ! $is_ended || $reason == TimeLimit ]] || exit $status ;;
    137) [[ ! $is_ended && ${SLURM_RESTART_COUNT:-0} -lt 5 ]] || exit $status ;;
    143) [[ $reason == TimeLimit ]] || exit $status ;;
    *) exit $status ;;
esac
trap '' TERM # which may come before the answer to this
scontrol requeue "$job" || sbatch ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} "$0" "$@"
