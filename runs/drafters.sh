#!/usr/bin/env bash
# Trains every drafter of the embedded model with the same budget, then makes the tables. Stop it at any time; the same command resumes.
#
#   runs/drafters.sh [MODEL] [FOLDER] [SECONDS]
#
# MODEL (default the shipped one) is the target; FOLDER (default work/drafters) gets a run folder for each drafter; SECONDS (default 900) is
# the time for each, in one process of one thread. On two cores, two of these can run at once, with ONLY="block eagle3" and the like.
# STEPS=700 gives each that many steps instead, however long they take. NO_TABLES=1 only trains. SHIP="block" copies these drafters into the
# model's own drafters/, where `hyperbagel ask` finds them.
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:-hyperbagel/assets/toybox}
out=${2:-work/drafters}
seconds=${3:-900}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
bin=${BIN:-.venv/bin}
all="block hyper_bagel eagle3 no_zero_init no_ce neither"
only=${ONLY:-$all}
budget=("max_seconds=$seconds")
[ -z "${STEPS:-}" ] || budget=(max_seconds=1000000 "max_steps=$STEPS" optim.schedule_by=steps)

# drafter NAME RECIPE OVERRIDES...: trains, or resumes, out/NAME; a finished one has a gate.json and is not touched again.
drafter() {
    local name=$1 recipe=$2
    shift 2
    [[ " $only " == *" $name "* ]] || return 0
    [ -f "$out/$name/gate.json" ] && return 0
    local resume=()
    if [ -d "$out/$name/checkpoints" ]; then resume=(--resume); else rm -rf "${out:?}/$name"; fi
    "$bin/hyperbagel" train drafter --recipe "recipes/toybox/drafter_$recipe.yaml" "target=$model" "${budget[@]}" "$@" \
        --out "$out/$name" "${resume[@]}"
}

mkdir -p "$out"
drafter block block                                            # one pass a block
drafter hyper_bagel hyper_bagel                                # the paper's
drafter eagle3 eagle3                                          # the published baseline
drafter no_zero_init hyper_bagel "shape={layers: 2, zero_init: false}"
drafter no_ce hyper_bagel ce_weight=0
drafter neither hyper_bagel "shape={layers: 2, zero_init: false}" ce_weight=0

given=()
for name in $all; do
    [ -f "$out/$name/gate.json" ] && given+=(--drafter "$name=$out/$name/export")
done
if [ -z "${NO_TABLES:-}" ]; then
    # the paper's ablation: acceptance of chains of 10, no times
    "$bin/hyperbagel" eval speculative --acceptance --model "$model" --out "$out/ablation" "${given[@]}"
    main=()
    for name in block hyper_bagel eagle3; do
        [ -f "$out/$name/gate.json" ] && main+=(--drafter "$name=$out/$name/export")
    done
    "$bin/hyperbagel" eval speculative --model "$model" --out "$out/speed" "${main[@]}"
fi
for name in ${SHIP:-}; do
    "$bin/hyperbagel" install "$out/$name/export" --model "$model" --name "$name"
done
