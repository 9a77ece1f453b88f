"""Check that the built wheel works without ColossalAI and without the source tree."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "torch_ddp.py"
COMMAND = str(Path(sysconfig.get_path("scripts")) / "elastic-ckpt")


def main() -> int:
    """Run the main commands once, outside the source tree."""
    if importlib.util.find_spec("colossalai") is not None:
        print("this environment has ColossalAI: use one without it")
        return 1
    with tempfile.TemporaryDirectory() as directory:
        path = run(
            [sys.executable, "-c", "import elastic_ckpt; print(elastic_ckpt.__file__)"], directory
        )
        if "site-packages" not in path:
            print(f"the package comes from {path}, not from the wheel")
            return 1
        job = str(Path(directory) / "job")
        run([COMMAND, "--help"], directory)
        run([COMMAND, "run", "--dir", job, "--nproc", "2", "--", str(EXAMPLE)], directory)
        status = json.loads(run([COMMAND, "status", job, "--json"], directory))
        listed = json.loads(run([COMMAND, "list", job, "--json"], directory))
        run([COMMAND, "verify", job, "--full"], directory)
    steps = 3 * 1024 // (16 * 2)
    ok = status["state"] == "finished" and listed[0]["step"] == steps and listed[0]["intact"]
    print(f"wheel: {status['state']} at step {listed[0]['step']}, {len(listed)} checkpoints intact")
    return 0 if ok else 1


def run(command: list[str], directory: str) -> str:
    """Return a command's output; exit if it fails."""
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{command} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
