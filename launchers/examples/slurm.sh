#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm: sbatch launchers/examples/slurm.sh dataset=amazon3m dataset_path=/data log_fname=a3m
# A job that lost a node, or its place, is queued again and goes on from its last checkpoint.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
. .venv/bin/activate
GPUS=${GPUS:-8}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One task a node; each starts the processes of its node.
srun --kill-on-bad-exit=1 bash -c '
    exec accelerate launch --config_file launchers/examples/accelerate_two_machines.yaml \
        --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * '"$GPUS"')) --machine_rank "$SLURM_NODEID" \
        --main_process_ip '"$first"' --main_process_port 29500 launchers/train.py training.resume=true "$@"' bash "$@"
