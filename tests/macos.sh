#!/usr/bin/env bash
# Whether the CPU sources compile for macOS on arm64, by zig's clang and Apple's headers; nothing is linked or run.
# Needs, in the Python named, ziglang and torch, whose headers are the same everywhere.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} built=build/macos
includes=$("$python" -c "
import sysconfig
from torch.utils.cpp_extension import include_paths
print(*('-isystem' + path for path in (*include_paths(), sysconfig.get_path('include'))))")
export includes
mkdir -p $built

compile() {  # SOURCE; flags as in setup.py, but quick
  # shellcheck disable=SC2086
  "$python" -m ziglang c++ -target aarch64-macos -O1 -std=c++17 -Wall -Werror -Wno-psabi -Icsrc $includes \
    -DFUSEDATTN_LEVEL=default_ -DTORCH_EXTENSION_NAME=_C -DTORCH_TARGET_VERSION=0x020b000000000000 \
    -DTORCH_STABLE_ONLY -c "$1" -o "$built/$(tr / _ <<<"$1").o"
}
export -f compile
sources=(csrc/module.cpp csrc/library.cpp csrc/common/*.cpp csrc/*/cpu.cpp csrc/*/cpu_kernel*.cpp)
printf '%s\n' "${sources[@]}" | xargs -P 2 -I{} bash -c 'compile {}'
echo "${#sources[@]} sources compile for macOS"
