"""Instructions that compute on each thread by itself (PTX ISA manual, section 9.7): one table, ``RULES``.

``elementwise("fma.rn.ftz.f32")`` gives the types of destinations and sources and a function of numpy arrays. A
name or a modifier that is not in the table is an error, never ignored.

Approximate instructions are as wrong as the manual allows: their exact result is moved by up to the documented
error, by an amount that depends on the bits of the input. What passes here does not rest on a better GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .parser import PtxError
from .values import TYPES, is_float


@dataclass(frozen=True)
class Elementwise:
    destinations: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable  # arrays of the sources -> array, or a tuple of arrays for two destinations


def elementwise(opcode: str) -> Elementwise | None:
    """The meaning of ``opcode``, None if it is not an instruction of this table."""
    name, *parts = opcode.split(".")
    if name not in RULES:
        return None
    build, allowed = RULES[name]
    types = [p for p in parts if p in TYPES]
    flags = {p for p in parts if p not in TYPES}
    if not flags <= set(allowed.split()):
        raise PtxError(f"{opcode}: modifiers {sorted(flags - set(allowed.split()))} are not implemented")
    return build(types, flags)


# Floating point


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 numbers -> zero of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _float(type_: str, flags: set[str], compute: Callable, sources: int) -> Elementwise:
    def rounded(*x):
        if "ftz" in flags and type_ == "f32":
            x = tuple(map(flush, x))
        y = compute(*x)
        if type_ == "f32":
            y = y.astype(np.float32, copy=False)
        if "sat" in flags:
            y = np.clip(np.where(np.isnan(y), 0, y), 0, 1)
        if "relu" in flags:
            y = np.where(np.isnan(y), y, np.maximum(y, 0))
        return flush(y) if "ftz" in flags and type_ == "f32" else y

    return Elementwise((type_,), (type_,) * sources, rounded)


def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _split_double(a):
    t = a * 134217729.0  # 2^27 + 1: upper and lower half of the mantissa (Veltkamp)
    high = t - (t - a)
    return high, a - high


def fma(a, b, c):
    """a b + c rounded once. float32 goes through float64, whose second rounding shows once in 2^29 results."""
    if a.dtype != np.float64:
        wide = a.astype(np.float64) * b + c
        return wide if a.dtype == np.float32 else wide.astype(np.float16)
    product = a * b
    (ah, al), (bh, bl) = _split_double(a), _split_double(b)
    error = ((ah * bh - product) + ah * bl + al * bh) + al * bl
    total, rest = _two_sum(product, c)
    exact = total + (rest + error)
    return np.where(np.isfinite(exact), exact, product + c)


def _fma_downwards(a, b, c):
    """fma.rm.f32: rounded towards -inf; ``rest`` tells whether the sum in float64 is exact."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total, rest = _two_sum(product, c)
    nearest = total.astype(np.float32)
    above = (nearest > total) | ((nearest == total) & (rest < 0))
    return np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _sum_towards_zero(function):
    """add.rz.f32 and sub.rz.f32; ``rest`` tells whether the sum in float64 is exact."""

    def compute(a, b):
        total, rest = _two_sum(a.astype(np.float64), function(np.float64(0), b.astype(np.float64)))
        nearest = total.astype(np.float32)
        beyond = (np.abs(nearest) > np.abs(total)) | ((nearest == total) & (rest * np.sign(total) < 0))
        return np.where(beyond & np.isfinite(total), np.nextafter(nearest, np.float32(0)), nearest)

    return compute


def _noise(x: np.ndarray) -> np.ndarray:
    """In [-1, 1), from the bits of x."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = (bits ^ (bits >> np.uint32(15))) * np.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0x85EBCA77)
    return (bits ^ (bits >> np.uint32(16))).astype(np.float64) / 2**31 - 1


def _moved(exact, x, error):
    """``exact`` (float64) off by up to ``error``, but where float32 can hold it.

    The manual does not say so, yet libdevice's exp rests on ex2.approx(3) = 8, and programs on 1 / 1 = 1.
    """
    certain = ~np.isfinite(exact) | (exact == exact.astype(np.float32))
    return exact + _noise(x) * np.where(certain, 0, error)


def _approximate(function: Callable, relative: float = 0.0, absolute: float = 0.0) -> Callable:
    def compute(x):
        exact = function(x.astype(np.float64))
        return _moved(exact, x, relative * np.abs(exact) + absolute)

    return compute


def _divide(a, b):
    """a times an approximate 1 / b: 2 ulp in all."""
    a, reciprocal = a.astype(np.float64), 1 / b.astype(np.float64)
    exact = a / b
    usual = np.isfinite(exact) & np.isfinite(reciprocal)
    return np.where(usual, a * _moved(reciprocal, b, 2 * _ULP * np.abs(reciprocal)), exact)


def _divide_approximately(a, b):
    """div.approx: beyond 2^126 the divisor's reciprocal is flushed to zero."""
    huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
    zero = np.where(np.isinf(a), np.nan, np.copysign(0, a) * np.sign(b))
    return np.where(huge, zero, _divide(a, b))


