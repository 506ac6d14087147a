"""The executor of PTX against the manual: instructions, control flow, memory, and the errors it must find.

Expected values are worked out here, from the manual's definitions, not by the code under test.
"""

import math

import numpy as np
import ptx
import pytest
from ptx import order

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
LANES = np.arange(32)


def kernel(body: str, parameters: int, module: str = "") -> ptx.parser.Kernel:
    """k(u64 p0, u64 p1, ...): %rd100, %rd101, ... hold the parameters, %r1 the thread, %rd1 four times that."""
    declared = ", ".join(f".param .u64 p{n}" for n in range(parameters))
    loads = "\n".join(f"ld.param.u64 %rd{100 + n}, [p{n}];" for n in range(parameters))
    return ptx.parse(
        f"""{HEADER}{module}
        .visible .entry k({declared}) {{
            .reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<99>; .reg .f32 %f<99>; .reg .f64 %fd<99>;
            .reg .b64 %rd<199>;
            {loads}
            mov.u32 %r1, %tid.x;
            mul.wide.u32 %rd1, %r1, 4;
            {body}
            ret;
        }}"""
    )


def elementwise(instruction: str, *inputs: np.ndarray, result=np.uint32) -> np.ndarray:
    """``instruction`` on registers %d (result) and %a, %b, %c (inputs) of their widths, one element a thread."""
    arrays = [np.resize(np.asarray(x), 32) for x in inputs]
    out = np.zeros(32, result)
    lines = []
    for n, x in enumerate([*arrays, out]):
        bits = x.dtype.itemsize * 8
        name = "abc"[n] if n < len(arrays) else "d"
        lines += [f".reg .b{bits} %{name}; .reg .b64 %p{name};", f"mul.wide.u32 %p{name}, %r1, {bits // 8};"]
        lines += [f"add.u64 %p{name}, %p{name}, %rd{100 + n};"]
        if name != "d":
            lines += [f"ld.global.b{bits} %{name}, [%p{name}];"]
    body = "\n".join([*lines, f"{instruction};", f"st.global.b{out.dtype.itemsize * 8} [%pd], %d;"])
    ptx.launch(kernel(body, len(arrays) + 1), (1,), 32, [*arrays, out])
    return out


def u32(*values):
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def f32(*values):
    return np.array(values, np.float32)


