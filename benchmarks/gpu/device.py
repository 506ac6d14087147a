"""The GPU that is measured, or in a rehearsal the CPU: what it is, and how long work takes on it."""

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence

import torch

from fusedattn import _dispatch

from .. import machine
from .stages import rehearsing

ASKED = {  # fields of the stamp, by nvidia-smi's names
    "driver": "driver_version",
    "max_sm_mhz": "clocks.max.sm",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_watt": "power.limit",
}
DEVICE = torch.device("cpu" if rehearsing() else "cuda")


def backends() -> dict[str, list[str]]:
    """The backends to ask about, each with why it cannot run here."""
    if rehearsing():
        return {"cpu": _dispatch.cpu_reasons(DEVICE, torch.float32)}
    return {
        "cuda": _dispatch.cuda_reasons(DEVICE, torch.float32),
        "triton": _dispatch.triton_reasons(DEVICE, torch.float32),
    }


def usable() -> list[str]:
    return [name for name, reasons in backends().items() if not reasons]


def parse(answer: str) -> dict[str, str | None]:
    """The first line of nvidia-smi's answer; None for what it does not know, which it sets in brackets."""
    fields = [field.strip() for field in answer.partition("\n")[0].split(",")]
    if len(fields) != len(ASKED):
        return dict.fromkeys(ASKED)
    return {name: None if not x or x.startswith("[") else x for name, x in zip(ASKED, fields, strict=True)}


def ask() -> dict[str, str | None]:
    """What nvidia-smi says, if it is there."""
    query = ["nvidia-smi", f"--query-gpu={','.join(ASKED.values())}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(ASKED)
    return parse(answer.stdout if answer.returncode == 0 else "")


def stamp() -> dict:
    if rehearsing():
        return machine.stamp() | {"gpu": None, "multiprocessors": None} | dict.fromkeys(ASKED)
    properties = torch.cuda.get_device_properties(0)
    return machine.stamp() | {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "cuda": torch.version.cuda,
        **ask(),
    }


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Gives back what a failed contender held."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def replayed(step: Callable, call_microseconds: float) -> tuple[Callable, str]:
    """The step as the device alone does it, without Python, and how: a graph where Python would be in the way.

    Where the device takes much longer than a call, calls follow each other without a gap, and a graph would only
    hold memory, gigabytes for eager attention.
    """
    if DEVICE.type != "cuda" or 1e3 * milliseconds(step, 3, filled=True) > 5 * call_microseconds:
        return step, "calls"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = step()
    except RuntimeError as error:
        torch.cuda.synchronize()
        return step, f"queue ({brief(error)})"

    def replay(kept=kept):  # a graph writes where its outputs lie
        graph.replay()

    return replay, "graph"


def milliseconds(run: Callable, repeats: int, filled: bool = False) -> float:
    """Of one of several runs. ``filled``: the device first sleeps while the runs are queued."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return 1e3 * (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if filled:
        torch.cuda._sleep(20_000_000)  # clocks: some 10 ms
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats


def call_microseconds(step: Callable, calls: int = 15, seconds: float = 0.3) -> float:
    """What a call costs the CPU, with nothing in the device's queue: the median."""
    found, enough = [], time.perf_counter() + seconds
    while not found or (len(found) < calls and time.perf_counter() < enough):
        synchronize()
        start = time.perf_counter()
        step()
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)


def peak_bytes(step: Callable) -> int | None:
    """What a step takes beyond what is held before."""
    if DEVICE.type != "cuda":
        step()
        return None
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - held


def normal_like(layouts: Sequence[torch.Tensor], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Random tensors of these shapes and strides, made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=DEVICE) for t in layouts]
    return [t.normal_(generator=generator) for t in made]
