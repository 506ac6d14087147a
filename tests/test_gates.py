"""The gates read machine code and resources rightly, and a kernel that is not as it should be fails them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks import roofline
from benchmarks.gates import __main__ as gates_main
from benchmarks.gates import amdgcn, cuda_kernels, sass, table, thresholds, tools, triton_kernels
from benchmarks.gates.kernel import Kernel
from benchmarks.gates.occupancy import MAX_SHARED, MAX_WARPS, occupancy

needs_nvcc = pytest.mark.skipif(cuda_kernels.missing() is not None, reason=str(cuda_kernels.missing()))

# As nvdisasm prints a kernel: an outer loop around a score loop of 4 tanh, a shorter remainder loop, a loop that
# copies, and the branch to itself that pads the end.
SCORES = """
\t.section\t.text.scores,"ax",@progbits
.text.scores:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDS.128 R4, [UR6] ;
.L_x_1:
        /*0020*/                   FFMA R13, R5, R28.reuse, 1 ;
        /*0030*/                   FFMA R14, R6, R28.reuse, 1 ;
        /*0040*/                   FFMA2 R16, R8.F32x2.HI_LO, R28.F32x2.HI_LO, 1, 1 ;
        /*0050*/                   FMUL R37, R13, R14 ;
        /*0060*/                   MUFU.RCP R37, R37 ;
        /*0070*/                   MUFU.RCP R38, R38 ;
        /*0080*/                   FFMA R35, R16.reuse, R44.reuse, R35 ;
        /*0090*/              @!P0 FFMA R35, R35, -2, 1 ;
        /*0098*/                   FFMA R36, -R35, R36, 1 ;
        /*00a0*/                   NOP ;
        /*00b0*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00c0*/                   FFMA R13, R5, R28, 1 ;
        /*00d0*/                   MUFU.RCP R13, R13 ;
        /*00e0*/               @P1 BRA `(.L_x_2) ;
        /*00f0*/              @!P2 BRA `(.L_x_0) ;
.L_x_3:
        /*0100*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0110*/               @P0 STG.E.64 desc[UR4][R6.64+0x8], R4 ;
        /*0120*/                   STG.E.U8 desc[UR4][R6.64], R4 ;
        /*0130*/             @!UP0 BRA.U `(.L_x_3) ;
        /*0140*/                   LDL R4, [R1+0x8] ;
        /*0150*/                   EXIT ;
.L_x_4:
        /*0160*/                   BRA `(.L_x_4);
\t.section\t.text.other,"ax",@progbits
.text.other:
        /*0000*/                   STL.64 [R1], R4 ;
        /*0010*/                   EXIT ;
"""

# One kernel of every kind that a gate must refuse: registers that cannot fit, a missing launch bound.
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const float* in, float* out) {
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = in[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) out[threadIdx.x + 1024 * i] = x[i] * x[63 - i];
}
"""
TIDY = """
extern "C" __global__ void __launch_bounds__(256) film_tidy(const float4* in, float4* out, int n) {
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += 256) out[i] = in[i];
}
"""
NARROW = TIDY.replace("film_tidy(const float4* in, float4* out", "film_narrow(const float2* in, float2* out")
UNBOUNDED = SPILLS.replace("__launch_bounds__(1024, 2) spills", "unbounded")


def kernel(**changes) -> Kernel:
    """One that passes."""
    values = dict(backend="CUDA C++", op="additive_attention", name="additive_attention_fwd_kernel<float>")
    values |= dict(arch="sm_90", threads=128, registers=64, shared=0, occupancy=0.5, stack=0, local=0)
    return Kernel(**values | dict(slots=3.7, mufu=0.5, fp32=3.0) | changes)


def compiled(source: str, op: str, folder, arch: int = 90) -> Kernel:
    path = folder / "kernel.cu"
    path.write_text(source)
    (found,) = cuda_kernels.kernels_of(op, cuda_kernels.compile_source(path, arch), arch, {})
    return replace(found, shared=0, occupancy=1.0)  # nothing launches it


# Machine code


def test_score_loop_of_a_listing():
    functions = sass.parse(SCORES)
    assert list(functions) == ["scores", "other"]
    loop = functions["scores"].score_loop()
    assert (loop.tanh, loop.mufu, loop.slots) == (4, 2, 10)  # NOP takes no slot, a predicated instruction does
    assert loop.fp32 == 2 + 2 + 1 + 1 + 1 + 1  # FFMA2 counts twice


