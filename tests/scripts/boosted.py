"""A loop that trains a setup of tests/plugins.py, and notes the state that each rank ends with.

--results.RANK gets a line per incarnation that comes to the end: the step it began at, the digests.
"""

import argparse
import json
import os
import time

import colossalai
import torch.distributed as dist

from elastic_ckpt import load_checkpoint, save_checkpoint, should_save
from tests.plugins import BATCH, build, digests, named, quiet, train


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--setup", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--calm", default="", help="a file: before it is there, steps take longer")
    parser.add_argument("--results", required=True)
    args = parser.parse_args()
    with quiet():
        colossalai.launch_from_torch(verbose=False)
    built = build(named(args.setup))
    directory = os.environ["ELASTIC_CKPT_DIR"]
    with quiet():
        _, start, _ = load_checkpoint(directory, *built.state)
    for step in range(start + 1, args.steps + 1):
        train(built, step, step + 1)
        if should_save(step, every=args.every):
            with quiet():
                save_checkpoint(directory, *built.state, 0, step, BATCH, None)
        time.sleep(0.2 if args.calm and not os.path.exists(args.calm) else 0.0)
    with open(f"{args.results}.{dist.get_rank()}", "a") as file:
        file.write(json.dumps([start, digests(built)]) + "\n")


if __name__ == "__main__":
    main()
