#!/usr/bin/env bash
# On a machine with a GPU: the kernel tests for real, then the benchmarks; under eight minutes.
#   bench/gpu.sh [RESULTS]
# RESULTS: where the result files go, not bench/results. PYTHON: which python, not python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-bench/results}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import torch; torch.cuda.get_device_name()' || {
    echo "bench/gpu.sh: this python finds no CUDA device" >&2
    exit 1
}
timeout 150 "$python" -m pytest -q -p no:cacheprovider \
    tests/test_kernel_*.py tests/test_ops.py tests/test_ring.py tests/test_device_packing.py
timeout 210 "$python" -m bench.gpu.kernels --results "$results"
timeout 110 "$python" -m bench.gpu.loading --results "$results"