BIG = 2.0**127
CASES = [
    # integers
    ("add.s32 %d, %a, %b", [u32(1, -1, 2**31 - 1), u32(2, 1, 1)], u32(3, 0, 2**31)),
    ("sub.u32 %d, %a, 5", [u32(7, 3)], u32(2, -2)),
    ("mul.lo.s32 %d, %a, %b", [u32(-3, 2**16), u32(7, 2**16)], u32(-21, 0)),
    ("mul.hi.u32 %d, %a, %b", [u32(2**31, -1), u32(4, -1)], u32(2, -2)),
    ("mul.hi.s32 %d, %a, %b", [u32(-1, 2**30), u32(1, 8)], u32(-1, 2)),
    ("mad.lo.s32 %d, %a, %b, -1", [u32(5), u32(-6)], u32(-31)),
    ("div.s32 %d, %a, %b", [u32(-7, 7, -8), u32(2, -2, 2)], u32(-3, -3, -4)),
    ("rem.s32 %d, %a, %b", [u32(-7, 7), u32(2, -2)], u32(-1, 1)),
    ("div.u32 %d, %a, %b", [u32(-1), u32(16)], u32(0x0FFFFFFF)),
    ("min.s32 %d, %a, %b", [u32(-1, 5), u32(1, 4)], u32(-1, 4)),
    ("max.u32 %d, %a, %b", [u32(-1, 5), u32(1, 4)], u32(-1, 5)),
    ("shl.b32 %d, %a, %b", [u32(3, 3, 3), u32(4, 32, 99)], u32(48, 0, 0)),
    ("shr.s32 %d, %a, %b", [u32(-16, -16, 16), u32(2, 40, 40)], u32(-4, -1, 0)),
    ("shr.u32 %d, %a, %b", [u32(-16, -16), u32(28, 32)], u32(15, 0)),
    ("shf.l.wrap.b32 %d, %a, %b, 8", [u32(0xAABBCCDD), u32(0x11223344)], u32(0x223344AA)),
    ("shf.r.clamp.b32 %d, %a, %b, 40", [u32(0xAABBCCDD), u32(0x11223344)], u32(0x11223344)),
    ("bfe.u32 %d, %a, 4, 8", [u32(0x12345678)], u32(0x67)),
    ("bfe.s32 %d, %a, 4, 8", [u32(0x12345F78, 0x12345678)], u32(-9, 0x67)),
    ("bfe.s32 %d, %a, 3, 1", [u32(8, 7)], u32(-1, 0)),
    ("bfe.s32 %d, %a, 28, 8", [u32(0x80000000)], u32(-8)),
    ("bfi.b32 %d, %a, %b, 8, 4", [u32(0xFF), u32(0x12345678)], u32(0x12345F78)),
    ("prmt.b32 %d, %a, %b, 0x7610", [u32(0x33221100), u32(0x77665544)], u32(0x77661100)),
    ("prmt.b32 %d, %a, %b, 0x8888", [u32(0x80, 0x7F), u32(0)], u32(-1, 0)),
    ("lop3.b32 %d, %a, %b, 0xFF00FF00, 0xCA", [u32(0xF0F0F0F0), u32(0x12345678)], u32(0x1F305F70)),
    ("popc.b32 %d, %a", [u32(0xF00F)], u32(8)),
    ("clz.b32 %d, %a", [u32(0, 1, -1)], u32(32, 31, 0)),
    ("brev.b32 %d, %a", [u32(1)], u32(0x80000000)),
    ("not.b32 %d, %a", [u32(5)], u32(-6)),
    ("neg.s32 %d, %a", [u32(5)], u32(-5)),
    # comparison; %p1 and %p2 become a number
    ("setp.lt.s32 %p1, %a, %b; selp.b32 %d, 7, 9, %p1", [u32(-1, 1), u32(0)], u32(7, 9)),
    ("setp.lt.u32 %p1|%p2, %a, %b; selp.b32 %d, 7, 9, %p2", [u32(-1, 1), u32(2)], u32(7, 9)),
    ("setp.leu.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1", [f32(1, 3, math.nan), f32(2)], u32(1, 0, 1)),
    ("setp.ne.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1", [f32(1, 2, math.nan), f32(2)], u32(1, 0, 0)),
    ("setp.nan.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1", [f32(1, math.nan), f32(2)], u32(0, 1)),
    (
        "setp.eq.s32 %p1, %a, 1; setp.gt.or.s32 %p2, %a, 4, %p1; selp.b32 %d, 1, 0, %p2",
        [u32(1, 2, 5)],
        u32(1, 0, 1),
    ),
    # floating point; the result is compared as bits
    ("add.f32 %d, %a, %b", [f32(1, BIG), f32(2**-24, BIG)], f32(1, math.inf)),
    ("add.ftz.f32 %d, %a, %b", [f32(2**-130, -(2**-130)), f32(0, -0.0)], f32(0, -0.0)),
    ("add.f32 %d, %a, %b", [f32(2**-130), f32(0)], f32(2**-130)),
    ("min.f32 %d, %a, %b", [f32(math.nan, 2), f32(1, 3)], f32(1, 2)),
    ("max.NaN.f32 %d, %a, %b; mov.b32 %d, %d", [f32(3, 2), f32(1, 3)], f32(3, 3)),
    ("fma.rn.f32 %d, %a, %b, %c", [f32(1 + 2**-12), f32(1 + 2**-12), f32(-1)], f32(2**-11 + 2**-24)),
    ("add.rz.f32 %d, %a, %b", [f32(1, -1), f32(2**-24 + 2**-26, 2**-60)], f32(1, -1 + 2**-24)),
    ("sub.rz.ftz.f32 %d, %a, %b", [f32(1, 1), f32(2**-60, -(2**-60))], f32(1 - 2**-24, 1)),
    ("fma.rm.f32 %d, %a, %b, %c", [f32(3, -3), f32(1), f32(2**-30)], f32(3, -3)),
    ("fma.rm.f32 %d, %a, %b, %c", [f32(3, -3), f32(1), f32(-(2**-30))], f32(3 - 2**-22, -3 - 2**-22)),
    ("mul.rn.sat.f32 %d, %a, 0f40000000", [f32(0.25, 1, -1)], f32(0.5, 1, 0)),
    (
        "div.rn.f32 %d, %a, %b",
        [f32(1, 1, -1), f32(3, 0, 0)],
        f32(1 / 3, math.inf, -math.inf),
    ),
    ("rcp.approx.ftz.f32 %d, %a", [f32(2**-130, -0.0, -math.inf, 1)], f32(math.inf, -math.inf, -0.0, 1)),
    ("ex2.approx.ftz.f32 %d, %a", [f32(-math.inf, 3, -130, 200)], f32(0, 8, 0, math.inf)),
    ("lg2.approx.f32 %d, %a", [f32(0, math.inf)], f32(-math.inf, math.inf)),
    ("div.approx.f32 %d, %a, %b", [f32(1), f32(2.0**126.5)], f32(0)),
    ("div.full.f32 %d, %a, %b", [f32(3, 5, math.inf), f32(2, 1, 2)], f32(1.5, 5, math.inf)),
    ("copysign.f32 %d, %a, %b", [f32(-1, 1), f32(2, -3)], f32(-2, 3)),
    # conversion
    ("cvt.rn.f32.s32 %d, %a", [u32(-3, 2**24 + 1)], f32(-3, 2**24)),
    ("cvt.rz.f32.u32 %d, %a", [u32(-1)], f32(2**32 - 2**8)),
    ("cvt.rzi.s32.f32 %d, %a", [f32(-2.7, 3e9, -3e9, math.nan)], u32(-2, 2**31 - 1, 2**31, 0)),
    ("cvt.rni.s32.f32 %d, %a", [f32(2.5, 3.5)], u32(2, 4)),
    ("cvt.rmi.f32.f32 %d, %a", [f32(-0.5, 1.5)], f32(-1, 1)),
    ("cvt.s32.s8 %d, %a", [u32(0x1FF, 0x17F)], u32(-1, 127)),
    ("cvt.u32.u8 %d, %a", [u32(0x1FF)], u32(255)),
    ("cvt.rn.bf16x2.f32 %d, %a, %b", [f32(1, 1 + 2**-8), f32(-2, 1 + 3 * 2**-8)], u32(0x3F80C000, 0x3F803F82)),
    ("cvt.rn.f16x2.f32 %d, %a, %b", [f32(1), f32(70000)], u32(0x3C007C00)),
    ("cvt.rna.tf32.f32 %d, %a", [f32(1 + 2**-11, 1 + 2**-12)], f32(1 + 2**-10, 1)),
    # packed halves, vectors
    ("mov.b32 {%rs1, %rs2}, %a; mov.b32 %d, {%rs2, %rs1}", [u32(0x12345678)], u32(0x56781234)),
    ("fma.rn.f16x2 %d, %a, %b, %c", [u32(0x3C004000), u32(0x42003800), u32(0x3C000000)], u32(0x44003C00)),
    ("fma.rn.bf16x2 %d, %a, %b, %c", [u32(0x3F804000), u32(0x40403F00), u32(0x3F800000)], u32(0x40803F80)),
]


