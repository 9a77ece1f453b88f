"""A job that imports given modules, after recording which of them are already imported.

Rank 0 writes to --entry: the modules found, the files that they came from at last, and the
environment.
"""

import argparse
import contextlib
import importlib
import json
import os
import sys

ENTRY_ENVIRONMENT = dict(os.environ)
ENTRY_MODULES = set(sys.modules)


def main():
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    from elastic_ckpt import ElasticSampler, Session

    parser = argparse.ArgumentParser()
    parser.add_argument("--entry")
    parser.add_argument("modules", nargs="*")
    args = parser.parse_args()
    files = {}
    for name in args.modules:
        with contextlib.suppress(RuntimeError):
            files[name] = importlib.import_module(name).__file__
    there = [name for name in args.modules if name in ENTRY_MODULES]
    with open(args.entry, "w") as file:
        json.dump({"there": there, "files": files, "environment": ENTRY_ENVIRONMENT}, file)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.ones(4, 1)
    loader = DataLoader(data, sampler=ElasticSampler(data, seed=1))
    with Session(model=model, optimizer=optimizer) as session:
        for _ in session.epochs(1):
            for batch in session.batches(loader):
                model(batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()


if __name__ == "__main__":
    main()
