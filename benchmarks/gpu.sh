#!/usr/bin/env bash
# Measures the engine on a machine with one NVIDIA GPU and nothing to download: see gpu.py.
#
#   benchmarks/gpu.sh --fetch      beforehand, with a network: the wheels that gpu.py imports
#   benchmarks/gpu.sh [OUT]        writes OUT/gpu.json, in ten minutes at most
#
# Needs a Python with the CUDA build of torch and numpy; everything else comes from WHEELS. CUDA=130
# keeps that build of bitsandbytes' library alone, where the wheels must stay small; FOR=3.12 fetches
# for another Python than this one, SKIP='scipy attrs' leaves out what the machine has. ARGS go to
# gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
WHEELS=${WHEELS:-.gpu-wheels}
PYTHON=${PYTHON:-python3}
CUDA=${CUDA:-}
FOR=${FOR:-}
ARGS=${ARGS:-}
SKIP=${SKIP:-}
NEEDED='absl-py accelerate annotated-types anyio attrs bitsandbytes cffi cryptography dp-accounting
    filelock h11 http-message-signatures http-sf httpcore2 httpx2 huggingface-hub idna
    markdown-it-py mdurl packaging peft psutil pycparser pydantic pydantic-core pygments pyyaml
    regex rfc8785 rich safetensors scipy sqlalchemy structlog tokenizers tqdm transformers
    truststore typing-inspection'

if [ "${1:-}" = "--fetch" ]; then
    rm -rf "$WHEELS"
    platforms=()
    if [ -n "$FOR" ]; then
        platforms=(--only-binary=:all: --python-version "$FOR" --implementation cp)
        for tag in 2014 _2_17 _2_24 _2_27 _2_28 _2_31 _2_34; do
            platforms+=(--platform "manylinux${tag}_x86_64")
        done
    fi
    for name in $NEEDED; do
        [[ " $SKIP " == *" $name "* ]] && continue
        grep -iE "^$name==" constraints.txt
    done | "$PYTHON" -m pip download --no-deps "${platforms[@]}" --dest "$WHEELS" -r /dev/stdin
    if [ -n "$CUDA" ]; then
        for wheel in "$WHEELS"/bitsandbytes-*.whl; do
            "$PYTHON" - "$wheel" "cuda$CUDA.so" <<'PY'
import sys
import zipfile
from pathlib import Path

path, kept = Path(sys.argv[1]), sys.argv[2]
slim = path.with_suffix(".slim")
with zipfile.ZipFile(path) as whole, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as part:
    for name in whole.namelist():
        is_gpu_library = name.endswith(".so") and ("cuda" in name or "rocm" in name)
        if not is_gpu_library or name.endswith(kept):
            part.writestr(name, whole.read(name))
slim.replace(path)
PY
        done
    fi
    du -sh "$WHEELS"
    exit
fi

OUT=${1:-gpu-results}
mkdir -p "$OUT"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"'
export PYTHONPATH=$PWD HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# All that is imported later too: what is missing must not cost a measurement.
IMPORTS='import benchmarks.gpu, simulations.lab.run'
if ! "$PYTHON" -c "$IMPORTS" 2>/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
    "$PYTHON" -c "$IMPORTS"
fi
# shellcheck disable=SC2086  # ARGS are words
"$PYTHON" -m benchmarks.gpu --json "$OUT/gpu.json" $ARGS
