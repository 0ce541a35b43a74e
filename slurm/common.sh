# shellcheck shell=bash
# Shared by the scripts of this folder: the environment, and a run that can be stopped and resumed.

csipipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# --- a site changes these lines: how a node gets Python with csipipe ---------------------------------
# module load python/3.11 cuda/12.6
CSIPIPE_VENV=${CSIPIPE_VENV:-$csipipe/.venv}
# export CSIPIPE_CACHE=$SCRATCH/csipipe     # converted data, if $HOME is small
CSIPIPE_REQUEUES=${CSIPIPE_REQUEUES:-10}     # how often a job that loses a node is requeued
# seconds that torchrun gives ranks that save after SIGTERM (its own: 30); SLURM ends a job when it wants the nodes back
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# ------------------------------------------------------------------------------------------------------

fail() {
    echo "csipipe: error: $*" >&2
    exit 1
}

[ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job for SLURM; submit it with: sbatch$(printf ' %q' "$0" "$@")"
# shellcheck disable=SC1091
[ ! -f "$CSIPIPE_VENV/bin/activate" ] || . "$CSIPIPE_VENV/bin/activate"
reason=$(python -c "import csipipe.run.slurm" 2>&1) || fail "node $(hostname) has no Python with csipipe: ${reason##*$'\n'}
    It has $(command -v python || echo "no python in PATH"), and CSIPIPE_VENV is $CSIPIPE_VENV. On the login node, create
    the environment with python3 -m venv $csipipe/.venv and install csipipe in it; modules go into common.sh."
# a step inside of this one would wait for its tasks, and each of them would start a run
[ "${SLURM_STEP_NUM_TASKS:-1}" -eq 1 ] || [ "${ENVIRONMENT:-}" = BATCH ] || fail "srun started this script
    $SLURM_STEP_NUM_TASKS times, but it starts all ranks itself; submit it with: sbatch$(printf ' %q' "$0" "$@")"

# the same with GPUs, but that a step inherits from the job, whatever its environment
for name in "${!SLURM_GPUS_PER_TASK@}" "${!SLURM_TRES_PER_TASK@}"; do
    case "$name=${!name}" in
    SLURM_GPUS_PER_TASK* | *gpu*) fail "$name is ${!name}, but one task per node starts all of its ranks, and would get a
    single rank's GPUs; submit it with --gpus-per-node, for all of a node's ranks, instead of --gpus-per-task" ;;
    esac
done

# USR1, by the scheduler before the limit or by `scancel --batch --signal=USR1 JOB`: save and requeue
asked='' run=''
trap 'asked=yes; [ -z "$run" ] || touch "$run/stop"' USR1

# srun with a task on every node of the job, which has all of the job's share of the node, and this environment; beside
# the step that this script may be in itself (srun --pty bash).
on_each_node() (
    unset "${!SLURM_NTASKS@}" "${!SLURM_NPROCS@}" "${!SLURM_TASKS_PER_NODE@}"
    # a rank's share of the CPUs, which would become the share of all ranks of a node
    unset "${!SRUN_CPUS_PER_TASK@}" "${!SLURM_CPUS_PER_TASK@}" "${!SLURM_TRES_PER_TASK@}" "${!SLURM_EXACT@}"
    exec srun --export=ALL --overlap ${SLURM_HET_SIZE:+--het-group=0-$((SLURM_HET_SIZE - 1))} \
        --ntasks-per-node=1 --cpu-bind=none "$@"
)

# What SLURM knows of this job, in one line. (A task of an array may have the id of the array: then all tasks are listed.)
facts() {
    SLURM_TIME_FORMAT=standard scontrol show job --oneliner "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "
}

requeue() {
    local id=$SLURM_JOB_ID
    # by that id, all tasks of an array would be requeued: the others would be killed, the finished ones would start again
    [[ $(facts) =~ ArrayJobId=([0-9]+)\ ArrayTaskId=([0-9]+)\  ]] && id=${BASH_REMATCH[1]}_${BASH_REMATCH[2]}
    scontrol requeue "$id" || echo "csipipe: to resume, submit it with --run.dir $run" >&2
}

# Whether SLURM preempts this attempt of the job. Where a partition has a GraceTime, the ranks get SIGTERM and save, but
# torchrun then ends with status 1: without more, the job would have failed before SLURM requeues it.
preempted() {
    local job start time
    job=$(facts)
    start=${job#* StartTime=} time=${job#* PreemptTime=}
    start=${start%% *} time=${time%% *}
    [[ $time == 2* && ! $time < $start ]] # neither None nor of an earlier attempt
}

# Train with csipipe train's arguments on all nodes of the job, and exit with its status.
train() {
    local step code trained=''
    run=$(python -m csipipe.run.slurm plan "$@") || exit 1
    [ -z "$asked" ] || touch "$run/stop"
    # inside salloc: without this, Ctrl-C would end the script, and the run would go on without it
    trap 'touch "$run/stop"; echo "csipipe: interrupted: one more iteration, and all is saved" >&2' INT
    on_each_node --kill-on-bad-exit=1 python -m csipipe.run.slurm node "$run" & # a torchrun each
    step=$!
    while wait "$step"; kill -0 "$step" 2>/dev/null; do :; done # a signal ends the wait, not the step
    wait "$step" # says once more how it ended
    code=$?
    [ "$run/config.yaml" -nt "$run/slurm.json" ] && trained=yes # written when training begins
    rm -f "$run/slurm.json"
    if [ -n "$asked" ] && [ "$code" -eq 0 ] && grep -qs '"status": "stopped"' "$run/summary.json"; then
        requeue
    elif [ "$code" -ne 0 ] && preempted; then
        echo "csipipe: preempted; the job is requeued" >&2
        requeue
    elif [ "$code" -eq 138 ]; then
        fail "USR1 was sent to torchrun, which can't save and ended; send it to this script: --signal=B:USR1@180 in
    its #SBATCH lines, or scancel --batch --signal=USR1 JOB. To resume, submit it with --run.dir $run"
    elif [ "$code" -ne 0 ] && [ "${SLURM_NNODES:-1}${SLURM_HET_SIZE:-}" != 1 ] && ! on_each_node true; then
        # ranks notice a dead node sooner than SLURM, which would requeue the job for it
        [ -n "$trained" ] || fail "a node of the job doesn't answer; not requeued, since nothing was trained yet"
        [ "${SLURM_RESTART_COUNT:-0}" -lt "$CSIPIPE_REQUEUES" ] ||
            fail "a node of the job doesn't answer, again; it was requeued $CSIPIPE_REQUEUES times: see CSIPIPE_REQUEUES"
        echo "csipipe: a node of the job is gone; the job is requeued on others" >&2
        requeue
    fi
    exit "$code"
}
