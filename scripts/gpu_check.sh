#!/bin/sh
# On a machine with a CUDA device: the tests that need one, and the stall of 5, 10 and 20 GB.
# Elsewhere it says why it does nothing, and succeeds.
#
#   scripts/gpu_check.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
[ -x "$python" ] || python=python3

if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "gpu_check: skipped, $python has no torch"
    exit 0
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: skipped, there is no CUDA device"
    exit 0
fi

PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
"$python" -m pytest -m gpu tests/gpu
for gigabytes in 5 10 20; do
    timeout 900 "$python" benchmarks/gpu_stall.py --size "${gigabytes}000"
done
