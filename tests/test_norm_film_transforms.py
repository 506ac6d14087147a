"""norm_film inside PyTorch: opcheck, torch.compile, torch.func, torch.export, any number of threads."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE, not_on_the_standin, raw_op
from test_norm_film import NAMES, make_inputs, options_of, ours

from fusedattn import film, gated_film, norm_film, norm_film_ref
from fusedattn._conditioning import NUMBERS
from fusedattn.ops.norm_film import NORMS

pytestmark = pytest.mark.levels

GIVEN = tuple(name for name in NAMES if name not in ("beta_added", "pre_gate_added"))


def inputs_of(norm, dtype=torch.float32, channel_dim=1):
    """Everything that norm_film takes, for 6 channels."""
    shape = (2, 6, 5, 3) if channel_dim == 1 else (2, 5, 6)
    shapes = {
        **{"x": shape, "gamma": (2, 6), "gamma_added": (6,), "beta": (6,), "weight": (6,), "bias": (6,)},
        **{"pre_gate": (2, 6), "pre_residual": shape, "residual": shape},
    }
    return make_inputs(shapes, dtype)


def call(function, norm, channel_dim=1, **options):
    def run(*leaves):
        filled = dict.fromkeys(NAMES) | dict(zip(GIVEN, leaves, strict=True))
        return ours(filled, function, channel_dim=channel_dim, activation="silu", **options_of(norm), **options)

    return run


def leaves_of(norm, dtype=torch.float32, channel_dim=1):
    inputs = inputs_of(norm, dtype, channel_dim)
    return [inputs[name] for name in GIVEN]


def arguments(norm, shape=(2, 6, 5, 3), channel_dim=1, like_x=False, alone=False, training=True):
    """Of the raw operator's forward."""
    number = {"group": 3}.get(norm, 0)
    options = (NORMS.index(norm), number, training, 1e-3, channel_dim, 1.0, NUMBERS["silu"])
    x = torch.randn(shape)
    running = (None, None) if training else (torch.randn(6), torch.rand(6))
    if alone:
        return (x, *(None,) * 9, *running, None, *options)
    gamma = torch.randn(shape if like_x else (2, 6))
    return (
        *(x, gamma, torch.randn(6), None, gamma, torch.randn(6), torch.randn(6)),
        *(gamma, torch.randn(6), torch.randn(shape), *running, torch.randn(shape), *options),
    )


@pytest.mark.machinery
@pytest.mark.interpreted
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_raw_ops_pass_opcheck(norm, alone):
    channel_dim = 2 if norm in ("layer", "rms") else 1
    shape = (2, 5, 6) if channel_dim == 2 else (2, 6, 5, 3)
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for like_x, training in itertools.product((False, True), (True, False)):
        if (not training and norm != "batch") or (like_x and norm not in ("layer", "rms")):
            continue
        forward = arguments(norm, shape, channel_dim, like_x, alone, training)
        torch.library.opcheck(raw_op("norm_film_fwd").default, forward, test_utils=utils)
        y, h, mean, var = raw_op("norm_film_fwd")(*forward)
        grad_h = None if alone else torch.randn_like(y)
        backward = (torch.randn_like(y), grad_h, *forward[:12], *forward[13:], h, mean, var, 0b1111111111)
        torch.library.opcheck(raw_op("norm_film_bwd").default, backward, test_utils=utils)


@pytest.mark.interpreted
@pytest.mark.parametrize("wrong", ["gamma", "weight", "pre_residual", "residual"])
def test_raw_ops_refuse_shapes_that_do_not_fit(wrong):
    place = {"gamma": 1, "weight": 5, "pre_residual": 9, "residual": 12}[wrong]
    given = list(arguments("layer", (2, 5, 6), 2))
    given[place] = given[place][..., :2]
    with pytest.raises(RuntimeError, match=f"norm_film: {wrong}: expected"):
        raw_op("norm_film_fwd")(*given)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("channel_dim", [1, 2])
def test_vmap(norm, channel_dim):
    leaves = leaves_of(norm, torch.float64, channel_dim)
    for pattern in ((0,) * 9, (0, *(None,) * 8), (None, 0, *(None,) * 7), (1, None, 0, None, 0, None, 0, None, 1)):
        args = []
        for n, (t, dim) in enumerate(zip(leaves, pattern, strict=True)):
            generator = torch.Generator().manual_seed(n)
            args.append(
                t if dim is None else torch.randn(3, *t.shape, generator=generator, dtype=t.dtype).movedim(0, dim)
            )
        found = []
        for function in (norm_film, norm_film_ref):

            def loss(*of, function=function):
                y, h = call(function, norm, channel_dim, eps=0.1)(*of)
                return (y.sin() + h.cos()).sum()

            gradient = torch.func.vmap(torch.func.grad(loss, tuple(range(9))), in_dims=pattern)
            found.append(gradient(*args))
        torch.testing.assert_close(*found)


