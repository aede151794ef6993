#!/bin/bash
# A run under LSF, on two hosts of eight GPUs, that is queued again when its time is up:
#
#   RECIPE=breast_full_slide MANIFESTS=/data/manifests LABELS=/data/labels.csv RUN=/data/runs/first \
#   SCRIPTS=$PWD bsub < lsf.sh
#
# Copy it together with torchrun.sh, which says what else can be set, and change the lines below to your cluster; flags of
# slidegrad train go into FLAGS. 20 minutes before the end (-wa, -wt) the ranks save and end with 75, which queues the job
# again (-Q).
#BSUB -J slidegrad
#BSUB -n 2
#BSUB -R "span[ptile=1]"
#BSUB -gpu "num=8:mode=exclusive_process"
#BSUB -W 24:00
#BSUB -wa USR1
#BSUB -wt 20
#BSUB -Q "75"
#BSUB -o slidegrad-%J.log
set -euo pipefail
: "${SCRIPTS:?the folder of torchrun.sh}" "${PORT:=$((20000 + LSB_JOBID % 40000))}" "${FLAGS:=}"
# source /path/to/.venv/bin/activate
hosts="$(sort -u "$LSB_DJOB_HOSTFILE")"
NODES="$(wc -l <<<"$hosts")" MEET="$(head -n 1 <<<"$hosts"):$PORT"
export NODES MEET

# shellcheck disable=SC2086 # FLAGS are words.
blaunch -z "$(tr '\n' ' ' <<<"$hosts")" bash "$SCRIPTS/torchrun.sh" $FLAGS &
step=$! stopped=
trap 'stopped=1; kill -USR1 "$step" 2>/dev/null || true' USR1
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do
    code=0
    wait "$step" || code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then exit 75; fi
exit "$code"
