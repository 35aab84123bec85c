#!/usr/bin/env bash
# On a machine with a GPU: the kernel tests for real, then the benchmarks; under eleven minutes.
#   bench/gpu.sh [RESULTS]
# RESULTS: where the result files go, not bench/results. PYTHON: which python, not python3.
# LIMITS: seconds for tests, kernels, loading and serving, not "165 200 80 160"; 0 leaves one out.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${1:-bench/results}
read -r for_tests for_kernels for_loading for_serving _ <<<"${LIMITS:-165 200 80 160} 0 0 0"
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
"$python" -c 'import torch; torch.cuda.get_device_name()' || {
    echo "bench/gpu.sh: this python finds no CUDA device" >&2
    exit 1
}
zoo=$(mktemp -d)
trap 'rm -rf "$zoo"' EXIT
# What the benchmarks need is made beside the tests: their kernels compiled, their files written.
making=()
for part in model reconstruction encoding sparse counting shapes; do
    timeout "$for_tests" "$python" -m bench.gpu.kernels --try "$part" >/dev/null 2>&1 &
    making+=($!)
done
timeout "$for_tests" "$python" -m bench.gpu.loading --zoo "$zoo" --make &
making+=($!)
# Most of the tests' time is compiling a kernel for each mix of dtypes: several processes, where
# pytest-xdist is there. What compiles for other GPUs is left to machines without one. Versions are
# not the pinned ones there: what they warn of is shown, and is no error.
several=$("$python" -c 'import os, xdist; print(f"-n {min(os.cpu_count() or 1, 12)}")' 2>/dev/null)
failed=0
# shellcheck disable=SC2086
[ "$for_tests" = 0 ] || timeout -s INT -k 25 "$for_tests" "$python" -m pytest -q -p no:cacheprovider -W default \
    --continue-on-collection-errors $several -k "not arch and not amd" \
    tests/test_kernel_*.py tests/test_ops*.py tests/test_ring.py tests/test_device_packing.py \
    tests/test_merge_device.py tests/test_serving*.py ||
    { echo "bench/gpu.sh: the kernel tests failed, or took too long" >&2 && failed=1; }
wait "${making[@]}"
# A speedup is worth nothing beside a failed test, but what was measured tells where to look.
[ "$for_kernels" = 0 ] || timeout -k 5 "$for_kernels" "$python" -m bench.gpu.kernels --results "$results" || failed=1
[ "$for_loading" = 0 ] ||
    timeout -k 5 "$for_loading" "$python" -m bench.gpu.loading --zoo "$zoo" --results "$results" ||
    failed=1
[ "$for_serving" = 0 ] ||
    timeout -k 5 "$for_serving" "$python" -m bench.gpu.serving --results "$results" || failed=1
exit "$failed"
