"""What the vendor's data sheets say of the GPUs that the gates and the model on paper speak of."""

from dataclasses import dataclass

ISSUE_LANES = 128  # of a multiprocessor: 4 schedulers issue one instruction of 32 threads each, per clock
MUFU_LANES = 16
LATENCY = 700e-9  # until memory answers under load, or so: an assumption, no data sheet says


@dataclass(frozen=True)
class Device:
    name: str
    arch: str
    multiprocessors: int
    clock: float  # boost, Hz
    fp32_lanes: int  # of a multiprocessor
    bandwidth: float  # bytes/s

    @property
    def slots_per_byte(self) -> float:
        """Instructions that the device issues, counted per thread, while its memory moves a byte."""
        return ISSUE_LANES * self.multiprocessors * self.clock / self.bandwidth


# The SXM modules; the clock is the one that their peak float32 rate implies.
DEVICES = (
    Device("A100", "sm_80", 108, 1.41e9, 64, 2.039e12),
    Device("H100", "sm_90", 132, 1.98e9, 128, 3.35e12),
    Device("H200", "sm_90", 132, 1.98e9, 128, 4.8e12),
    Device("B200", "sm_100", 148, 1.965e9, 128, 8.0e12),
)