def _log2_approximately(x):
    exact = np.log2(x.astype(np.float64))
    return _moved(exact, x, np.where((x > 0.5) & (x < 2), 2.0**-22, 2.0**-22 * np.abs(exact)))


def _reciprocal_20_bits(x):
    """rcp.approx.ftz.f64: the upper half of the result only."""
    bits = (1 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)
    return np.where(np.isfinite(x) & (x != 0), bits.view(np.float64), 1 / x)


_ULP = 2.0**-23
_APPROXIMATE = {  # name: (function, relative error, absolute error), full range of float32
    "rcp": (lambda x: 1 / x, _ULP, 0),
    "sqrt": (np.sqrt, _ULP, 0),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, 0),
    "sin": (np.sin, 0, 2.0**-20.5),
    "cos": (np.cos, 0, 2.0**-20.5),
    "tanh": (np.tanh, 2.0**-11, 0),
}


def _special_function(name: str):
    function, relative, absolute = _APPROXIMATE[name]

    def build(types, flags):
        if "approx" not in flags:
            if name not in ("rcp", "sqrt"):
                raise PtxError(f"{name} exists as .approx only")
            return _float(types[0], flags, function, 1)
        if types[0] == "f64":
            if name != "rcp":
                raise PtxError(f"{name}.approx.f64 is not implemented")
            return _float("f64", flags, _reciprocal_20_bits, 1)
        # tanh in half precision: about 2^-11 for f16, 2^-8 for bf16, before it is rounded.
        coarse = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[types[0].removesuffix("x2")]
        return _float(types[0], flags, _approximate(function, max(relative, coarse), absolute), 1)

    return build


def _only_float32(function: Callable):
    def build(types, flags):
        if types != ["f32"]:
            raise PtxError(f"an approximation of {types} is not implemented")
        return _float("f32", flags, function, 1)

    return build


def _division(types, flags):
    if not is_float(types[0]):
        return _integers(types, lambda a, b: _truncated_division(a, b)[0], 2)
    if "approx" in flags:
        return _float("f32", flags, _divide_approximately, 2)
    if "full" in flags:
        return _float("f32", flags, _divide, 2)
    return _float(types[0], flags, np.divide, 2)


def _minimum(ordinary: Callable, with_nan: Callable, integers: Callable):
    def build(types, flags):
        if is_float(types[0]):
            return _float(types[0], flags, with_nan if "NaN" in flags else ordinary, 2)
        return _integers(types, integers, 2)

    return build


# Integers: numpy wraps around as the hardware does


def _integers(types, compute, sources):
    return Elementwise((types[0],), (types[0],) * sources, compute)


