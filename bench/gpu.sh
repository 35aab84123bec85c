#!/usr/bin/env bash
# On a machine with a GPU: the kernel tests for real, then the benchmarks; under eleven minutes.
#   bench/gpu.sh [RESULTS [PART...]]
# RESULTS: where the result files go, not bench/results. PART: tests, kernels, loading or serving;
# all if none is named. PYTHON: which python, not python3.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-bench/results}
shift || true
parts=" ${*:-tests kernels loading serving} "
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import torch; torch.cuda.get_device_name()' || {
    echo "bench/gpu.sh: this python finds no CUDA device" >&2
    exit 1
}
# Most of the tests' time is compiling a kernel for each mix of dtypes: several processes, where
# pytest-xdist is there. What compiles for other GPUs is left to machines without one.
several=$("$python" -c 'import os, xdist; print(f"-n {min(os.cpu_count() or 1, 12)}")' 2>/dev/null)
failed=0
# shellcheck disable=SC2086
[[ $parts != *" tests "* ]] || timeout -s INT -k 10 165 "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors $several -k "not arch and not amd" \
    tests/test_kernel_*.py tests/test_ops*.py tests/test_ring.py tests/test_device_packing.py \
    tests/test_merge_device.py tests/test_serving*.py ||
    { echo "bench/gpu.sh: the kernel tests failed, or took too long" >&2 && failed=1; }
# A speedup is worth nothing beside a failed test, but what was measured tells where to look.
[[ $parts != *" kernels "* ]] ||
    timeout -k 5 200 "$python" -m bench.gpu.kernels --results "$results" || failed=1
[[ $parts != *" loading "* ]] ||
    timeout -k 5 95 "$python" -m bench.gpu.loading --results "$results" || failed=1
[[ $parts != *" serving "* ]] ||
    timeout -k 5 160 "$python" -m bench.gpu.serving --results "$results" || failed=1
exit "$failed"
