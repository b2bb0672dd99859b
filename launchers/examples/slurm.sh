#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm: sbatch launchers/examples/slurm.sh dataset=amazon3m dataset_path=/data log_fname=a3m
# Two minutes before the time limit (or on scancel --batch --signal=USR1 JOB) all processes write a checkpoint and exit, and
# the job is requeued. A job that loses a node or is preempted is requeued too. Both continue from the last checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate
export GPUS=${GPUS:-8} FIRST_NODE
FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Seconds that accelerate launch waits for its processes to write the checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

# Slurm signals this shell, which passes the signal on to the tasks.
notice=
trap 'notice=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap : TERM # at the end of the job; the tasks get their own signal, and need the time until SIGKILL
# One task per node starts the processes of its node. Slurm signals either the task alone or all of its processes, so the
# task signals the launcher, which itself ignores USR1.
srun --kill-on-bad-exit=1 bash -c '
    trap "kill -TERM \$launcher" USR1 TERM
    (trap "" USR1; exec accelerate launch --config_file launchers/examples/accelerate_two_machines.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * GPUS)) --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$FIRST_NODE" --main_process_port 29500 launchers/train.py training.resume=true "$@") &
    launcher=$!
    wait $launcher || wait $launcher # a signal interrupts the first wait
' bash "$@" &
status=0
wait $! || status=$?
while kill -0 $! 2>/dev/null; do wait $! || status=$?; done # a signal interrupted the first wait
if [ "$notice" ] && [ $status != 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
