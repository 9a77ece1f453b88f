#!/bin/sh
# On a machine with a CUDA device: the tests that need one, ColossalAI's plugins among them; the
# stall of 5, 10 and 20 GB; and what comes of each plugin, for docs/colossalai.md.
# Elsewhere it says why it does nothing, and succeeds.
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
failed=0 # what fails keeps nothing else from being tried
"$python" -m pytest -m gpu tests/gpu || failed=1
for gigabytes in 5 10 20; do
    timeout 900 "$python" benchmarks/gpu_stall.py --size "${gigabytes}000" || failed=1
done
if "$python" -c 'import colossalai' 2>/dev/null; then
    mkdir -p "$(dirname "$results")"
    "$python" scripts/plugins.py try "$results" || failed=1
else
    echo "gpu_check: $python has no ColossalAI, whose plugins were not tried"
fi
exit $failed
