"""A norm and FiLM in Triton: the raw operators of ``norm_film`` and the choice of kernels.

Layer and rms norm, whose groups are rows: ``norm_film_rows.py``. Group, instance and batch norm, whose groups
reach over positions: ``norm_film_maps.py``. What both share: ``norm_film_problem.py``.
Definition and reference: ``fusedattn/ops/norm_film.py``.
"""

from functools import partial

import torch

from fusedattn._options import NormFilmOptions as Options
from fusedattn._options import schema
from fusedattn.triton import norm_film_maps, norm_film_rows
from fusedattn.triton._common import Kernel, asked_for, distinct, recorded, register, require
from fusedattn.triton.film_problem import RELU, SILU
from fusedattn.triton.norm_film_problem import (
    BATCH,
    GROUP,
    INSTANCE,
    LAYER,
    NAMES,
    RMS,
    Layout,
    check,
    kernel_options,
    statistics_of,
)

# Parameters in the order of the schema, and where NAMES has them.
_PARAMETERS = ("gamma", "beta", "gamma_added", "beta_added", "weight", "bias", "pre_gate", "pre_gate_added")
_ORDER = [_PARAMETERS.index(name) for name in NAMES]


def forward(x, *arguments):
    """norm_film_fwd, see csrc/library.cpp."""
    parameters, (pre_residual, *running, residual) = [arguments[n] for n in _ORDER], arguments[8:12]
    options = Options(*arguments[12:])
    check(x, parameters, options, pre_residual=pre_residual, residual=residual)
    if not options.training:
        for name, t in zip(("running_mean", "running_var"), running, strict=True):
            if t is None:
                raise RuntimeError(f"norm_film: {name}: expected a tensor where training is False, got None")
            require("norm_film", name, t, (x.shape[options.channel_dim],), t.dtype, x.device)
    is_formed = pre_residual is not None or parameters[6] is not None
    mean = x.new_empty(statistics_of(x, options), dtype=torch.float64)
    var = torch.empty_like(mean)
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x) if is_formed else x.new_empty(0), mean, var
    layout = Layout(x, options)
    y, h = torch.empty_like(layout.x), torch.empty_like(layout.x) if is_formed else None
    pre_residual, residual = layout.like(pre_residual), layout.like(residual)
    numbers = kernel_options(options, x)
    tensors = layout, parameters, pre_residual, residual, h, y, mean, var
    if options.norm in (LAYER, RMS):
        norm_film_rows.forward(*tensors, numbers)
    else:
        norm_film_maps.forward(*tensors, running, options, numbers)
    return layout.restored(y, x), x.new_empty(0) if h is None else layout.restored(h, x), mean, var


def backward(grad_y, grad_h, x, *arguments):
    """norm_film_bwd, see csrc/library.cpp."""
    parameters, pre_residual = [arguments[n] for n in _ORDER], arguments[8]
    *options, h, mean, var, output_mask = arguments[11:]
    options, is_formed = Options(*options), h.dim() == x.dim()
    check(x, parameters, options, grad_y=grad_y, grad_h=grad_h, h=h if is_formed else None)
    for name, t in (("mean", mean), ("var", var)):
        require("norm_film", name, t, (statistics_of(x, options),), torch.float64, x.device)
    of_x, *of_parameters, of_pre_residual = asked_for(output_mask, 10)
    asked = [of_parameters[n] for n in _ORDER]
    of_pre_residual = of_pre_residual and pre_residual is not None
    if x.numel() == 0:
        dx, dr = (torch.empty_like(x) if a else None for a in (of_x, of_pre_residual))
        grads = [
            t.new_zeros(t.shape) if a and t is not None else None for a, t in zip(asked, parameters, strict=True)
        ]
    else:
        layout = Layout(x, options)
        dx, dr = (torch.empty_like(layout.x) if a else None for a in (of_x, of_pre_residual))
        grad_y, grad_h = layout.like(grad_y), layout.like(grad_h)
        h = layout.like(h) if is_formed else layout.x
        numbers = kernel_options(options, x)
        tensors = layout, grad_y, grad_h, h, parameters, mean, var, asked, dx, dr
        if options.norm in (LAYER, RMS):
            grads = norm_film_rows.backward(*tensors, numbers)
        else:
            grads = norm_film_maps.backward(*tensors, options, numbers)
        dx, dr = (None if t is None else layout.restored(t, x) for t in (dx, dr))
    found = (dx, *(grads[NAMES.index(name)] for name in _PARAMETERS), dr)
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


