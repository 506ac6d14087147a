#!/usr/bin/env bash
# `make gpu`: on a machine with an NVIDIA GPU, torch and nvcc, and perhaps no network: builds in place for this GPU,
# runs the tests on it, compute-sanitizer over a few, and the benchmark. Every step runs; the status is 1 if one
# failed. PYTHON: with torch, numpy, pytest and hypothesis (pybind11 and ninja for the emulator). OUTPUT: a folder.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${OUTPUT:-benchmarks/results/gpu}
mkdir -p "$output"
export PYTHONPATH=$PWD MAX_JOBS=${MAX_JOBS:-$(nproc)}
# The references' matrix products must repeat too.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

failed=()
step() {  # name, seconds it may take, command...
  printf '\n==== %s (%d s)\n' "$1" "$SECONDS"
  timeout "$2" "${@:3}" 2>&1 | tee "$output/$1.log"
  local status=${PIPESTATUS[0]}
  [[ $status == 0 ]] || { failed+=("$1 (status $status)"); return 1; }
}

capability=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))' 2>/dev/null) ||
  { echo "torch finds no CUDA device" >&2; exit 1; }
TORCH_CUDA_ARCH_LIST=$capability FUSEDATTN_CUDA=1 step build 120 "$python" setup.py -q build_ext --inplace || exit 1
"$python" -m fusedattn.info

tests=(tests/test_cuda.py tests/test_film.py tests/test_additive_attention.py tests/test_modules.py
  tests/test_integration.py)
FUSEDATTN_TEST_DEVICE=cuda step tests 210 "$python" -m pytest -q "${tests[@]}"

# Without torch's caching allocator, which hides where one tensor ends and the next begins.
some='test_matches_the_reference and float32 or test_other_strides'
for tool in memcheck racecheck; do
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FUSEDATTN_TEST_DEVICE=cuda step "$tool" 45 \
    compute-sanitizer --tool "$tool" --error-exitcode 3 \
    "$python" -m pytest -q -x tests/test_film.py tests/test_additive_attention.py -k "$some"
done

step benchmark 180 "$python" -m benchmarks.gpu --output "$output"

if ((${#failed[@]})); then
  printf '\nfailed: %s\n' "${failed[@]}" >&2
  exit 1
fi
printf '\nall steps passed in %d s; results in %s\n' "$SECONDS" "$output"
