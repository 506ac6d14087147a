#!/usr/bin/env bash
# The CPU kernels on aarch64 without such a machine: compiled by GCC and by clang, run under qemu-user, their results
# compared with those of this machine's default level. Needs qemu-aarch64, aarch64-linux-gnu-g++ and, in the Python
# named, ziglang.
set -euo pipefail
cd "$(dirname "$0")/.."
zig=("${1:-python}" -m ziglang c++ -target aarch64-linux-gnu)
gcc=(aarch64-linux-gnu-g++)
built=build/aarch64
rm -rf $built
mkdir -p $built/{here,gcc,clang}

compile() {  # FOLDER SOURCE COMPILER...; flags as in setup.py
  "${@:3}" -O3 -std=c++17 -Wall -Werror -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-warning-option \
    -ffp-contract=fast -fno-math-errno -fno-trapping-math -Icsrc -DFUSEDATTN_LEVEL=default_ -c "$2" -o "$1/$(tr / _ <<<"$2").o"
}
of_the_extension() {  # FOLDER SOURCE: what it was made of, where that is newer than all sources
  local object
  object=$(echo build/temp*/levels/"$(basename "$(dirname "$2")")_$(basename "$2" .cpp)_default.o")
  [[ -e $object && -z $(find csrc setup.py -newer "$object" -print -quit) ]] && cp "$object" "$1"
}
for source in csrc/*/cpu_kernel*.cpp; do
  jobs=()
  of_the_extension $built/here "$source" || compile $built/here "$source" c++ & jobs+=($!)
  compile $built/gcc "$source" "${gcc[@]}" & jobs+=($!)
  compile $built/clang "$source" "${zig[@]}" & jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job"; done
done
for source in tests/aarch64/*.cpp; do
  compile $built/here "$source" c++ & there=$!
  compile $built "$source" "${gcc[@]}"
  wait $there
done
c++ $built/here/*.o -o $built/kernels
$built/kernels write $built/results

# Nothing below proves anything unless a result that differs is caught: here the first and the last, huge.
last=$(($(stat -c %s $built/results) / 8 - 1))
for place in 0 $last; do
  cp $built/results $built/planted_$place
  printf '\377\377\377\377\377\377\357\177' | dd of=$built/planted_$place bs=8 seek="$place" conv=notrunc status=none
done
for compiler in gcc clang; do
  "${gcc[@]}" -static $built/$compiler/*.o $built/*.o -o $built/kernels_$compiler
  run=(qemu-aarch64 -cpu cortex-a57 $built/kernels_$compiler compare)
  for place in 0 $last; do
    if "${run[@]}" $built/planted_$place >/dev/null; then
      echo "a planted difference was not caught: result $place" >&2
      exit 1
    fi
  done
  printf '%s: ' $compiler
  "${run[@]}" $built/results
done
