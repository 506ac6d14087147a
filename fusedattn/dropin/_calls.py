"""What a node of a ``torch.fx`` graph computes, whoever traced it.

One operation is a function, a method, a module or an ATen operator, by who traced it: ``torch.fx.symbolic_trace``,
TorchDynamo or ``torch.export``. A :class:`Call` has one name for it, and arguments by name.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fusedattn.dropin._adapter import has_hooks

# Arguments in order, which functions and methods have in common but for those below. "*" takes all that follow.
_SIGNATURES = {
    name: tuple(arguments.split())
    for name, arguments in {
        "add": "input other",
        "mul": "input other",
        "addcmul": "input tensor1 tensor2",
        "pow": "input exponent",
        "square": "input",
        "rsqrt": "input",
        "sqrt": "input",
        "mean": "input dim keepdim",
        "div": "input other",
        "tanh": "input",
        "sigmoid": "input",
        "relu": "input inplace",
        "leaky_relu": "input negative_slope inplace",
        "silu": "input inplace",
        "gelu": "input",
        "layer_norm": "input normalized_shape weight bias eps",
        "rms_norm": "input normalized_shape weight eps",
        "group_norm": "input num_groups weight bias eps",
        "instance_norm": "input running_mean running_var weight bias use_input_stats momentum eps",
        "batch_norm": "input running_mean running_var weight bias training momentum eps",
        "conv1d": "input weight bias *others",
        "conv2d": "input weight bias *others",
        "conv3d": "input weight bias *others",
        "scaled_dot_product_attention": "input *others",
        "softmax": "input dim",
        "log_softmax": "input dim",
        "dropout": "input p training",
        "masked_fill": "input mask value",
        "where": "condition input other",
        "linear": "input weight bias",
        "matmul": "input other",
        "bmm": "input other",
        "einsum": "equation *operands",
        "sum": "input dim keepdim",
        "cat": "tensors dim",
        "unsqueeze": "input dim",
        "squeeze": "input dim",
        "view": "input *shape",
        "reshape": "input *shape",
        "getitem": "input index",
        "select": "input dim index",
        "permute": "input *dims",
        "transpose": "input dim0 dim1",
        "expand": "input *size",
        "repeat": "input *repeats",
        "contiguous": "input",
    }.items()
}
_OF_METHODS = {"where": ("input", "condition", "other")}
_OF_CORE = {"_softmax": "softmax", "_log_softmax": "log_softmax"}  # core ATen's names
_SAME = {"self": "input", "mat2": "other", "axis": "dim", "train": "training"}


def _functions() -> dict[Any, str]:
    found: dict[Any, str] = {
        operator.add: "add",
        operator.mul: "mul",
        operator.truediv: "div",
        operator.matmul: "matmul",
        operator.pow: "pow",
        operator.getitem: "getitem",
    }
    for name in _SIGNATURES:
        for space in (torch, F, torch._C._nn):
            if callable(function := getattr(space, name, None)):
                found[function] = name
    for function in (torch.instance_norm, torch.batch_norm):  # whose arguments are in another order than in F
        del found[function]
    return found


_FUNCTIONS = _functions()


def _numbers(norm: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(norm, name) for name in (*names, "eps")}


# Modules that torch.fx calls as a whole: the operation, its numbers, its tensors.
_MODULES: dict[type, Callable[[Any], tuple[str, dict[str, Any], tuple[str, ...]]]] = {
    nn.Linear: lambda m: ("linear", {}, ("weight", "bias")),
    nn.Tanh: lambda m: ("tanh", {}, ()),
    nn.Sigmoid: lambda m: ("sigmoid", {}, ()),
    nn.ReLU: lambda m: ("relu", {"inplace": m.inplace}, ()),
    nn.LeakyReLU: lambda m: ("leaky_relu", {"negative_slope": m.negative_slope, "inplace": m.inplace}, ()),
    nn.SiLU: lambda m: ("silu", {"inplace": m.inplace}, ()),
    nn.GELU: lambda m: ("gelu", {"approximate": m.approximate}, ()),
    nn.Softmax: lambda m: ("softmax", {"dim": m.dim}, ()),
    nn.LogSoftmax: lambda m: ("log_softmax", {"dim": m.dim}, ()),
    nn.LayerNorm: lambda m: ("layer_norm", _numbers(m, "normalized_shape"), ("weight", "bias")),
    nn.RMSNorm: lambda m: ("rms_norm", _numbers(m, "normalized_shape"), ("weight",)),
    nn.GroupNorm: lambda m: ("group_norm", _numbers(m, "num_groups"), ("weight", "bias")),
    nn.InstanceNorm1d: lambda m: ("instance_norm", _numbers(m), ("weight", "bias", "running_mean")),
    nn.InstanceNorm2d: lambda m: ("instance_norm", _numbers(m), ("weight", "bias", "running_mean")),
    nn.Conv1d: lambda m: ("conv1d", {}, ("weight", "bias")),
    nn.Conv2d: lambda m: ("conv2d", {}, ("weight", "bias")),
    nn.Identity: lambda m: ("contiguous", {}, ()),
}


class Attribute(NamedTuple):
    """A tensor of a module that the graph calls as a whole."""

    path: str


Source = fx.Node | Attribute


class Call(NamedTuple):
    """An operation and its arguments; ``in_place``: its result is written into its input."""

    name: str
    arguments: dict[str, Any]
    in_place: bool = False

    def get(self, argument: str, default: Any = None) -> Any:
        return self.arguments.get(argument, default)

    @property
    def input(self) -> Any:
        return self.arguments.get("input")


def read(node: Any, module: nn.Module) -> Call | None:
    """What a node of the module's graph computes; None for what no pattern knows."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _of_module(node, module.get_submodule(str(node.target)))
    if node.op == "call_method":
        name = str(node.target)
        names = _OF_METHODS.get(name, _SIGNATURES.get(name.removesuffix("_")))
    elif isinstance(node.target, torch._ops.OpOverload):
        schema = node.target._schema
        space, _, name = schema.name.partition("::")
        names = tuple(argument.name for argument in schema.arguments) if space == "aten" else None
        name = _OF_CORE.get(name, name)
    elif node.op == "call_function":
        name = _FUNCTIONS.get(node.target, "")
        names = _SIGNATURES.get(name)
    else:
        return None
    arguments = None if names is None else _bound(names, node.args, node.kwargs)
    if arguments is None:
        return None
    return Call(name.removesuffix("_"), arguments, name.endswith("_") or bool(arguments.get("inplace")))