_OPTIONAL = (*_PARAMETERS, "pre_residual", "running_mean", "running_var")
_INPUTS = ", ".join(["Tensor x", *(f"Tensor? {name}" for name in _OPTIONAL)])
_GRADIENTS = ", ".join(f"Tensor grad_{name}" for name in ("x", *_PARAMETERS, "pre_residual"))
register(
    f"norm_film_fwd_triton({_INPUTS}, Tensor? residual, {schema(Options)}) "
    "-> (Tensor y, Tensor h, Tensor mean, Tensor var)",
    forward,
)
register(
    f"norm_film_bwd_triton(Tensor? grad_y, Tensor? grad_h, {_INPUTS}, {schema(Options)}, Tensor h, Tensor mean, "
    f"Tensor var, int output_mask) -> ({_GRADIENTS})",
    backward,
)


def kernels(target=("cuda", 90)) -> list[Kernel]:
    """Every kernel as typical calls launch it: what a DiT block does between two layers, with a condition for each
    sample and for each token; short rows and long ones; feature maps with channels before and behind the
    positions, aligned and not."""

    def call(dtype, norm, shape, activation, residual, parameters, channels_last=False):
        x = torch.empty(shape, dtype=dtype, device="meta")
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        given = {name: x.new_empty(of, dtype=torch.float32) for name, of in parameters.items()}
        inputs = (
            *(x, *(given.get(name) for name in _PARAMETERS[:-1]), None),
            *(x if "pre_gate" in given else None, None, None),
        )
        options = (norm, 32 if norm == GROUP else 0, True, 1e-5, 2 if norm in (LAYER, RMS) else 1, 1.0, activation)
        y, h, mean, var = forward(*inputs, x if residual else None, *options)
        backward(x, x if h.dim() > 1 else None, *inputs, *options, h, mean, var, (1 << 10) - 1)

    def named(**shapes):
        return {name.replace("gate", "pre_gate"): shape for name, shape in shapes.items()}

    def own(C):
        return named(weight=(C,), bias=(C,))

    single, half = torch.float32, torch.bfloat16
    rows, sample = (8, 1024, 1152), named(gamma=(8, 1152), beta=(8, 1152))
    token = named(gamma=rows, beta=rows, gamma_added=(1152,), beta_added=(1152,))
    by_channel = named(gamma=(64, 128), beta=(64, 128))
    cases = (
        (single, LAYER, rows, 0, False, sample | named(gate=(8, 1152))),
        (half, LAYER, rows, 0, False, sample | named(gate=(8, 1152))),
        (half, RMS, rows, 0, False, token | named(gate=rows)),
        (single, LAYER, (8, 1024, 100), SILU, True, own(100)),
        (half, RMS, (4, 2048, 8192), 0, False, named(gamma=(4, 8192), weight=(8192,), gate=(4, 8192))),
        (single, GROUP, (16, 256, 64, 64), SILU, False, named(gamma=(16, 256), beta=(16, 256)) | own(256)),
        (half, BATCH, (64, 128, 28, 28), RELU, True, by_channel | named(gate=(64, 128)), True),
        (single, INSTANCE, (64, 512, 7, 7), RELU, True, own(512)),
    )
    return distinct(kernel for case in cases for kernel in recorded(partial(call, *case), target))
