"""Record the launcher's variables, one file per rank and launch; with --by, use ColossalAI.

The first launch ends with a kill of rank 1, so that a restart is recorded, too.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

AT_ENTRY = set(sys.modules)

parser = argparse.ArgumentParser()
parser.add_argument("--by", choices=["torch", "slurm"])
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--restart", action="store_true")
parser.add_argument("--modules", nargs="*", help="report which of these were imported ahead")
args = parser.parse_args()

if args.by:
    import colossalai
    import torch
    import torch.distributed as dist

    if args.by == "torch":
        colossalai.launch_from_torch(verbose=False)
    else:
        port = int(os.environ["MASTER_PORT"])
        colossalai.launch_from_slurm(host=os.environ["MASTER_ADDR"], port=port, verbose=False)
    total = torch.tensor(dist.get_rank() + 1.0)
    dist.all_reduce(total)
    recorded = {"rank": dist.get_rank(), "size": dist.get_world_size(), "total": total.item()}
elif args.modules:
    recorded = {
        "imported": [name for name in args.modules if name in AT_ENTRY],
        "environment": sorted(os.environ),
    }
else:
    recorded = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SLURM", "TORCHELASTIC", "MASTER"))
        or name.endswith(("RANK", "WORLD_SIZE", "ROLE_NAME", "NUM_THREADS"))
    }
launch = os.environ["TORCHELASTIC_RESTART_COUNT"]
temporary = args.out / f".{launch}.{os.environ['RANK']}"
temporary.write_text(json.dumps(recorded))
temporary.rename(args.out / f"{launch}.{os.environ['RANK']}.json")
if args.restart and launch == "0":
    while len(list(args.out.glob("0.*.json"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until it is killed with rank 1
