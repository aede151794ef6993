#!/bin/bash
# One node's part of a run: torchrun with a rank for each of its GPUs. To be started on every node, about the same time:
#
#   RECIPE=breast_full_slide MANIFESTS=/data/manifests LABELS=/data/labels.csv RUN=/data/runs/first \
#   NODES=2 MEET=node1:29500 bash torchrun.sh [flags of slidegrad train]
#
# RANKS (a node's, by default its GPUs), RESTARTS (3: how often all ranks start again after one has died) and SAVE_S (900:
# seconds that ranks have to end a step and save) may be set too. Rank 0 aggregates, all others encode.
#
# SIGTERM or SIGUSR1: the ranks save and end, and so does this, with 75: start it again to go on. 0: the run is done.
set -euo pipefail
: "${RECIPE:?the recipe}" "${MANIFESTS:?the manifests folder}" "${LABELS:?the labels file}" "${RUN:?the run folder}"
: "${NODES:=1}" "${RESTARTS:=3}" "${SAVE_S:=900}" "${RANKS:=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
if [ "$RANKS" -lt 1 ]; then
    echo "torchrun.sh: no GPU here; give RANKS, the ranks of this node" >&2
    exit 2
fi
meet=(--standalone)
if [ "$NODES" -gt 1 ]; then
    meet=(--rdzv-backend=c10d --rdzv-endpoint="${MEET:?HOST:PORT of the first node}" --rdzv-id="slidegrad-$(basename "$RUN")")
fi
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$SAVE_S"
# A store for each time that the ranks start: the one that torchrun keeps knows addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
flags=("$@")
if [ -e "$RUN/config.yaml" ]; then flags+=(--resume); fi

# Some schedulers signal every process. torchrun is told by SIGTERM, once; ranks listen to both.
trap '' USR1
torchrun --nnodes="$NODES" --nproc-per-node="$RANKS" --max-restarts="$RESTARTS" \
    "${meet[@]}" -m trainer "$RECIPE" --manifests "$MANIFESTS" --labels "$LABELS" --out "$RUN" ${flags[@]+"${flags[@]}"} &
ranks=$! stopped=
trap 'stopped=1; kill -TERM "$ranks" 2>/dev/null || true' TERM USR1
code=0
wait "$ranks" || code=$?
while kill -0 "$ranks" 2>/dev/null; do # A signal ends `wait`, not what it waits for.
    code=0
    wait "$ranks" || code=$?
done
if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then exit 75; fi
exit "$code"
