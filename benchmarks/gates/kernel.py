"""One compiled kernel, as the table shows it and as counts.json stores it."""

import re
from dataclasses import asdict, dataclass, fields

from . import sass
from .occupancy import MAX_WARPS

DTYPES = {"float": "float32", "double": "float64", "half": "float16", "bfloat16": "bfloat16"}
DTYPES |= {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}

STREAMS = ("film", "gated_film")  # ops whose kernels do little but read and write
ATTENTION = ("additive_attention", "additive_attention_varlen")  # those whose kernels count by tanh


@dataclass(frozen=True)
class Kernel:
    backend: str  # "CUDA C++" or "Triton"
    op: str
    name: str
    arch: str  # sm_90, gfx942
    threads: int  # of a block, at most
    registers: int  # of a thread; on AMD the vector registers
    shared: int | None  # bytes of a block; not known of a CUDA C++ kernel that launches.cpp does not reach
    occupancy: float | None  # part of the warps a multiprocessor could hold
    stack: int  # bytes of a thread: spilled registers, and arrays the compiler could not keep in registers
    local: int  # instructions that touch them; on AMD spilled vector registers
    scalar_registers: int | None = None  # AMD
    scalar_spills: int = 0  # AMD: scalar registers kept in lanes of vector registers, not in memory
    slots: float | None = None  # instructions of the score loop per tanh; on AMD those of the vector unit
    mufu: float | None = None  # of those, for the special function unit (AMD: transcendental)
    fp32: float | None = None  # of those, for the FP32 lanes; a packed one counts twice
    # STREAMS: bytes of the global accesses in the main loop, each once; without a loop, of the stores.
    widths: tuple[int, ...] = ()
    in_flight: int = 0  # bytes of global memory that a thread waits for at a time, in its main loop
    aligned: bool = True  # compiled for rows or runs of a multiple of 16 bytes
    oldest: bool = False  # compiled by the oldest Triton supported

    @property
    def dtype(self) -> str:
        """Of its inputs, by its name: kernel<float, 4>, kernel-32x64-fp32-i64."""
        found = re.search(r"<(\w+)|-(fp\d+|bf\d+)", self.name)
        return DTYPES[found[1] or found[2]]

    @property
    def tile(self) -> tuple[int, ...]:
        """Triton's blocks, by its name."""
        return tuple(map(int, self.name.split("-")[1].split("x")))

    @property
    def waiting(self) -> float:
        """Bytes that a multiprocessor waits for at a time: what its memory must answer, to keep its rate."""
        arch = int(self.arch.removeprefix("sm_"))
        return self.in_flight * 32 * MAX_WARPS[arch] * (self.occupancy or 0)

    @property
    def section(self) -> str:
        """Of the table."""
        return f"{self.backend}, oldest supported" if self.oldest else self.backend

    @classmethod
    def from_sass(cls, function: sass.Function, **known) -> "Kernel":
        score = function.score_loop() if known["op"] in ATTENTION else None
        memory = function.memory_loop() if known["op"] in STREAMS else None
        counts = {}
        if score is not None:
            counts = {name: getattr(score, name) / score.tanh for name in ("slots", "mufu", "fp32")}
        widths: list[int] = []
        if known["op"] in STREAMS:
            widths = function.body.store_widths if memory is None else memory.global_widths
        known |= dict(in_flight=function.in_flight(), widths=tuple(sorted(set(widths))))
        return cls(**known, local=function.body.local, **counts)

    @classmethod
    def from_json(cls, values: dict) -> "Kernel":
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        return cls(**{**values, "widths": tuple(values.get("widths", ()))})

    def to_json(self) -> dict:
        return asdict(self)
