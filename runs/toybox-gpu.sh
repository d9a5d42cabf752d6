#!/usr/bin/env bash
# Ten minutes on one GPU: the embedded model's base is trained further, and its students are made anew.
#
#   runs/toybox-gpu.sh [BASE] [FOLDER]
#
# Training starts from BASE (default the shipped model); FOLDER (default work/gpu) gets a run folder for each stage. Seconds of each stage:
#   SECONDS_BASE=300 SECONDS_CFG=90 SECONDS_TSCD=45 (1: left out) SECONDS_ADP=60
# What ships was made with 274, 65, 1 and 55.
# SIZE=32 divides the students' batches by 32, for a walk-through elsewhere. Stop it at any time; the same command resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:-hyperbagel/assets/toybox}
out=${2:-work/gpu}
size=${SIZE:-1}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE

# train FOLDER NAME RECIPE SECONDS [KEY=VALUE]...: trains, or resumes, out/FOLDER; a stage that has an export is not touched again.
train() {
    local folder=$out/$1 name=$2 recipe=$3 seconds=$4
    shift 4
    [ -d "$folder/export" ] && return
    local resume=()
    [ -f "$folder/provenance.json" ] && resume=(--resume)   # also one that was stopped before its first checkpoint
    "$python" -m hyperbagel.cli train "$name" --recipe "recipes/toybox/$recipe.yaml" max_seconds="$seconds" "$@" --out "$folder" "${resume[@]}"
}

[ -d "$out/eye" ] || "$python" -m runs.eye "$base" "$out/eye"
train base base base-gpu "${SECONDS_BASE:-300}" init="$base" align.vit="$out/eye" compile="${COMPILE:-false}"

model=$out/base/export
rows=("model=$model" data.workers=12 data.worker_kind=process data.sources.t2i.samples=$((384 / size)) data.sources.edit.samples=$((192 / size))
    sample_every=1000000 log_every=50)
train cfg cfg cfg "${SECONDS_CFG:-90}" "${rows[@]}" nfe=6 evaluate_every=200 time_shift=2 optim.lr=0.01
if [ "${SECONDS_TSCD:-45}" -gt 1 ]; then train tscd tscd tscd "${SECONDS_TSCD:-45}" "${rows[@]}" evaluate_every=100 init="$out/cfg/export"; fi
best=$out/cfg/export
[ ! -d "$out/tscd" ] || best=$("$python" -m hyperbagel.cli gate "$out/tscd" --else "$best")
train adp adp adp "${SECONDS_ADP:-60}" "${rows[@]}" evaluate_every=100 init="$best" pixel_samples=$((256 / size))