@pytest.mark.parametrize("instruction, inputs, expected", CASES, ids=[c[0] for c in CASES])
def test_instruction(instruction, inputs, expected):
    count = len(expected)
    actual = elementwise(instruction, *inputs)[:count]
    np.testing.assert_array_equal(actual, expected.view(np.uint32))


def test_64_bits():
    a, b = np.array([2**40 + 3, -5], np.int64), np.array([2**30, 7], np.int64)
    np.testing.assert_array_equal(
        elementwise("mul.lo.s64 %d, %a, %b", a, b, result=np.int64)[:2], [(3 << 30) + (1 << 70) % 2**64, -35]
    )
    np.testing.assert_array_equal(elementwise("mul.hi.s64 %d, %a, %b", a, b, result=np.int64)[:2], [64, -1])
    wide = elementwise("mul.wide.s32 %d, %a, %b", u32(-(2**20)), u32(2**20), result=np.int64)
    assert wide[0] == -(2**40)
    doubles = elementwise("cvt.f64.f32 %d, %a", f32(1.5), result=np.float64)
    assert doubles[0] == 1.5
    x = np.array([1 + 2.0**-30])
    assert elementwise("fma.rn.f64 %d, %a, %a, %b", x, np.array([-1 - 2.0**-29]), result=np.float64)[0] == 2.0**-60


