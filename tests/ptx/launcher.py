"""Triton's launches without a driver: compile for a GPU that is not there, run the PTX on tensors of the CPU.

Inside ``on_ptx(90)`` a call ``kernel[grid](...)`` takes the arguments as Triton's own launcher does (what is None,
1 or a multiple of 16 is compiled in), so a kernel runs together with the Python code that launches it. A buffer
is the whole storage of a tensor: an access outside is an error.
"""

import contextlib
import functools
import importlib
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fusedattn import _autograd, _library
from fusedattn.ops.additive_attention import ATTENTION
from fusedattn.ops.additive_attention_varlen import ATTENTION_VARLEN
from fusedattn.ops.additive_scores import SCORES
from fusedattn.ops.attention_pool import ATTENTION_POOL
from fusedattn.ops.film import FILM
from fusedattn.ops.gated_film import GATED_FILM
from fusedattn.ops.hard_additive_attention import HARD_ATTENTION
from fusedattn.ops.location_attention import LOCATION_ATTENTION
from fusedattn.ops.norm_film import NORM_FILM

from .executor import launch
from .memory import GlobalMemory
from .parser import parse

_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}


def _specialised(value, specialise: bool):
    """Type of an argument in a signature, and whether it counts as a multiple of 16."""
    if value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{_NAMES[value.dtype]}", value.data_ptr() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and specialise:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", specialise and value % 16 == 0


class Launches:
    """What was compiled and run: for tests that ask whether every kernel was."""

    def __init__(self, arch: int, edit):
        self.arch, self.edit = arch, edit
        self.compiled: dict[tuple, tuple] = {}
        self.executed: dict[str, int] = {}  # name of a kernel -> instructions

    def run(self, function: JITFunction, *args, grid, warmup=False, **kwargs):
        names = set(function.arg_names)
        options = {name: value for name, value in kwargs.items() if name not in names}
        bound = function.signature.bind(*args, **{name: v for name, v in kwargs.items() if name in names})
        bound.apply_defaults()
        signature, constexprs, divisible, values = {}, {}, [], []
        for parameter, value in zip(function.params, bound.arguments.values(), strict=True):
            if parameter.is_constexpr:
                kind, multiple = "constexpr", False
            else:
                kind, multiple = _specialised(value, not parameter.do_not_specialize)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constexprs[parameter.name] = getattr(value, "value", value)
            else:
                values.append(value)
            if multiple:
                divisible.append(parameter.name)
        key = (function, *signature.items(), *constexprs.items(), *divisible, *options.items())
        if key not in self.compiled:
            self.compiled[key] = self._compile(function, signature, constexprs, divisible, options)
        self._launch(*self.compiled[key], grid(bound.arguments) if callable(grid) else grid, values)

    def _compile(self, function, signature, constexprs, divisible, options):
        index = function.arg_names.index
        source = ASTSource(
            function,
            signature=signature,
            constexprs={(index(name),): value for name, value in constexprs.items()},
            attrs={(index(name),): [["tt.divisibility", 16]] for name in divisible},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", self.arch, 32), options=options)
        text = compiled.asm["ptx"]
        return parse(self.edit(text) if self.edit else text), compiled.metadata

    def _launch(self, kernel, metadata, grid, values) -> None:
        memory, buffers = GlobalMemory(), {}

        def address(tensor: torch.Tensor) -> int:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in buffers:
                data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                buffers[storage.data_ptr()] = memory.add(data, f"a tensor {tuple(tensor.shape)}")
            return buffers[storage.data_ptr()] + tensor.storage_offset() * tensor.element_size()

        arguments = [address(v) if isinstance(v, torch.Tensor) else v for v in values]
        # Scratch memory that Triton appends to the parameters, which these kernels do not ask for.
        arguments += [0] * (len(kernel.parameters) - len(arguments))
        executed = launch(kernel, grid, 32 * metadata.num_warps, arguments, metadata.shared, memory=memory)
        self.executed[kernel.name] = self.executed.get(kernel.name, 0) + executed


@functools.cache
def _register_for_cpu_tensors() -> torch.library.Library:
    """The raw operators' kernels for GPUs also for tensors of the CPU, whose launches end up here."""
    scored = (ATTENTION, ATTENTION_VARLEN, ATTENTION_POOL, SCORES, HARD_ATTENTION, LOCATION_ATTENTION)
    for op in (FILM, GATED_FILM, NORM_FILM, *scored):
        importlib.import_module(f"fusedattn.triton.{op.name}")
        if "triton" not in op.operators:  # a torch built for the CPU
            op.operators["triton"] = _autograd.Operators(op, "_triton")
    library = torch.library.Library("fusedattn", "IMPL")  # what it registers lives as long as it
    on_gpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for op in torch._C._dispatch_get_all_op_names():
        namespace, _, name = op.partition("::")
        if namespace == "fusedattn" and name.endswith("_triton"):
            overload = getattr(torch.ops.fusedattn, name).default
            library.impl(op, functools.partial(overload.redispatch, on_gpu), "CPU")
    return library


@contextlib.contextmanager
def on_ptx(arch: int, edit=None):
    """Runs Triton's launches as PTX for ``arch``; ``edit`` may change the text of a kernel before it runs.

    Inside, ``backend="triton"`` takes tensors of the CPU, as it does under Triton's interpreter.
    """
    _register_for_cpu_tensors()
    launches = Launches(arch, edit)
    with contextlib.ExitStack() as patches:
        # An ordinary function, so that it binds to the JITFunction.
        run = lambda function, *args, **kwargs: launches.run(function, *args, **kwargs)  # noqa: E731
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.multiple(_library, TRITON_ERROR=None, TRITON_INTERPRETED=True))
        yield launches
