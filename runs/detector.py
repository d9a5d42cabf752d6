"""Trains the embedded world's measure anew: the detector that reads scenes in pictures.

    python runs/detector.py FILE.safetensors [STEPS] [FROM.safetensors]

Three rounds made the one that ships (docs/log-to-2026-11-26.md, the last in docs/log.md): 1,500 steps of 48 drawings, then 2,000 and
2,500 of 32, some 25 minutes on one core. The measure is made separately from what it measures, so runs/toybox.sh does not touch it;
`hyperbagel eval toybox` prints how well it reads.
"""

import os
import sys
from pathlib import Path

import torch

from hyperbagel.model.weights import load_tensors, save_tensors
from hyperbagel.toybox.detector_train import train_detector

ROUNDS = ((1500, 48), (2000, 32), (2500, 32))


def main(out: str, steps: str = "", start: str = "") -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rounds = ((int(steps), 32),) if steps else ROUNDS
    state = load_tensors(Path(start)) if start else None
    for seed, (count, batch) in enumerate(rounds):
        state = dict(train_detector(count, seed=seed, batch=batch, initial=state, log=print).state_dict())
        stored = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in state.items()}
        save_tensors(Path(out), stored)  # after each round, so that a stopped run leaves the last one


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