@pytest.mark.parametrize(
    "instruction, function, low, high, relative, absolute",
    [
        ("rcp.approx.ftz.f32", lambda x: 1 / x, 1e-3, 1e3, 2**-23, 0),
        ("sqrt.approx.f32", np.sqrt, 1e-3, 1e3, 2**-23, 0),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 1e-3, 1e3, 2**-22.9, 0),
        ("ex2.approx.f32", np.exp2, -20, 20, 2**-22, 0),
        ("lg2.approx.f32", np.log2, 2, 1e3, 2**-22, 0),
        ("lg2.approx.f32", np.log2, 0.51, 1.99, 0, 2**-22),
        ("tanh.approx.f32", np.tanh, -3, 3, 2**-11, 0),
        ("sin.approx.f32", np.sin, -3, 3, 0, 2**-20.5),
    ],
)
def test_approximations_use_the_error_that_the_manual_allows(instruction, function, low, high, relative, absolute):
    x = np.random.default_rng(0).uniform(low, high, 32).astype(np.float32)
    exact = function(x.astype(np.float64))
    allowed = relative * np.abs(exact) + absolute
    error = np.abs(elementwise(f"{instruction} %d, %a", x, result=np.float32) - exact)
    rounding = np.spacing(np.abs(exact).astype(np.float32)) / 2
    assert (error <= allowed + rounding).all()
    assert (error > allowed / 4).any()


# Control flow


def test_threads_diverge_and_meet_again():
    # Collatz steps: every thread leaves the loop at its own time, and branches differently inside.
    steps = np.zeros(64, np.uint32)
    body = """
        add.u32 %r2, %r1, 1; mov.b32 %r3, 0;
    LOOP: setp.eq.u32 %p1, %r2, 1; @%p1 bra DONE;
        and.b32 %r4, %r2, 1; setp.eq.u32 %p2, %r4, 0;
        @%p2 bra EVEN; mad.lo.u32 %r2, %r2, 3, 1; bra.uni NEXT;
    EVEN: shr.u32 %r2, %r2, 1;
    NEXT: add.u32 %r3, %r3, 1; bra LOOP;
    DONE: bar.warp.sync -1;
        add.u64 %rd2, %rd100, %rd1; st.global.u32 [%rd2], %r3;
    """
    ptx.launch(kernel(body, 1), (1,), 64, [steps])

    def collatz(n):
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    np.testing.assert_array_equal(steps, [collatz(n) for n in range(1, 65)])