def _truncated_division(a, b):
    """Quotient towards zero and remainder of a's sign; by zero the result is unspecified, here 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    quotient += ((quotient * safe != a) & ((a < 0) ^ (safe < 0))).astype(a.dtype)
    return quotient, a - quotient * safe


def _wide(type_):
    return f"{type_[0]}{2 * TYPES[type_]}"


_NUMPY = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def _high_half(type_, a, b):
    if TYPES[type_] < 64:
        product = a.astype(_NUMPY[_wide(type_)]) * b
        return product >> product.dtype.type(TYPES[type_])
    return np.array([int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)], a.dtype)


def _multiply(types, flags):
    type_ = types[0]
    if is_float(type_):
        return _float(type_, flags, np.multiply, 2)
    if "wide" in flags:
        wide = _wide(type_)
        return Elementwise((wide,), (type_, type_), lambda a, b: a.astype(_NUMPY[wide]) * b.astype(_NUMPY[wide]))
    if "hi" in flags:
        return Elementwise((type_,), (type_, type_), lambda a, b: _high_half(type_, a, b))
    return _integers(types, np.multiply, 2)


def _multiply_add(types, flags):
    type_ = types[0]
    if is_float(type_):
        if "rm" in flags and type_ != "f32":
            raise PtxError(f"fma.rm.{type_} is not implemented")
        return _float(type_, flags, _fma_downwards if "rm" in flags else fma, 3)
    if "wide" in flags:
        wide = _NUMPY[_wide(type_)]
        return Elementwise(
            (_wide(type_),), (type_, type_, _wide(type_)), lambda a, b, c: a.astype(wide) * b.astype(wide) + c
        )
    if "hi" in flags:
        return _integers(types, lambda a, b, c: _high_half(type_, a, b).astype(a.dtype) + c, 3)
    return _integers(types, lambda a, b, c: a * b + c, 3)


def _arithmetic(function):
    def build(types, flags):
        if "rz" in flags:
            if types[0] != "f32" or function not in (np.add, np.subtract):
                raise PtxError(f"{function.__name__}.rz.{types[0]} is not implemented")
            return _float("f32", flags, _sum_towards_zero(function), 2)
        return _float(types[0], flags, function, 2) if is_float(types[0]) else _integers(types, function, 2)

    return build


def _negate(types, flags):
    return _float(types[0], flags, np.negative, 1) if is_float(types[0]) else _integers(types, np.negative, 1)


def _absolute(types, flags):
    return _float(types[0], flags, np.abs, 1) if is_float(types[0]) else _integers(types, np.abs, 1)


def _logic(function):
    return lambda types, flags: _integers(types, function, 2)


def _not(types, flags):
    return _integers(types, np.logical_not if types[0] == "pred" else np.invert, 1)


def _shift(function, fill_sign: bool):
    def build(types, flags):
        bits = TYPES[types[0]]

        def compute(x, count):
            inside = function(x, np.minimum(count, bits - 1).astype(x.dtype))
            sign = fill_sign and x.dtype.kind == "i"
            return np.where(count < bits, inside, inside >> (bits - 1) if sign else x.dtype.type(0))

        return Elementwise((types[0],), (types[0], "u32"), compute)

    return build


def _funnel_shift(types, flags):
    def compute(low, high, count):
        pair = (high.astype(np.uint64) << np.uint64(32)) | low
        count = (np.minimum(count, 32) if "clamp" in flags else count & np.uint32(31)).astype(np.uint64)
        return pair >> count if "r" in flags else (pair << count) >> np.uint64(32)

    return Elementwise(("b32",), ("b32", "b32", "u32"), compute)


def _field_extract(types, flags):
    type_, bits = types[0], TYPES[types[0]]
    one = np.uint64(1)

    def compute(x, position, length):
        position, length = position & np.uint32(255), length & np.uint32(255)
        unsigned = x.astype(np.uint64) & np.uint64((1 << bits) - 1)
        shifted = np.where(position < 64, unsigned >> np.minimum(position, 63).astype(np.uint64), np.uint64(0))
        length = np.minimum(length, bits).astype(np.uint64)
        mask = np.where(length < 64, (one << np.minimum(length, 63).astype(np.uint64)) - one, ~np.uint64(0))
        result = shifted & mask
        if type_[0] == "s":  # the sign of the field, or of x where the field reaches beyond it
            top = np.minimum(position.astype(np.uint64) + np.maximum(length, one) - one, np.uint64(bits - 1))
            negative = ((unsigned >> top) & one).astype(bool) & (length > 0)
            inside = np.minimum(length, np.maximum(np.int64(bits) - position, 0).astype(np.uint64))
            field = np.where(inside < 64, (one << np.minimum(inside, 63).astype(np.uint64)) - one, ~np.uint64(0))
            result = np.where(negative, (result & field) | ~field, result)
        return result

    return Elementwise((type_,), (type_, "u32", "u32"), compute)


def _field_insert(types, flags):
    bits = TYPES[types[0]]

    def compute(field, into, position, length):
        position, length = (np.minimum(v & np.uint32(255), bits) for v in (position, length))
        ones = np.array(
            [((1 << int(n)) - 1) << int(p) & ((1 << bits) - 1) for p, n in np.broadcast(position, length)]
        )
        ones = ones.astype(into.dtype)
        moved = np.where(position < bits, field << np.minimum(position, bits - 1).astype(field.dtype), 0)
        return (into & ~ones) | (moved.astype(into.dtype) & ones)

    return Elementwise((types[0],), (types[0], types[0], "u32", "u32"), compute)


def _lop3(types, flags):
    def compute(a, b, c, table):
        table, result = int(table[0]), np.zeros_like(a)
        for row in range(8):
            if table >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return Elementwise(("b32",), ("b32", "b32", "b32", "u32"), compute)


def _permute(types, flags):
    """prmt: each nibble of the selector chooses one of the eight bytes of (b, a), or its sign eight times."""

    def compute(a, b, selector):
        pair = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for i in range(4):
            nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
            byte = (pair >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64)) & np.uint64(255)
            byte = np.where(nibble & 8, np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint32)
            result = result | (byte << np.uint32(8 * i))
        return result

    return Elementwise(("b32",), ("b32", "b32", "b32"), compute)


def _per_value(function: Callable):
    """Rare integer functions, by Python's integers."""

    def build(types, flags):
        bits = TYPES[types[0]]
        return Elementwise(
            ("u32",), (types[0],), lambda x: np.array([function(int(v), bits) for v in x], np.uint32)
        )

    return build


