"""What ElasticCallback adds to a Trainer's step while nothing is asked, beside an empty callback.

usage: callback.py [--calls 20000]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from elastic_ckpt.integrations.transformers import ElasticCallback

ROUNDS = 15


def trainer_in(directory: str, callback: TrainerCallback) -> Trainer:
    """Return a Trainer in training, as its callback sees it."""
    arguments = TrainingArguments(directory, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(torch.nn.Linear(1, 1), arguments, callbacks=[callback])
    handler = trainer.callback_handler
    handler.callbacks = [callback]
    handler.on_train_begin(arguments, trainer.state, trainer.control)
    return trainer


def microseconds(trainer: Trainer, calls: int) -> float:
    """Return the mean duration of ``on_step_end`` as the Trainer calls it."""
    handler, state, control = trainer.callback_handler, trainer.state, trainer.control
    began = time.perf_counter()
    for _ in range(calls):
        state.global_step += 1
        handler.on_step_end(trainer.args, state, control)
    return (time.perf_counter() - began) / calls * 1e6


def measure(calls: int) -> dict[str, float]:
    """Return the median of rounds that alternate, in microseconds per step."""
    found: dict[str, list[float]] = {"empty": [], "elastic": []}
    with tempfile.TemporaryDirectory() as directory:
        made: dict[str, Any] = {
            "empty": trainer_in(str(Path(directory, "empty")), TrainerCallback()),
            "elastic": trainer_in(str(Path(directory, "elastic")), ElasticCallback()),
        }
        for _ in range(ROUNDS):
            for name, trainer in made.items():
                found[name].append(microseconds(trainer, calls))
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    """Print both, and the difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    figures = measure(parser.parse_args().calls)
    print(f"an empty TrainerCallback  {figures['empty']:6.2f} us per step")
    print(f"ElasticCallback           {figures['elastic']:6.2f} us per step")
    print(f"added                     {figures['elastic'] - figures['empty']:6.2f} us per step")


if __name__ == "__main__":
    main()