def test_threads_meet_again_before_the_place_where_they_went_apart():
    """In the text; compilers rotate loops so. All threads of a warp shuffle."""
    sums = np.zeros(64, np.uint32)
    body = """
        mov.b32 %r2, %r1; mov.b32 %r3, 0; setp.lt.u32 %p1, %r1, 7; bra.uni HEAD;
    TAIL: shfl.sync.bfly.b32 %r4, %r2, 1, 31, -1; add.u32 %r2, %r2, %r4;
        add.u32 %r3, %r3, 1; setp.eq.u32 %p2, %r3, 3; @%p2 bra DONE;
    HEAD: @%p1 bra TAIL; add.u32 %r2, %r2, 1; bra.uni TAIL;
    DONE: add.u64 %rd2, %rd100, %rd1; st.global.u32 [%rd2], %r2;
    """
    ptx.launch(kernel(body, 1), (1,), 64, [sums])
    expected = np.arange(64)
    for _ in range(3):
        expected = expected + (np.arange(64) >= 7)
        expected = expected + expected[np.arange(64) ^ 1]
    np.testing.assert_array_equal(sums, expected)


@pytest.mark.parametrize(
    "successors, expected",
    [
        ([[1, 2], [3], [3], []], [0, 2, 1, 3]),
        ([[3], [2, 4], [1], [1], []], [0, 2, 3, 1, 4]),  # entered in its middle, left from there
        ([[2], [2, 4], [1, 3], [1], []], [0, 3, 1, 2, 4]),  # a rotated loop
        ([[1], [2], [2, 3], [1, 4], []], [0, 1, 2, 3, 4]),  # a loop in a loop
        ([[1], []], [0, 1]),
    ],
)
def test_order_of_blocks(successors, expected):
    assert order.ranks(successors) == expected


def test_guards_leave_other_threads_alone():
    out = np.full(32, 7, np.uint32)
    body = """
        mov.b32 %r2, 1; setp.lt.u32 %p1, %r1, 10; @%p1 mov.b32 %r2, 2; @!%p1 add.u32 %r2, %r2, 9;
        setp.ge.u32 %p2, %r1, 20; @%p2 ret;
        add.u64 %rd2, %rd100, %rd1; st.global.u32 [%rd2], %r2;
    """
    ptx.launch(kernel(body, 1), (1,), 32, [out])
    np.testing.assert_array_equal(out, np.where(LANES < 10, 2, np.where(LANES < 20, 10, 7)))


def test_grid_of_blocks():
    out = np.zeros((5, 3, 64), np.uint32)
    body = """
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.y; mov.u32 %r4, %nctaid.x;
        mad.lo.u32 %r5, %r3, %r4, %r2; mov.u32 %r6, %ntid.x; mad.lo.u32 %r7, %r5, %r6, %r1;
        mul.wide.u32 %rd2, %r7, 4; add.u64 %rd2, %rd2, %rd100; st.global.u32 [%rd2], %r7;
    """
    ptx.launch(kernel(body, 1), (3, 5), 64, [out], together=128)
    np.testing.assert_array_equal(out.reshape(-1), np.arange(out.size))


# Shared memory and barriers

REVERSE = """
    shl.b32 %r2, %r1, 2; mov.u32 %r3, buffer; add.u32 %r4, %r3, %r2; st.shared.u32 [%r4], %r1;
    {barrier}
    sub.u32 %r5, 508, %r2; add.u32 %r5, %r5, %r3; ld.shared.u32 %r6, [%r5];
    add.u64 %rd2, %rd100, %rd1; st.global.u32 [%rd2], %r6;
"""
BUFFER = ".shared .align 16 .b8 buffer[512];\n"


def test_barrier_orders_shared_memory():
    out = np.zeros(128, np.uint32)
    ptx.launch(kernel(REVERSE.format(barrier="bar.sync 0;"), 1, BUFFER), (1,), 128, [out])
    np.testing.assert_array_equal(out, np.arange(128)[::-1])


def test_barrier_with_a_reduction():
    out = np.zeros((2, 64), np.uint32)
    body = """
        mov.u32 %r2, %ctaid.x; mad.lo.u32 %r3, %r2, 64, %r1;
        setp.eq.u32 %p1, %r3, 40; bar.red.or.pred %p2, 0, %p1; selp.b32 %r4, 1, 0, %p2;
        mul.wide.u32 %rd2, %r3, 4; add.u64 %rd2, %rd100, %rd2; st.global.u32 [%rd2], %r4;
    """
    ptx.launch(kernel(body, 1), (2,), 64, [out])
    assert (out[0] == 1).all() and (out[1] == 0).all()


