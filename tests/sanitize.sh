#!/usr/bin/env bash
# The kernel tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, and emulated CUDA kernels
# under sanitizers. `make sanitize` runs it with the project's environment on PATH.
# At the best CPU level and at the default one, on the cases that show a parameter a new value (choose.py): `make test`
# has compared the results of all of them, on memory filled with NaN. FUSEDATTN_TESTS=all takes all levels and cases.
set -euo pipefail
cd "$(dirname "$0")/.."
built=$PWD/build/sanitize

export OMP_WAIT_POLICY=passive  # a worker per core, whose two threads must not spin while they wait
workers="--numprocesses auto --maxprocesses 8"
export FUSEDATTN_TESTS=${FUSEDATTN_TESTS:-values}
levels=$(python -m fusedattn.info --levels)
[[ $FUSEDATTN_TESTS == all ]] || levels=$(printf '%s\n' ${levels%% *} default | sort -u)

echo "== CUDA kernels in the emulator, under AddressSanitizer and ThreadSanitizer"
pytest -q $workers -m sanitizers tests/test_cuda_emulator.py

echo "== building with sanitizers into build/sanitize"
names=$(printf '%s,' $levels)
FUSEDATTN_SANITIZE=${names%,} FUSEDATTN_CUDA=0 python setup.py -q build --build-base "$built" --build-lib "$built/lib" --build-temp "$built/temp"

run() {  # libstdc++ beside libasan, so that the interceptor of C++ exceptions finds what it wraps
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
    PYTHONPATH="$built/lib" FUSEDATTN_CPU_CAPABILITY="$1" "${@:2}"
}

# A tensor that claims more than its storage holds must be caught, else a clean run below proves nothing.
overrun='
import pathlib, sys, torch, fusedattn
assert str(pathlib.Path(fusedattn.__file__).resolve()).startswith(sys.argv[1]), fusedattn.__file__
key = torch.ones(1, 1, 8, 64)
value = key.clone()
key.untyped_storage().resize_(256)
fusedattn.additive_attention(value, key, value, torch.ones(64))
'
cd build  # where the tree itself cannot be imported
check() {  # LEVEL
  run "$1" python -c "$overrun" "$built" >"$built/overrun_$1.txt" 2>&1 || true
  if ! grep -q "AddressSanitizer: heap-buffer-overflow" "$built/overrun_$1.txt"; then
    cat "$built/overrun_$1.txt" >&2
    echo "a planted overrun was not caught" >&2
    exit 1
  fi
  echo "a planted overrun is caught"
  # --capture=sys: a report that ends the process is printed, not captured. AddressSanitizer keeps freed memory,
  # so peak memory means nothing here.
  run "$1" pytest --capture=sys -m levels -k "not linear_memory" $(grep -l "pytest.mark.levels" ../tests/test_*.py)
}

# Side by side, a process each: a report ends the process that it is of.
jobs=()
for level in $levels; do
  (check "$level") >"$built/$level.txt" 2>&1 & jobs+=($!)
done
failed=
for level in $levels; do
  wait "${jobs[0]}" || failed=yes
  jobs=("${jobs[@]:1}")
  echo "== sanitizers at CPU level $level"
  cat "$built/$level.txt"
done
[[ -z $failed ]]