def _reverse(types, flags):
    bits = TYPES[types[0]]
    return _integers(types, lambda x: np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], x.dtype), 1)


# Comparison and selection

_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
_COMBINE = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _compare(flags: set[str], type_: str) -> Callable:
    name = next(iter(flags - {"ftz"} - set(_COMBINE)))

    def compute(a, b):
        if "ftz" in flags and type_ == "f32":
            a, b = flush(a), flush(b)
        unordered = np.isnan(a) | np.isnan(b) if is_float(type_) else np.False_
        if name in ("num", "nan"):
            return ~unordered if name == "num" else unordered
        if is_float(type_) and len(name) == 3:  # equ, neu, ltu, ...: true for NaN
            return _COMPARE[name[:2]](a, b) | unordered
        return _COMPARE[name](a, b) & ~unordered

    return compute


def _set_predicate(types, flags):
    type_ = types[0]
    compare, combine = _compare(flags, type_), flags & set(_COMBINE)
    if not combine:
        # A second destination, where there is one, is the complement.
        return Elementwise(("pred", "pred"), (type_, type_), lambda a, b: (r := compare(a, b), ~r))
    join = _COMBINE[combine.pop()]
    return Elementwise(
        ("pred", "pred"), (type_, type_, "pred"), lambda a, b, c: (join(r := compare(a, b), c), join(~r, c))
    )


def _set(types, flags):
    result, type_ = types
    one = np.float32(1) if result == "f32" else np.int32(-1)
    compare = _compare(flags, type_)
    return Elementwise(
        (result,),
        (type_, type_),
        lambda a, b: np.where(compare(a, b), one, one.dtype.type(0)),
    )


def _select(types, flags):
    bits = f"b{TYPES[types[0]]}"
    return Elementwise((bits,), (bits, bits, "pred"), lambda a, b, p: np.where(p, a, b))


def _move(types, flags):
    return Elementwise((types[0],), (types[0],), lambda a: a)


# Conversion

_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def _limits(type_: str) -> tuple[int, int]:
    bits = TYPES[type_]
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if type_[0] == "s" else (0, (1 << bits) - 1)


def _float_to_integer(x, round_, type_):
    low, high = _limits(type_)
    x = round_(x.astype(np.float64))
    inside = np.where((x >= low) & (x <= float(high)), x, 0).astype(_NUMPY.get(type_, np.int64))
    inside = np.where(x < low, low, inside).astype(np.uint64 if low == 0 else np.int64)
    return np.where(x >= float(high), high, np.where(np.isnan(x), 0, inside)).astype(inside.dtype)


def _round_toward_zero(x, dtype):
    nearest = x.astype(dtype)
    wrong = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(wrong, np.nextafter(nearest, dtype(0)), nearest)


def _round_tf32(x, flags):
    bits = x.view(np.uint32)
    half = np.uint32(0x1000)
    if "rn" in flags:
        half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    elif "rna" not in flags:
        half = np.uint32(0)
    return np.where(np.isfinite(x), (bits + half) & np.uint32(0xFFFFE000), bits)