def test_missing_barrier_is_found():
    with pytest.raises(ptx.Race, match="no barrier since another warp wrote"):
        ptx.launch(kernel(REVERSE.format(barrier=""), 1, BUFFER), (1,), 128, [np.zeros(128, np.uint32)])


def test_missing_barrier_before_an_overwrite_is_found():
    body = REVERSE.format(barrier="bar.sync 0;") + "st.shared.u32 [%r4], 0;"
    with pytest.raises(ptx.Race, match="no barrier since another warp read"):
        ptx.launch(kernel(body, 1, BUFFER), (1,), 128, [np.zeros(128, np.uint32)])


def test_barrier_that_some_threads_skip_is_found():
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 bar.sync 0;"
    with pytest.raises(ptx.PtxError, match="32 threads of the block never come"):
        ptx.launch(kernel(body, 0), (1,), 64, [])


def test_asynchronous_copy_lands_when_it_is_waited_for():
    source, out = np.arange(128, dtype=np.uint32), np.zeros((2, 128), np.uint32)
    body = """
        shl.b32 %r2, %r1, 4; mov.u32 %r3, buffer; add.u32 %r4, %r3, %r2; mul.wide.u32 %rd3, %r1, 16;
        add.u64 %rd2, %rd100, %rd3;
        setp.lt.u32 %p1, %r1, 31; selp.b32 %r5, 16, 8, %p1;
        cp.async.cg.shared.global [%r4], [%rd2], 16, %r5;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
        cp.async.wait_group 0;
        ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r4];
        add.u64 %rd4, %rd101, %rd3; st.global.v4.b32 [%rd4], {%r10, %r11, %r12, %r13};
        st.global.v4.b32 [%rd4+512], {%r20, %r21, %r22, %r23};
    """
    ptx.launch(kernel(body, 2, BUFFER), (1,), 32, [source, out])
    assert (out[0] == 0xFFFFFFFF).all()
    np.testing.assert_array_equal(out[1], np.where(np.arange(128) < 126, source, 0))


# Warps


@pytest.mark.parametrize(
    "mode, b, c, source",
    [
        ("bfly", 5, 31, LANES ^ 5),
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
        ("down", 4, 31, np.where(LANES <= 27, LANES + 4, LANES)),
        ("idx", 9, 31, np.full(32, 9)),
        ("down", 1, 0x181F, np.where(LANES % 8 < 7, LANES + 1, LANES)),  # segments of 8 lanes
    ],
)
def test_shuffle(mode, b, c, source):
    value = LANES.astype(np.uint32) * 11
    out = elementwise(f"shfl.sync.{mode}.b32 %d|%p1, %a, {b}, {c}, -1", value)
    np.testing.assert_array_equal(out, source * 11)


def test_votes_and_reductions():
    a = LANES.astype(np.uint32)
    vote = "setp.lt.u32 %p1, %a, 5; vote.sync.{} {}, %p1, -1"
    assert (elementwise(vote.format("ballot.b32", "%d"), a) == 0b11111).all()
    as_number = "; selp.b32 %d, 1, 0, %p2"
    assert (elementwise(vote.format("any.pred", "%p2") + as_number, a) == 1).all()
    assert (elementwise(vote.format("all.pred", "%p2") + as_number, a) == 0).all()
    assert (elementwise("redux.sync.add.s32 %d, %a, -1", a) == 496).all()
    assert (elementwise("redux.sync.min.s32 %d, %a, -1", u32(*(LANES - 9))) == u32(-9)).all()


