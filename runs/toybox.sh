#!/usr/bin/env bash
# The embedded model from nothing: autoencoder, base, scores. Stop it at any time; the same command goes on where it stopped.
#
#   runs/toybox.sh [FOLDER]
#
# FOLDER (default work) gets one run folder a stage. Times are for one core of a 2-core machine without AVX-512.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-work}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
bin=${BIN:-.venv/bin}

# stage NAME ARGUMENTS...: trains, or goes on with, out/NAME; a finished stage has an export and is not touched again.
stage() {
    local name=$1
    shift
    [ -d "$out/$name/export" ] && return
    local resume=()
    [ -d "$out/$name/checkpoints" ] && resume=(--resume)
    "$bin/hyperbagel" train "${name%%-*}" --recipe "recipes/toybox/$name.yaml" "$@" --out "$out/$name" "${resume[@]}"
}

mkdir -p "$out"
stage vae                                # 22 minutes: pictures <-> latents
stage base vae="$out/vae/export"         # 75 minutes: captions, edits and questions in one model
[ -f "$out/eval/report.json" ] || "$bin/hyperbagel" eval toybox --model "$out/base/export" --out "$out/eval"
