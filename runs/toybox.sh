#!/usr/bin/env bash
# The embedded model from scratch: autoencoder, base, students for 6 and for 1 evaluation, drafters, scores. Stop it at any time; the same
# command resumes. Two things are taken as they ship: the tokenizer (python -m hyperbagel.data.toybox_tokenizer FOLDER makes it, byte for
# byte) and the detector that evaluations read pictures with (runs/detector.py makes one).
#
#   runs/toybox.sh [FOLDER]
#
# FOLDER (default work) gets a run folder for each stage. A stage that continues another one measures what comes in and what goes out on the
# same held-out conditions; its result is passed on only if it is better (hyperbagel gate). Times are for one core with bf16 units.
#
#   RANKS=2          processes that train together, one core each
#   COUPLINGS="tdm paired"  couplings of stage dmdo to try; the best is passed on (default: tdm)
#   EXTRA="..."      settings that replace those of every recipe after base, e.g. "max_seconds=60" for a walk-through
#   EVAL=0           leaves the scores out
#   INSTALL=1        makes the result the model that ships: hyperbagel/assets/toybox
#   SHIP="block"     drafters that ship with it;  DRAFTER_SECONDS=900  time of each of the six
#   N_T2I, N_EDITS   size of the distillation table (2000, 1000)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-work}
ranks=${RANKS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
bin=${BIN:-.venv/bin}

hyperbagel() { "$bin/python" -m hyperbagel.cli "$@"; }

# stage FOLDER NAME RECIPE [KEY=VALUE]...: trains, or resumes, out/FOLDER; a finished stage has an export and is not touched again.
stage() {
    local folder=$out/$1 name=$2 recipe=recipes/toybox/$3.yaml
    shift 3
    [ -d "$folder/export" ] && return
    local resume=()
    [ -f "$folder/provenance.json" ] && resume=(--resume)   # also one that was stopped before its first checkpoint
    local train=("$bin/python" -m hyperbagel.cli)
    [ "$ranks" -gt 1 ] && train=("$bin/python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" --module hyperbagel.cli)
    "${train[@]}" train "$name" --recipe "$recipe" "$@" ${EXTRA:+$([[ " vae vit base " == *" $name "* ]] || echo "$EXTRA")} --out "$folder" "${resume[@]}"
}

# passed FALLBACK FOLDER...: prints the export to go on with: that of the best run that made things better, or else FALLBACK.
passed() {
    local fallback=$1
    shift
    hyperbagel gate "${@/#/$out/}" --else "$fallback"
}

# better FALLBACK FOLDER: as `passed`, for rounds of the base; one trained by an earlier version was not measured at its start: it is passed.
better() {
    if grep -q '"step": 0' "$out/$2/metrics.jsonl" && [ -f "$out/$2/checkpoints/best.json" ]; then passed "$1" "$2"; else echo "$out/$2/export"; fi
}

# mean NAME STUDENT FOLDER...: makes and prints out/NAME, the mean of a student and of the best run from it; prints the student itself if no
# run made things better. With rank=N before it, the mean is written as a LoRA of that rank.
mean() {
    local folder=$out/$1 student=$2 best
    best=$(passed "${@:2}") || return   # set -e has no effect inside $(...)
    if [ "$best" = "$student" ]; then
        echo "$student"
    else
        [ -d "$folder" ] || hyperbagel average "$student" "$best" --model "$base" --out "$folder" ${rank:+--rank "$rank"} > /dev/null || return
        echo "$folder"
    fi
}

mkdir -p "$out"
stage vae vae vae                                                  # 22 minutes: pictures <-> latents
stage vae-decoder vae vae-decoder init="$out/vae/export" max_seconds=6000   # 100: its decoder alone, further (what ships had 6,490 s in four rounds)
stage vit vit vit                                                  # 15: what stands where in a picture
stage base base base vae="$out/vae-decoder/export" vit="$out/vit/export"   # 70: captions, edits and questions in one model
stage more base base-more init="$out/base/export" vit="$out/vit/export" align.vit="$out/vit/export"   # 60: the same, longer, with its eye's help
base=$(better "$out/base/export" more)
stage draw base base-draw init="$base" align.vit="$out/vit/export"   # 60: drawing alone; answers stay as they are
base=$(better "$base" draw)
stage draw-more base base-draw init="$base" align.vit="$out/vit/export" seed=11 max_seconds=3300   # 55: the same again, on new samples
base=$(better "$base" draw-more)
stage planner planner planner model="$base"                        # 30: the plans of think mode

# -- six evaluations
stage cfg cfg cfg model="$base"                                    # 40: guidance inside
cfg=$out/cfg/export                                                # no gate: it is measured against the base without guidance
hyperbagel gate "$out/cfg" --else "$cfg" > /dev/null
stage reflow cfg cfg model="$base" init="$cfg" teacher="$cfg" target=reflow on_policy=0 scale_draws=1 nfe=6 max_seconds=300   # 5: a baseline, and the real model of dmdo-reflowed
stage tscd tscd tscd model="$base" init="$cfg"                     # 8: structure
six=$(passed "$cfg" tscd)
stage refl-six refl refl-six model="$base" init="$six" teacher="$six"   # 35: what was asked for, by the base's own answers about the pictures
six=$(passed "$six" refl-six)
runs=()
for coupling in ${COUPLINGS:-tdm}; do                              # 60 each: fidelity, to the guided base itself
    real=()
    [ "$coupling" = reflowed ] && real=(real=teacher guidance_share={} teacher="$out/reflow/export")
    stage "dmdo-$coupling" dmdo dmdo model="$base" init="$six" teacher="$cfg" coupling="$coupling" "${real[@]}"
    runs+=("dmdo-$coupling")
done
six=$(mean six "$six" "${runs[@]}")                                # it did better on edits than either (docs/distillation.md)

# -- one evaluation
stage adp adp adp model="$base" init="$six"                        # 30
one=$(passed "$out/adp/export" adp)                                # whatever it says, only this one was made for one step
stage dmdo-one dmdo dmdo-one model="$base" init="$one" teacher="$cfg" holder="$six"   # 70: captions matched, edits held to the six steps
one=$(passed "$one" dmdo-one)
rewarded=('rewarded=[t2i]' reward_kind=answers ceiling=-0.05 reward_cap=0.5 reward_samples=24 data.sources.t2i.checks=3)
stage dmdo-one-more dmdo dmdo-one model="$base" init="$one" teacher="$cfg" holder="$six" seed=1 max_seconds=2700 optim.lr=3.0e-4 \
    usual_share=0.5 "${rewarded[@]}"                               # 45: with a reward
one=$(mean one "$one" dmdo-one-more)                               # what ships is a mean of such runs (docs/distillation.md)
# all layers, two runs that part, their mean, and from there two more at a quarter of the rate; captions that are learned worst come oftener
whole=(model="$base" teacher="$cfg" holder="$six" whole=true usual_share=0.5 optim.ema_decay=0.998 'data.sources.t2i.styles={terse: 0.6, medium: 0.4}'
    'data.sources.t2i.categories={attribute: 26, counting: 24, two: 18, position: 14, many: 8, colors: 6, single: 4}')
stage one-whole-a dmdo dmdo-one "${whole[@]}" init="$one" seed=91 optim.lr=1.0e-4 optim.schedule=constant max_seconds=2400   # 40
stage one-whole-b dmdo dmdo-one "${whole[@]}" init="$one" seed=92 optim.lr=2.0e-4 optim.schedule=constant max_seconds=3600 "${rewarded[@]}"   # 60
one=$(mean one-whole "$one" one-whole-a one-whole-b)
stage one-fine-a dmdo dmdo-one "${whole[@]}" init="$one" seed=94 optim.lr=5.0e-5 max_seconds=2700   # 45
stage one-fine-b dmdo dmdo-one "${whole[@]}" init="$one" seed=95 optim.lr=5.0e-5 max_seconds=2700   # 45
one=$(mean one-fine "$one" one-fine-a one-fine-b)
for seed in 110 111; do                                             # 60 each: half of the pictures behind plans
    stage "one-plans-$seed" dmdo dmdo-plans model="$base" init="$one" teacher="$cfg" holder="$six" seed="$seed"
done
one=$(rank=128 mean one-plans "$one" one-plans-110 one-plans-111)
stage refl refl refl model="$base" init="$one" teacher="$six"       # 5
one=$(passed "$one" refl)

hyperbagel install "$six" --model "$base" --name 6 --nfe 6
hyperbagel install "$one" --model "$base" --name 1
planner=$(hyperbagel gate "$out/planner") || [ $? = 3 ]            # 3: it did not become better
[ -z "$planner" ] || hyperbagel install "$planner" --model "$base"

# -- drafters
bash runs/drafters.sh "$base" "$out/drafters" "${DRAFTER_SECONDS:-900}"   # and their tables

# -- scores
if [ "${EVAL:-1}" = 1 ]; then
    [ -f "$out/eval/report.json" ] || hyperbagel eval toybox --model "$base" --out "$out/eval"
    students=()
    for name in cfg reflow tscd refl-six "${runs[@]}" adp refl; do
        students+=(--student "$name=$out/$name/export")
    done
    [ -f "$out/eval-distillation/report.json" ] || hyperbagel eval distillation --model "$base" --out "$out/eval-distillation" \
        "${students[@]}" --n-t2i "${N_T2I:-2000}" --n-edits "${N_EDITS:-1000}"
fi

# -- the model that ships
if [ "${INSTALL:-0}" = 1 ]; then
    assets=hyperbagel/assets/toybox
    for file in "$base"/*.*; do
        cp "$file" "$assets/$(basename "$file")"
    done
    hyperbagel install "$six" --model "$assets" --name 6 --nfe 6
    hyperbagel install "$one" --model "$assets" --name 1
    rm -rf "$assets/planner"   # of another base
    [ -z "$planner" ] || hyperbagel install "$planner" --model "$assets"
    NO_TABLES=1 SHIP="${SHIP:-block}" bash runs/drafters.sh "$assets" "$out/drafters"
fi