def _convert(types, flags):
    result, source = types
    if result == "tf32":
        return Elementwise(("b32",), ("f32",), lambda x: _round_tf32(x, flags))
    if result.endswith("x2"):  # the first source is the upper half
        return _float_pair(result, source, flags)
    if is_float(result):
        numpy_type = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.float32}[result]
        integral = flags & set(_TO_INTEGER)

        def compute(x):
            if "ftz" in flags and source == "f32":
                x = flush(x)
            if integral:
                x = _TO_INTEGER[min(integral)](x)
            if "rz" in flags and result != "bf16":
                return _round_toward_zero(x.astype(np.float64), numpy_type)
            if result == "bf16" and "rz" in flags:
                return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            y = x.astype(numpy_type)
            if "sat" in flags:
                y = np.clip(np.where(np.isnan(y), 0, y), 0, 1).astype(numpy_type)
            if "relu" in flags:
                y = np.where(np.isnan(y), y, np.maximum(y, 0)).astype(numpy_type)
            return flush(y) if "ftz" in flags and result == "f32" else y

        return Elementwise((result,), (source,), compute)
    if is_float(source):
        round_ = _TO_INTEGER[(flags & set(_TO_INTEGER)).pop()]
        return Elementwise(
            (result,),
            (source,),
            lambda x: _float_to_integer(flush(x) if "ftz" in flags and source == "f32" else x, round_, result),
        )
    if "sat" in flags:
        low, high = _limits(result)
        return Elementwise(
            (result,), (source,), lambda x: np.array([min(max(int(v), low), high) & (2**64 - 1) for v in x], "u8")
        )
    return Elementwise((result,), (source,), lambda x: x)


def _float_pair(result, source, flags):
    if flags - {"rn", "relu"}:
        raise PtxError(f"cvt to {result} with {sorted(flags)} is not implemented")

    def compute(high, low):
        pair = np.stack(np.broadcast_arrays(low, high), axis=-1)
        return np.where(np.isnan(pair), pair, np.maximum(pair, 0)).astype(pair.dtype) if "relu" in flags else pair

    return Elementwise((result,), (source, source), compute)


_ROUNDING = "rn rz rm rp"
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan"

RULES: dict[str, tuple[Callable, str]] = {
    "add": (_arithmetic(np.add), "rn rz ftz sat"),
    "sub": (_arithmetic(np.subtract), "rn rz ftz sat"),
    "mul": (_multiply, "lo hi wide rn ftz sat"),
    "mad": (_multiply_add, "lo hi wide rn ftz sat"),
    "fma": (_multiply_add, "rn rm ftz sat relu"),
    "div": (_division, "approx full rn ftz"),
    "rem": (lambda types, flags: _integers(types, lambda a, b: _truncated_division(a, b)[1], 2), ""),
    "min": (_minimum(np.fmin, np.minimum, np.minimum), "ftz NaN relu"),
    "max": (_minimum(np.fmax, np.maximum, np.maximum), "ftz NaN relu"),
    "neg": (_negate, "ftz"),
    "abs": (_absolute, "ftz"),
    "copysign": (lambda types, flags: _float(types[0], flags, lambda a, b: np.copysign(b, a), 2), ""),
    "lg2": (_only_float32(_log2_approximately), "approx ftz"),
    "ex2": (_only_float32(_approximate(np.exp2, 2.0**-22)), "approx ftz"),
    **{name: (_special_function(name), "approx rn ftz") for name in _APPROXIMATE},
    "and": (_logic(np.bitwise_and), ""),
    "or": (_logic(np.bitwise_or), ""),
    "xor": (_logic(np.bitwise_xor), ""),
    "not": (_not, ""),
    "shl": (_shift(np.left_shift, False), ""),
    "shr": (_shift(np.right_shift, True), ""),
    "shf": (_funnel_shift, "l r wrap clamp"),
    "bfe": (_field_extract, ""),
    "bfi": (_field_insert, ""),
    "lop3": (_lop3, ""),
    "prmt": (_permute, ""),
    "popc": (_per_value(lambda v, bits: v.bit_count()), ""),
    "clz": (_per_value(lambda v, bits: bits - v.bit_length()), ""),
    "brev": (_reverse, ""),
    "setp": (_set_predicate, f"{_COMPARISONS} ftz and or xor"),
    "set": (_set, f"{_COMPARISONS} ftz"),
    "selp": (_select, ""),
    "mov": (_move, ""),
    "cvt": (_convert, f"{_ROUNDING} rna rni rzi rmi rpi ftz sat relu"),
}
