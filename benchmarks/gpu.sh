#!/usr/bin/env bash
# Measures the engine on a CUDA device: NF4 step against stock peft and an unquantised base, on
# random-initialised Llamas, with memory capped to a 24 GB card.
#
# Needs a Python with the CUDA build of torch. Everything else comes from wheels in WHEELS (default
# .gpu-wheels), so that a machine without a network can run it. Make them beforehand with
#   pip download --no-deps --dest .gpu-wheels bitsandbytes==0.50.2 transformers==5.23.0 …
# or, for all that constraints.txt names: benchmarks/gpu.sh --fetch
#
#   benchmarks/gpu.sh [OUT]        writes OUT/training-1b.json, OUT/training-7b.json
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-.gpu-wheels}
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = "--fetch" ]; then
    # All pins but torch and its CUDA libraries, which the GPU machine has.
    grep -vE '^(torch|nvidia-|triton)' constraints.txt >"${TMPDIR:-/tmp}/gpu-pins.txt"
    "$PYTHON" -m pip download --no-deps --dest "$WHEELS" -r "${TMPDIR:-/tmp}/gpu-pins.txt"
    exit
fi

OUT=${1:-gpu-results}
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
if ! "$PYTHON" -c 'import bitsandbytes, peft, transformers' 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" "$WHEELS"/*.whl
fi
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
for model in 1b 7b; do
    "$PYTHON" benchmarks/training_step.py --model "$model" --device cuda --threads 8 \
        --batch-size 32 --tokens 512 --micro-tokens 4096 --max-memory-gb 24 \
        --json "$OUT/training-$model.json"
    cat "$OUT/training-$model.json"
done
# The fingerprint must not depend on the device (TRAINING, "The stack", 1).
"$PYTHON" - <<'PY'
import torch
from quant.base_model import load_base
from quant.tiny import EMBEDDED_NAME

found = [
    load_base(EMBEDDED_NAME, device=torch.device(device)).description.base.fingerprint.hex()
    for device in ("cpu", "cuda")
]
print("fingerprint cpu == cuda:", found[0] == found[1], found)
PY
