#!/bin/sh
# On a machine with a CUDA device: run the tests that need one, measure the stall for 5, 10 and 20 GB,
# and try each of ColossalAI's plugins for docs/colossalai.md.
# Elsewhere print why nothing is run, and succeed.
#
#   scripts/gpu_check.sh [PYTHON [RESULTS.json]]
set -eu
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
results=${2:-bench-results/plugins-gpu.json}
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
failed=0 # a failure does not stop the rest
"$python" -m pytest -m gpu tests/gpu || failed=1
for gigabytes in 5 10 20; do
    timeout 900 "$python" benchmarks/gpu_stall.py --size "${gigabytes}000" || failed=1
done
if "$python" -c 'import colossalai' 2>/dev/null; then
    mkdir -p "$(dirname "$results")"
    "$python" scripts/plugins.py try "$results" || failed=1
else
    echo "gpu_check: $python has no ColossalAI: plugins skipped"
fi
exit $failed