def test_shuffle_with_absent_threads_is_found():
    body = "setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;"
    with pytest.raises(ptx.PtxError, match="names threads that do not execute it"):
        ptx.launch(kernel(body, 0), (1,), 32, [])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    matrices, out = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8), np.zeros((32, 4, 2), np.uint16)
    trans = ".trans" if transposed else ""
    body = f"""
        shl.b32 %r2, %r1, 4; mov.u32 %r3, buffer; add.u32 %r4, %r3, %r2; mul.wide.u32 %rd3, %r1, 16;
        add.u64 %rd2, %rd100, %rd3; ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%rd2];
        st.shared.v4.b32 [%r4], {{%r5, %r6, %r7, %r8}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];
        add.u64 %rd4, %rd101, %rd3; st.global.v4.b32 [%rd4], {{%r10, %r11, %r12, %r13}};
    """
    ptx.launch(kernel(body, 2, BUFFER), (1,), 32, [matrices, out])
    for lane in range(32):
        for n, matrix in enumerate(matrices):
            row = (matrix.T if transposed else matrix)[lane // 4]
            np.testing.assert_array_equal(out[lane, n], row[lane % 4 * 2 : lane % 4 * 2 + 2])


def test_stmatrix():
    values, out = np.arange(32 * 8, dtype=np.uint16).reshape(32, 4, 2), np.zeros((4, 8, 8), np.uint16)
    body = """
        shl.b32 %r2, %r1, 4; mov.u32 %r3, buffer; add.u32 %r4, %r3, %r2; mul.wide.u32 %rd3, %r1, 16;
        add.u64 %rd2, %rd100, %rd3; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd2];
        stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r5, %r6, %r7, %r8};
        bar.warp.sync -1; ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
        add.u64 %rd4, %rd101, %rd3; st.global.v4.b32 [%rd4], {%r10, %r11, %r12, %r13};
    """
    ptx.launch(kernel(body, 2, BUFFER), (1,), 32, [values, out])
    for lane in range(32):
        for n in range(4):
            np.testing.assert_array_equal(out[n, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2], values[lane, n])


def _places_16_bit(i, lane, operand):
    """Row and column of element i of a lane, m16n8k16 (manual, section 9.7.14.5.8)."""
    group, thread = lane >> 2, lane % 4
    if operand == "a":
        row = group if i < 2 or 4 <= i < 6 else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def _places_tf32(i, lane, operand):
    """The same for m16n8k8 of tf32."""
    group, thread = lane >> 2, lane % 4
    if operand == "a":
        return (group if i in (0, 2) else group + 8), (thread if i < 2 else thread + 4)
    return (thread if i == 0 else thread + 4), group


@pytest.mark.parametrize("type_", ["f16", "bf16", "tf32"])
def test_mma(type_):
    rng = np.random.default_rng(1)
    k, places = (8, _places_tf32) if type_ == "tf32" else (16, _places_16_bit)
    # Small integers: exact in every type.
    a, b, c = (rng.integers(-8, 8, shape).astype(np.float32) for shape in ((16, k), (k, 8), (16, 8)))
    counts = (4, 2) if type_ == "tf32" else (8, 4)

    def fragment(matrix, operand, count):
        values = np.array([[matrix[places(i, lane, operand)] for i in range(count)] for lane in range(32)])
        if type_ == "f16":
            return values.astype(np.float16)
        return (values.view(np.uint32) >> 16).astype(np.uint16) if type_ == "bf16" else values

    in_c = np.array([[c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)] for lane in range(32)])
    out = np.zeros((32, 4), np.float32)
    shape = f"m16n8k{k}"
    body = f"""
        mul.wide.u32 %rd3, %r1, 16; mul.wide.u32 %rd4, %r1, 8;
        add.u64 %rd5, %rd100, %rd3; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd5];
        add.u64 %rd5, %rd101, %rd4; ld.global.v2.b32 {{%r6, %r7}}, [%rd5];
        add.u64 %rd5, %rd102, %rd3; ld.global.v4.b32 {{%f1, %f2, %f3, %f4}}, [%rd5];
        mma.sync.aligned.{shape}.row.col.f32.{type_}.{type_}.f32
            {{%f1, %f2, %f3, %f4}}, {{%r2, %r3, %r4, %r5}}, {{%r6, %r7}}, {{%f1, %f2, %f3, %f4}};
        add.u64 %rd5, %rd103, %rd3; st.global.v4.b32 [%rd5], {{%f1, %f2, %f3, %f4}};
    """
    fragments = fragment(a, "a", counts[0]), fragment(b, "b", counts[1]), in_c
    ptx.launch(kernel(body, 4), (1,), 32, [*fragments, out])
    expected = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


