"""A copy of the CUDA kernels with bugs in it: a clean run proves nothing unless the same tests report each bug.

All bugs are compiled at once, so that one build of a variant serves them all; the module's ``show_bug`` says which
one shows, by its number.
"""

from pathlib import Path

from . import build

# Where, what is replaced by what; SHOWN is whether this bug shows.
BUGS = {
    "overrun-of-an-array": (
        "film/cuda_problem.cuh",
        "packs = (task.length - head) / W,",
        "packs = (task.length - head) / W + SHOWN,",
    ),
    "overrun-of-shared-memory": (
        "film/cuda_bwd.cuh",
        "FILM_BLOCK / gpu::WARP * sizeof(T), stream",
        "FILM_BLOCK / gpu::WARP * sizeof(T) - SHOWN, stream",
    ),
    "missing-barrier": (
        "film/cuda_bwd.cuh",
        "shared[threadIdx.x / gpu::WARP] = x;\n  __syncthreads();",
        "shared[threadIdx.x / gpu::WARP] = x;\n  if (!SHOWN) __syncthreads();",
    ),
    "missing-barrier-between-tiles": (
        "additive_attention/cuda_fwd.cuh",
        "      __syncthreads();\n      const int depth",
        "      if (!SHOWN) __syncthreads();\n      const int depth",
    ),
    "barrier-after-an-early-return": (
        "film/cuda_bwd.cuh",
        "  T sum_dz_x = T(0), sum_dz = T(0);\n",
        "  T sum_dz_x = T(0), sum_dz = T(0);\n  if (SHOWN && task.thread > 200) return;\n",
    ),
    "elements-left-unwritten": (
        "film/cuda_problem.cuh",
        "scalars = task.length - packs * W;",
        "scalars = SHOWN ? head : task.length - packs * W;",
    ),
    "wrong-mask": (
        "additive_attention/cuda_problem.cuh",
        "(j < keys.first || j >= keys.end) return",
        "(j < keys.first || j >= keys.end - SHOWN) return",
    ),
    "tile-of-a-window-left-out": (
        "additive_attention/cuda_fwd.cuh",
        "for (int64_t j0 = keys.first; j0",
        "for (int64_t j0 = keys.first + SHOWN * BLOCK_K; j0",
    ),
}


def number(bug: str) -> int:
    return list(BUGS).index(bug) + 1


def sources() -> Path:
    """The copy, of which only what has changed is written."""
    folder = build.ROOT / "build" / "cuda_emulator" / "planted" / "csrc"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {path: path.read_text() for path in (build.ROOT / "csrc").rglob("*.*h")}
    for bug, (file, right, wrong) in BUGS.items():
        path = build.ROOT / "csrc" / file
        if (found := texts[path].count(right)) != 1:
            raise ValueError(f"{bug}: expected {right!r} once in {file}, found it {found} times")
        shown = f"cuda_emulator::bug_shows({number(bug)})"
        texts[path] = texts[path].replace(right, wrong.replace("SHOWN", shown))
    with build.locked(folder):
        for path, text in texts.items():
            copy = folder / path.relative_to(build.ROOT / "csrc")
            if not copy.exists() or copy.read_text() != text:
                copy.parent.mkdir(exist_ok=True)
                copy.write_text(text)
    return folder
