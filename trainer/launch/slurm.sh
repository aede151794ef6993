#!/bin/bash
# A run under SLURM, on two nodes of eight GPUs, that goes on in another job when its time is up:
#
#   RECIPE=breast_full_slide MANIFESTS=/data/manifests LABELS=/data/labels.csv RUN=/data/runs/first \
#   sbatch slurm.sh [flags of slidegrad train]
#
# Copy it together with torchrun.sh, which says what else can be set, and change the lines below to your cluster. Activate
# the environment with slidegrad in it before sbatch, or where it says so.
#SBATCH --job-name=slidegrad
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1200
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slidegrad-%j.log
set -euo pipefail
: "${SCRIPTS:=$SLURM_SUBMIT_DIR}" "${PORT:=$((20000 + SLURM_JOB_ID % 40000))}" "${MOST_JOBS:=50}"
# source /path/to/.venv/bin/activate
export NODES="$SLURM_NNODES" RANKS="${RANKS:-${SLURM_GPUS_ON_NODE:?give RANKS, the ranks of a node}}"
MEET="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$PORT"
export MEET

srun --kill-on-bad-exit=0 bash "$SCRIPTS/torchrun.sh" "$@" &
step=$! stopped=
# 20 minutes before the end (--signal): every node's ranks save and end.
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$MOST_JOBS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
