#!/usr/bin/env bash
# Measures the engine on a machine with one NVIDIA GPU and nothing to download: see gpu.py.
#
#   benchmarks/gpu.sh --fetch      beforehand, with a network: wheels of all pins into WHEELS
#   benchmarks/gpu.sh [OUT]        writes OUT/gpu.json, in ten minutes at most
#
# Needs a Python with the CUDA build of torch; everything else comes from WHEELS.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-.gpu-wheels}
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = "--fetch" ]; then
    # All pins but torch and its CUDA libraries, which the GPU machine has.
    PINS=$(mktemp)
    grep -vE '^(torch|nvidia-|triton)' constraints.txt >"$PINS"
    "$PYTHON" -m pip download --no-deps --dest "$WHEELS" -r "$PINS"
    exit
fi

OUT=${1:-gpu-results}
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
if ! "$PYTHON" -c 'import bitsandbytes, peft, transformers, accelerate, psutil' 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
timeout 600 "$PYTHON" -m benchmarks.gpu --json "$OUT/gpu.json"
