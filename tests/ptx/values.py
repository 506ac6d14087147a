"""Types of PTX (manual, section 5.2): how a register's bits are read as numbers and written back.

A register is a numpy array with one unsigned integer (or bool, for predicates) per thread. An instruction names
the type it sees in those bits: ``decode`` gives numpy numbers to compute with, ``encode`` the bits of a result.
bfloat16 is computed in float32 and rounded once; packed pairs (f16x2, bf16x2) get a second axis.
"""

import numpy as np

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {"f16": np.float16, "f32": np.float32, "f64": np.float64}

# Name of a type -> its width in bits.
TYPES = {f"{kind}{bits}": bits for kind in "bus" for bits in UNSIGNED}
TYPES |= {"f16": 16, "bf16": 16, "f32": 32, "tf32": 32, "f64": 64, "f16x2": 32, "bf16x2": 32, "pred": 1}


def is_float(type_: str) -> bool:
    return type_ in _FLOAT or type_.startswith(("bf16", "f16", "tf32"))


def unsigned(type_: str) -> type:
    """The numpy type of the bits of ``type_``."""
    return np.bool_ if type_ == "pred" else UNSIGNED[TYPES[type_]]


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """To nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def decode(bits: np.ndarray, type_: str) -> np.ndarray:
    """The numbers in ``bits``; of a register wider than the type, those in its lower part."""
    if type_ == "pred":
        return bits
    wanted = UNSIGNED[TYPES[type_]]
    if bits.dtype != wanted:
        if bits.dtype.itemsize * 8 < TYPES[type_]:
            raise TypeError(f"a register of {bits.dtype.itemsize * 8} bits is read as {type_}")
        bits = bits.astype(wanted)
    if type_[0] == "s":
        return bits.view(_SIGNED[TYPES[type_]])
    if type_ in _FLOAT:
        return bits.view(_FLOAT[type_])
    if type_ == "bf16":
        return bf16_to_f32(bits)
    if type_ == "tf32":  # the tensor core looks at the upper 19 bits only
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if type_.endswith("x2"):
        return decode(np.ascontiguousarray(bits).view(np.uint16), type_[:-2]).reshape(-1, 2)
    return bits


def encode(value: np.ndarray, type_: str) -> np.ndarray:
    """The bits of ``value`` rounded to ``type_``, the lower bits of it for an integer."""
    if type_ == "pred":
        return value
    if type_ in ("f16x2", "bf16x2"):
        return np.ascontiguousarray(encode(value, type_[:-2])).view(np.uint32).reshape(-1)
    if type_ == "bf16":
        return f32_to_bf16(value)
    if type_ in _FLOAT:
        return value.astype(_FLOAT[type_], copy=False).view(UNSIGNED[TYPES[type_]])
    return value.astype(UNSIGNED[TYPES[type_]], copy=False)


def widen(bits: np.ndarray, type_: str, register_bits: int) -> np.ndarray:
    """Bits of ``type_`` for a register of ``register_bits``: sign-extended if signed, else with zeros."""
    if type_ == "pred" or TYPES[type_] == register_bits:
        return bits
    if TYPES[type_] > register_bits:
        raise TypeError(f"{type_} is written to a register of {register_bits} bits")
    if type_[0] == "s":
        bits = bits.view(_SIGNED[TYPES[type_]]).astype(_SIGNED[register_bits])
    return bits.astype(UNSIGNED[register_bits], copy=False)