def test_loops_are_innermost_and_not_padding():
    function = sass.parse(SCORES)["scores"]
    assert len(function.loops) == 4
    assert [last - first + 1 for first, last in function.innermost] == [11, 3, 4]


# Two loads that wait together, a third that waits for the first, an optional one; the next round waits, too.
LOADS = """
\t.section\t.text.loads,"ax",@progbits
.text.loads:
.L_x_0:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/               @P1 LDG.E.128 R16, desc[UR4][R2.64+0x20] ;
        /*0030*/                   FADD R12, R7, 1 ;
        /*0040*/                   LDG.E.U16 R13, desc[UR4][R2.64+0x40] ;
        /*0050*/                   FADD R12, R9, R13 ;
        /*0060*/                   LDG.E.64 R10, desc[UR4][R2.64+0x50] ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_what_waits_together_is_in_flight():
    assert sass.parse(LOADS)["loads"].in_flight() == 8 + 16 + 8


# A loop over channels for 2 queries: large inputs take the lower half, a second query may be absent, and the loop
# is continued from three places. What the compiler put behind the end is reached from within.
BRANCHES = """
\t.section\t.text.few,"ax",@progbits
.text.few:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   LDS.128 R4, [UR6] ;
        /*0020*/               @P0 BRA `(.L_x_5) ;
.L_x_6:
        /*0030*/                   BRA P2, `(.L_x_2) ;
        /*0040*/                   FFMA R13, R5, R28, 1 ;
        /*0050*/                   MUFU.RCP R13, R13 ;
        /*0060*/               @P1 BRA `(.L_x_3) ;
        /*0070*/                   FFMA R14, R5, R28, 1 ;
        /*0080*/                   MUFU.RCP R14, R14 ;
        /*0090*/                   FMUL R14, R14, R13 ;
        /*00a0*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00b0*/                   MUFU.EX2 R14, R14 ;
        /*00c0*/                   MUFU.RCP R14, R14 ;
        /*00d0*/               @P5 BRA `(.L_x_1) ;
.L_x_3:
        /*00e0*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00f0*/               @P3 BRA `(.L_x_1) ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   LDS.128 R8, [UR6] ;
        /*0120*/                   BRA `(.L_x_6) ;