def _bound(names: Sequence[str], args: Sequence, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name; None where there are more than expected."""
    found: dict[str, Any] = {}
    for n, value in enumerate(args):
        if n == len(names):
            return None
        if names[n].startswith("*"):
            rest = args[n:]
            found[names[n][1:]] = tuple(rest[0]) if isinstance(rest[0], (tuple, list)) else tuple(rest)
            break
        found[_SAME.get(names[n], names[n])] = value
    return found | {_SAME.get(name, name): value for name, value in kwargs.items()}


def _of_module(node: fx.Node, module: Any) -> Call | None:
    if type(module) not in _MODULES or has_hooks(module) or len(node.args) != 1 or node.kwargs:
        return None
    name, numbers, tensors = _MODULES[type(module)](module)
    arguments = {"input": node.args[0], **numbers}
    for tensor in tensors:
        arguments[tensor] = None if getattr(module, tensor) is None else Attribute(f"{node.target}.{tensor}")
    return Call(name, arguments, bool(numbers.get("inplace")))


# What stands in the way of moving an operation to a later place

_WRITING = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
    *(getattr(operator, f"i{name}") for name in ("matmul", "and", "or", "xor")),
}


def writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a node writes into a tensor that exists, or changes a mode, as of autocast or of gradients."""
    target: Any = node.target
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(target), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if target in _WRITING or (name.endswith("_") and not name.endswith("__")):
        return True
    if name.startswith(("_enter_", "_exit_", "_set_grad", "set_grad")) or name.endswith("_mode"):
        return True
    call = read(node, module)
    if call is not None and (call.in_place or (call.name == "batch_norm" and call.get("training"))):
        return True
    return node.kwargs.get("out") is not None or bool(node.kwargs.get("inplace"))
