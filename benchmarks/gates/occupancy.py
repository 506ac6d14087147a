"""Warps that fit on a multiprocessor, from what a kernel asks for.

Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". Granularity:
registers are given to a warp in units of 256, shared memory in units of 128 bytes (256 before 8.0), with 1 KiB per
block kept by the system from 8.0 on (cuda_occupancy.h of the CUDA toolkit).
"""

from dataclasses import dataclass

REGISTERS = 65536
REGISTER_UNIT = 256
SHARED_RESERVED = 1024
MAX_BLOCKS = {75: 16, 80: 32, 90: 32, 100: 32, 120: 24}
MAX_WARPS = {75: 32, 80: 64, 90: 64, 100: 64, 120: 48}
MAX_SHARED = {75: 64 << 10, 80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
PARTITIONS = 4  # each has a quarter of the registers, and a warp lives in one


@dataclass(frozen=True)
class Occupancy:
    blocks: int
    warps: int
    max_warps: int

    @property
    def fraction(self) -> float:
        return self.warps / self.max_warps


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: int, threads: int, registers: int, shared: int) -> Occupancy:
    """Blocks and warps resident on a multiprocessor of sm_<arch>; shared memory in bytes per block."""
    if arch not in MAX_WARPS:
        raise ValueError(f"arch: expected one of {sorted(MAX_WARPS)}, got {arch}")
    warps = -(-threads // 32)
    reserved, unit = (0, 256) if arch < 80 else (SHARED_RESERVED, 128)
    per_partition = REGISTERS // PARTITIONS // _up(max(registers, 1) * 32, REGISTER_UNIT)
    limits = (
        MAX_BLOCKS[arch],
        MAX_WARPS[arch] // warps,
        per_partition * PARTITIONS // warps,
        MAX_SHARED[arch] // _up(max(shared + reserved, 1), unit),
    )
    blocks = min(limits)
    return Occupancy(blocks, blocks * warps, MAX_WARPS[arch])