"""


def test_the_way_with_most_tanh_is_counted():
    """Both queries in the paired form; from LDS to the last branch, with the branches passed on the way."""
    function = sass.parse(BRANCHES)["few"]
    assert [last - first + 1 for first, last in function.loops] == [13, 15]
    assert function.innermost == function.loops[1:]
    loop = function.score_loop()
    assert (loop.tanh, loop.mufu, loop.slots) == (2, 2, 12)


SWITCH = """
\t.section\t.text.switch,"ax",@progbits
.text.switch:
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   BRX R16 -0x860         (*"BRANCH_TARGETS .L_x_2,.L_x_3"*);
.L_x_2:
        /*0020*/                   BRA.DIV ~URZ, `(.L_x_9) ;
.L_x_3:
        /*0030*/               @P3 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize("operand", ["~URZ, ", ""], ids=["sm_80", "sm_75"])
def test_a_switch_goes_on_at_its_targets(operand):
    function = sass.parse(SWITCH.replace("~URZ, ", operand))["switch"]
    assert function.loops == [(0, 3)]
    assert function.memory_loop().global_widths == [16]
    assert sass.parse(SWITCH.replace(".L_x_2,.L_x_3", ".L_x_9"))["switch"].loops == []


def test_a_longer_way_to_the_same_tanh_is_not_counted():
    shorter = BRANCHES.replace("@P1 BRA `(.L_x_3)", "@P1 BRA `(.L_x_2)").replace("FFMA R14, R5, R28, 1", "NOP")
    loop = sass.parse(shorter)["few"].score_loop()
    assert (loop.tanh, loop.mufu, loop.slots) == (1, 3, 9)


def test_memory_loop_of_a_listing():
    function = sass.parse(SCORES)["scores"]
    assert function.memory_loop().global_widths == [16, 8, 1]
    assert function.body.local == 1 and sass.parse(SCORES)["other"].body.local == 1


@pytest.mark.parametrize(
    "opcode, size",
    [("LDG.E", 4), ("LDG.E.U16.CONSTANT", 2), ("STG.E.S8", 1), ("LDG.E.64", 8), ("LDG.E.ENL2.256", 32)],
)
def test_width_of_an_access(opcode, size):
    assert sass.Instruction(opcode, "").bytes == size


def test_names_are_short():
    bf16 = "void fusedattn::film_bwd_kernel_rows<__nv_bfloat16, 8>(fusedattn::FilmProblem<__nv_bfloat16>, int*)"
    assert cuda_kernels.short_name(bf16) == "film_bwd_kernel_rows<bfloat16, 8>"
    assert cuda_kernels.short_name("(anonymous namespace)::kernel(int)") == "kernel"
    assert cuda_kernels.short_name("void a::kernel<(a::Activation)3, (int)4>(int)") == "kernel<3, 4>"


# Occupancy


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        (75, 256, 32, 0, 4),  # threads
        (75, 128, 32, 64 << 10, 1),  # nothing is kept by the system
        (80, 256, 32, 0, 8),
        (80, 1024, 64, 0, 1),  # registers
        (80, 128, 162, 0, 3),  # registers in units of 256 a warp, a quarter of them to each scheduler
        (80, 128, 32, 48 << 10, 3),  # 49 KiB each, with what the system keeps, of 164
        (90, 128, 32, 100 << 10, 2),
        (90, 32, 16, 0, 32),  # blocks
        (120, 256, 40, 0, 6),  # 48 warps
        (120, 128, 32, 99 << 10, 1),
        (90, 1024, 65, 0, 0),
    ],
)
def test_occupancy_against_the_calculator(arch, threads, registers, shared, blocks):
    found = occupancy(arch, threads, registers, shared)
    assert found.blocks == blocks
    assert found.fraction == blocks * threads / 32 / MAX_WARPS[arch]


CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int arch, threads, registers, shared, all_shared, max_threads, reserved;
  while (scanf("%d %d %d %d %d %d", &arch, &max_threads, &all_shared, &threads, &registers, &shared) == 6) {
    reserved = arch < 80 ? 0 : 1024;
    cudaOccDeviceProp device;
    device.computeMajor = arch / 10, device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = max_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32, device.numSms = 1;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = all_shared;
    device.sharedMemPerBlockOptin = all_shared - reserved, device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = all_shared - reserved;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_occupancy_against_the_toolkits_own(tmp_path):
    """On a grid of block sizes, registers and shared memory, by the header that the CUDA toolkit brings."""
    source, program = tmp_path / "calculator.cpp", tmp_path / "calculator"
    source.write_text(CALCULATOR)
    subprocess.run([tools.nvcc(), str(source), "-o", str(program)], check=True)
    points = [
        (arch, threads, registers, shared)
        for arch in MAX_WARPS
        for threads in (32, 96, 128, 256, 512, 1024)
        for registers in (1, 24, 32, 33, 40, 57, 64, 80, 96, 128, 162, 168, 255)
        for shared in (0, 1, 4096, 16 << 10, 33000, 49 << 10, 99 << 10)
    ]
    lines = (f"{arch} {32 * MAX_WARPS[arch]} {MAX_SHARED[arch]} {a} {b} {c}" for arch, a, b, c in points)
    output = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    expected = list(map(int, output.split()))
    assert [occupancy(*point).blocks for point in points] == expected


def test_occupancy_names_the_architectures_it_knows():
    with pytest.raises(ValueError, match="arch: expected one of .*, got 70"):
        occupancy(70, 128, 32, 0)


# Thresholds


def test_a_good_kernel_passes():
    assert thresholds.failures(kernel()) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(local=2), "2 local-memory instructions"),
        (dict(arch="gfx942", local=2), "2 spilled vector registers"),
        (dict(arch="gfx942", scalar_spills=2), "2 spilled scalar registers"),
        (dict(name="fwd_kernel_split<half, 1>", slots=40.0, in_flight=32), "expected at most 39.95"),
        (dict(name="fwd_kernel_split<float, 16>", slots=5.1), "expected at most 4.99"),
        (dict(name="fwd_kernel_split<float, 16>", mufu=0.63), "expected at most 0.62"),
        (dict(stack=8), "8 bytes of stack"),
        (dict(mufu=0.56), "0.56 MUFU per tanh, expected at most 0.55"),
        (dict(slots=4.01), "4.01 issue slots per tanh, expected at most 4.0"),
        (dict(backend="Triton", name="fwd-64x64-fp32", slots=4.51), "expected at most 4.5"),
        (dict(name="additive_attention_bwd_kernel_inputs<float>", slots=8.01), "expected at most 8.0"),
        (dict(name="additive_attention_bwd_kernel_scores<float>", slots=4.01), "expected at most 4.0"),
        (dict(occupancy=0.0), "does not fit"),
        (dict(shared=None, occupancy=None), "no launch of it"),
        (dict(slots=None, mufu=None), "no score loop was found"),
        (
            dict(op="film", name="film_fwd_kernel_runs<float>", widths=(4, 16), in_flight=32),
            "accesses of 4, 16 bytes",
        ),
        (dict(op="film", name="film_fwd_kernel_rows<float, 4>", widths=(8,), in_flight=32), "accesses of 8 bytes"),
        (dict(op="film", name="film_fwd_kernel_runs<half>", widths=(16,), in_flight=16), "16.0 KiB in flight"),
        (dict(name="fwd_kernel_split<half, 1>", occupancy=0.25, in_flight=32), "16.0 KiB in flight"),
    ],
)
def test_a_broken_threshold_is_named(changes, reason):
    (found,) = thresholds.failures(kernel(**changes))
    assert reason in found


def test_slots_are_bounded_on_one_architecture():
    assert thresholds.failures(kernel(arch="sm_100", slots=9.0)) == []


@pytest.mark.parametrize(
    "name, backend, slots, mufu",
    [
        # Bytes of a tanh, with 9.98 slots each; where that is more than the score loop and an exponential.
        ("additive_attention_fwd_kernel_split<float, 1>", "CUDA C++", 8 * 9.986, 9.986),
        ("additive_attention_fwd_kernel_split<bfloat16, 1>", "CUDA C++", 4 * 9.986, 4.992),
        ("additive_attention_fwd_kernel_split<half, 16>", "CUDA C++", 4 + 8 / 16, 0.55 + 1 / 16),
        ("additive_attention_bwd_kernel_few_inputs<float, 16>", "CUDA C++", 8 + 8 / 16, 0.624),
        ("additive_attention_fwd_kernel_few-32x64-fp32", "Triton", 4 * 9.986, 4.992),
        ("additive_attention_fwd_kernel_few-32x64-bf16-fp32", "Triton", 2 * 9.986, 2.496),
        ("additive_attention_fwd_kernel_scores-32x64x256-fp32", "Triton", 4.5, 0.55),
    ],
)
def test_few_queries_may_take_what_memory_leaves(name, backend, slots, mufu):
    assert thresholds.limits(kernel(name=name, backend=backend)) == pytest.approx((slots, mufu), rel=1e-3)


@pytest.mark.parametrize(
    "name", ["fwd_kernel<double>", "fwd_kernel_few-32x32-fp64", "fwd_kernel_merge<float>", "bwd_kernel_keys<half>"]
)
def test_not_every_kernel_scores(name):
    assert thresholds.failures(kernel(name=f"additive_attention_{name}", slots=None, mufu=None)) == []


@pytest.mark.parametrize("name", ["film_fwd_kernel_rows<float, 1>", "film_bwd_kernel_sums<float>"])
def test_narrow_forms_may_be_narrow(name):
    assert thresholds.failures(kernel(op="film", name=name, widths=(4,))) == []


# Real compilers


@needs_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_a_kernel_that_spills_is_caught(tmp_path, arch):
    found = compiled(SPILLS, "film", tmp_path, arch)
    assert (found.name, found.threads, found.registers) == ("spills", 1024, 32)
    assert found.local > 0 and found.stack > 0
    assert any("local-memory" in reason for reason in thresholds.failures(found))


@needs_nvcc
def test_widths_of_compiled_loops(tmp_path):
    tidy = compiled(TIDY, "film", tmp_path)
    assert (tidy.widths, tidy.in_flight, thresholds.failures(tidy)) == ((16,), 16, [])
    narrow = compiled(NARROW, "film", tmp_path)
    assert narrow.widths == (8,)
    assert thresholds.failures(narrow) == [
        "global accesses of 8 bytes in the main loop, expected 16 alone",
        "16.0 KiB in flight, expected at least 20",
    ]


@needs_nvcc
def test_a_kernel_without_launch_bounds_is_refused(tmp_path):
    with pytest.raises(tools.ToolError, match="unbounded: no __launch_bounds__"):
        compiled(UNBOUNDED, "film", tmp_path)


@needs_nvcc
def test_a_kernel_that_does_not_compile_is_named(tmp_path):
    with pytest.raises(tools.ToolError, match="missing_name"):
        compiled("int x = missing_name;", "film", tmp_path)


def test_a_triton_kernel_that_does_not_compile_is_named(monkeypatch):
    def compile(backend, arch):
        raise ValueError("no such precision")

    described = SimpleNamespace(compile=compile)
    monkeypatch.setattr(triton_kernels, "kernels", lambda op, target: [("fwd_kernel-32x64-fp32", described)])
    with pytest.raises(
        tools.ToolError, match="fwd_kernel-32x64-fp32, gfx942: does not compile: no such precision"
    ):
        triton_kernels.measure_one("film", 0, "hip", "gfx942")


def test_what_does_not_compile_leaves_the_others_checked(monkeypatch, tmp_path, capsys):
    def fails(jobs, archs):
        raise tools.ToolError("fwd: does not compile")

    good = SimpleNamespace(missing=lambda: None, measure=lambda jobs, archs: [kernel(backend="Triton")])
    bad = SimpleNamespace(missing=lambda: None, measure=fails)
    good.compiler = bad.compiler = lambda: "a compiler"
    good.inputs = bad.inputs = list
    monkeypatch.setattr(gates_main, "PARTS", {"CUDA C++": bad, "Triton": good})
    monkeypatch.setattr(sys, "argv", ["gates", "--output", str(tmp_path)])
    assert gates_main.main() == 1
    output = capsys.readouterr()
    assert "CUDA C++: fwd: does not compile" in output.err
    assert "Triton (a compiler): 1 kernels on sm_90: 0 thresholds broken" in output.out
    assert "## Triton" in (tmp_path / "table.md").read_text()


AMDGCN = """
; Occupancy: 4
amdhsa.kernels:
  - .args: []
    .group_segment_fixed_size: 8192
    .private_segment_fixed_size: 0
    .sgpr_count:     38
    .sgpr_spill_count: 7
    .vgpr_count:     120
    .vgpr_spill_count: 3
"""


AMD_LOOP = """
.LBB0_1:
    s_mov_b32 s0, 0
.LBB0_2:
    global_load_dword v9, v[2:3], off
    v_fma_f32 v1, v2, v3, 1.0
    v_pk_fma_f32 v[4:5], v[6:7], v[8:9], 1.0 op_sel_hi:[1,1,0]
    v_rcp_f32_e32 v1, v1
    v_readlane_b32 s4, v60, 3
    v_fma_f32 v1, v1, 1.0, v2
    v_fma_f32 v1, v1, -2.0, 1.0
    v_fma_f32 v1, -v1, v2, 1.0
    s_cbranch_scc1 .LBB0_2
    v_writelane_b32 v60, s4, 3
    s_cbranch_scc1 .LBB0_1
"""


def test_score_loop_of_an_amd_listing():
    loop = amdgcn.score_loop(AMD_LOOP)
    assert len(amdgcn.innermost_loops(AMD_LOOP)) == 1
    assert (loop.tanh, loop.transcendental, loop.slots) == (3, 1, 8)


def test_amd_metadata():
    found = triton_kernels.read_amdgcn("film", "fwd", "gfx942", 256, AMDGCN)
    assert (found.registers, found.scalar_registers, found.shared) == (120, 38, 8192)
    assert (found.local, found.scalar_spills) == (3, 7)
    assert found.occupancy == 0.5
    spilled = ["3 spilled vector registers, expected none", "7 spilled scalar registers, expected none"]
    assert thresholds.failures(found) == spilled
    with pytest.raises(tools.ToolError, match="no .vgpr_count"):
        triton_kernels.read_amdgcn("film", "fwd", "gfx942", 256, AMDGCN.replace(".vgpr_count", ".other"))


# The table


def test_table_joins_architectures_and_marks_failures():
    rows = [kernel(), kernel(arch="sm_100", registers=72, mufu=0.6)]
    text = table.markdown(rows, {"CUDA C++": "nvcc"})
    assert (
        "| additive_attention_fwd_kernel<float> ✗ | 128 | 64 · 72 | 0 | 50% | 0 / 0 | 3.70 | 0.50 · 0.60 |" in text
    )
    assert "- ✗ additive_attention_fwd_kernel<float>: 0.60 MUFU per tanh, expected at most 0.55 (sm_100)" in text


def test_architectures_that_break_the_same_threshold_share_a_line():
    rows = [kernel(arch=arch, stack=8) for arch in ("sm_80", "sm_90")] + [kernel(arch="sm_100")]
    assert thresholds.broken(rows) == [f"{rows[0].name}: 8 bytes of stack, expected none (sm_80, sm_90)"]


def test_kernels_survive_json():
    assert Kernel.from_json(json.loads(json.dumps(kernel(widths=(16,)).to_json()))) == kernel(widths=(16,))


def test_the_stored_table_is_that_of_the_stored_counts():
    stored = json.loads(roofline.COUNTS.read_text())
    kernels = [Kernel.from_json(k) for k in stored["kernels"]]
    assert roofline.COUNTS.with_name("table.md").read_text() == table.markdown(kernels, stored["tools"])


def test_the_stored_table_breaks_no_threshold():
    assert thresholds.broken(map(Kernel.from_json, json.loads(roofline.COUNTS.read_text())["kernels"])) == []


def test_the_stored_table_is_of_these_sources():
    """`.ci/run` compiles for few architectures: `make gates` has checked all of them before."""
    digests = json.loads(roofline.COUNTS.read_text())["sources"]
    parts = {"CUDA C++": cuda_kernels, "Triton": triton_kernels, "Triton, oldest supported": triton_kernels}
    assert digests == {section: tools.digest_of(part.inputs()) for section, part in parts.items()}


def test_what_a_source_includes_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(tools, "ROOT", tmp_path)
    for name, text in {
        "op/cuda_fwd.cu": '#include "cuda_fwd.cuh"\n#include <cmath>',
        "op/cuda_fwd.cuh": '#include "../common/cuda.cuh"\n#include "op/options.h"',
        "common/cuda.cuh": "",
        "op/options.h": "",
        "op/cpu_kernel.h": "",
    }.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = cuda_kernels.inputs()
    assert [path.relative_to(tmp_path / "csrc").as_posix() for path in files] == [
        "common/cuda.cuh", "op/cuda_fwd.cu", "op/cuda_fwd.cuh", "op/options.h",
    ]  # fmt: skip
    before = tools.digest_of(files)
    (tmp_path / "csrc/common/cuda.cuh").write_text("// changed")
    assert tools.digest_of(files) != before


def stored(section: str) -> list[Kernel]:
    kernels = map(Kernel.from_json, json.loads(roofline.COUNTS.read_text())["kernels"])
    return [k for k in kernels if k.section == section]


def test_the_stored_table_has_the_cuda_kernels_of_the_sources():
    """Names alone: which types a template is compiled for is for the compiler to say."""
    texts = "".join(path.read_text() for path in (tools.ROOT / "csrc").glob("*/cuda_*.cuh"))
    bounds = r"(?:\s+__launch_bounds__\((?:[^()]|\([^()]*\))*\))?"
    declared = set(re.findall(rf"__global__ void{bounds}\s+(\w+)\(", texts))
    assert len(declared) == texts.count("__global__")
    for arch in cuda_kernels.ARCHITECTURES:
        assert {k.name.partition("<")[0] for k in stored("CUDA C++") if k.arch == f"sm_{arch}"} == declared


@pytest.mark.skipif(triton_kernels.missing() is not None, reason=str(triton_kernels.missing()))
@pytest.mark.parametrize("section", ["Triton", "Triton, oldest supported"])
def test_the_stored_table_has_the_triton_kernels_of_the_sources(section):
    for target in triton_kernels.TARGETS:
        declared = [name for op in triton_kernels.ops() for name, _ in triton_kernels.kernels(op, target)]
        name = triton_kernels.arch_name(target[1])
        assert [k.name for k in stored(section) if k.arch == name] == declared