def test_mma_of_part_of_a_warp_is_found():
    body = """
        mov.b32 %r2, 0; mov.b32 %f1, 0f00000000; setp.lt.u32 %p1, %r1, 31;
        @%p1 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32
            {%f1, %f1, %f1, %f1}, {%r2, %r2, %r2, %r2}, {%r2, %r2}, {%f1, %f1, %f1, %f1};
    """
    with pytest.raises(ptx.PtxError, match="31 of 32 threads"):
        ptx.launch(kernel(body, 0), (1,), 32, [])


# Memory

COPY = (
    "add.u64 %rd2, %rd100, %rd1; ld.global.u32 %r2, [%rd2]; add.u64 %rd3, %rd101, %rd1; st.global.u32 [%rd3], %r2;"
)


@pytest.mark.parametrize("short, action", [(0, "load"), (1, "store")])
def test_access_out_of_bounds_is_found(short, action):
    arrays = [np.zeros(32 - (n == short), np.uint32) for n in range(2)]
    with pytest.raises(ptx.OutOfBounds, match=f"{action} of 4 bytes .* byte 124 of p{short} \\(124 bytes\\)"):
        ptx.launch(kernel(COPY, 2), (1,), 32, arrays)


def test_misaligned_access_is_found():
    body = "add.u64 %rd2, %rd100, 4; ld.global.v2.b32 {%r2, %r3}, [%rd2];"
    with pytest.raises(ptx.OutOfBounds, match="load of 8 bytes .* misaligned"):
        ptx.launch(kernel(body, 1), (1,), 32, [np.zeros(32, np.uint32)])


def test_shared_memory_has_bounds():
    with pytest.raises(ptx.OutOfBounds, match="store of 4 bytes at 512 of 512 bytes of shared"):
        ptx.launch(kernel("mov.u32 %r2, buffer; st.shared.u32 [%r2+512], %r1;", 0, BUFFER), (1,), 32, [])


def test_different_values_for_one_address_are_found():
    with pytest.raises(ptx.Race, match="different values to one address of p0"):
        ptx.launch(kernel("st.global.u32 [%rd100], %r1;", 1), (1,), 32, [np.zeros(1, np.uint32)])


def test_atomics_see_each_other():
    total, seen = np.zeros(1, np.float32), np.zeros(32, np.float32)
    body = """
        atom.global.gpu.acq_rel.add.f32 %f1, [%rd100], 0f3F800000;
        add.u64 %rd2, %rd101, %rd1; st.global.f32 [%rd2], %f1;
    """
    ptx.launch(kernel(body, 2), (1,), 32, [total, seen])
    assert total[0] == 32
    np.testing.assert_array_equal(np.sort(seen), LANES)


# What is not understood


@pytest.mark.parametrize(
    "body, message",
    [
        ("frobnicate.b32 %r2, %r1;", "unknown instruction frobnicate"),
        ("add.rp.f32 %f1, %f1, %f1;", "modifiers .'rp'. are not implemented"),
        ("ld.global.nonsense.u32 %r2, [%rd100];", "not implemented"),
        ("add.u32 %r2, %r3, 1;", "%r3 is read before it is written"),
        ("mov.b32 %r2, %nonsense;", "cannot parse the operand"),
        ("add.u32 %r2, %r1;", "expected 2 sources"),
        ("ld.global.u32 %r2, [12];", "in no buffer"),
        ("LOOP: bra LOOP;", "does the kernel end"),
    ],
)
def test_unknown_code_is_an_error(body, message):
    with pytest.raises(ptx.PtxError, match=message):
        ptx.launch(kernel(body, 1), (1,), 32, [np.zeros(1, np.uint32)], budget=1000)