@pytest.mark.machinery
@pytest.mark.parametrize("norm", NORMS)
def test_export_and_training_of_what_was_exported(norm):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.others = torch.nn.ParameterList(leaves_of(norm)[1:])

        def forward(self, x):
            y, h = call(norm_film, norm)(x, *self.others)
            return y * h

    block, x = Block(), leaves_of(norm)[0]
    exported = torch.export.export(block, (x,)).module()
    results = []
    for module in (block, exported):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    torch.testing.assert_close(*results)


@pytest.mark.machinery
@not_on_the_standin("Inductor makes no code for it")
@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_compile_without_graph_breaks(norm):
    def function(*leaves):
        y, h = call(norm_film, norm)(*leaves)
        return (y / 3).sin() + h  # a division after the norm was compiled wrong once (PyTorch issue 186577)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    results = []
    for f in (function, compiled):
        leaves = [t.clone().requires_grad_() for t in leaves_of(norm)]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.machinery
@not_on_the_standin("Inductor makes no code for it")
def test_compiled_convolutions_are_not_copied(fresh_dynamo):
    """Inductor gives them channels last, whatever the layout that eager code has."""
    from torch._inductor.utils import run_and_get_code

    def function(x, z, *weights):
        y = F.conv2d(x, weights[0])
        y = norm_film(y, z, z, norm="batch", activation="silu", residual=y.cos())
        return gated_film(film(F.conv2d(y, weights[1]), z, residual=y[:, :, 2:, 2:]), z)

    def training(function):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 5, 7, 6), (2, 8), (8, 5, 3, 3), (8, 8, 3, 3)
        leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.sin().sum(), leaves)]

    found, code = run_and_get_code(lambda: training(torch.compile(function, fullgraph=True)))
    torch.testing.assert_close(found, training(function))
    for name in ("film", "norm_film"):
        given = re.search(rf"fusedattn\.{name}_fwd\.default\((\w+)", code[0])[1]
        assert re.search(rf"{given} = extern_kernels\.convolution|{given} = \w+; del", code[0])


@not_on_the_standin("Inductor makes no code for it")
def test_running_statistics_under_compile():
    buffers = [torch.zeros(6), torch.ones(6), torch.zeros((), dtype=torch.int64)]
    names = ("running_mean", "running_var", "num_batches_tracked")
    results = []
    for compile in (False, True):
        own = dict(zip(names, [t.clone() for t in buffers], strict=True))

        def step(x, own=own):
            return norm_film(x, norm="batch", momentum=None, **own)

        step = torch.compile(step, fullgraph=True) if compile else step
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            y = step(torch.randn(4, 6, 5, generator=generator, device="cpu").to(DEVICE))
        results.append([y, *own.values()])
    torch.testing.assert_close(*results)


@not_on_the_standin("threads are the CPU's")
@pytest.mark.parametrize(
    "norm, shape, channel_dim",
    [
        ("layer", (3, 700, 96), 2),
        ("rms", (2100, 96), 1),
        ("group", (3, 12, 70, 60), 1),
        ("group", (2, 6, 300, 400), 1),
        ("group", (3, 4000, 12), 2),
        ("instance", (2, 6, 9000), 1),
        ("batch", (16, 6, 30, 31), 1),
        ("batch", (4, 3000, 12), 2),
    ],
)
def test_the_number_of_threads_changes_no_bit(norm, shape, channel_dim):
    B, C = shape[0], shape[channel_dim]
    shapes = {"x": shape, "gamma": (B, C), "beta": (C,), "weight": (C,), "pre_gate": (B, C), "pre_residual": shape}
    inputs = make_inputs(shapes)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaves = {name: t if t is None else t.clone().requires_grad_() for name, t in inputs.items()}
            y, h = ours(leaves, activation="silu", channel_dim=channel_dim, **options_of(norm))
            given = [t for t in leaves.values() if t is not None]
            results.append([y, h, *torch.autograd.grad(y.sum() + h.sum(), given)])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)
