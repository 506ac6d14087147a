"""norm_film against PyTorch's own norms, and against plain compositions of them, within tests/tolerance.py."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from device import BACKEND, DEVICE, cpu_alone, examples, off_the_kink
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from test_film import numbers, stored_in
from test_film_parameters import parameter_shapes
from tolerance import assert_close_to_reference

from fusedattn import UnsupportedError, norm_film, norm_film_ref
from fusedattn._conditioning import ACTIVATIONS
from fusedattn.ops.norm_film import NORMS

pytestmark = pytest.mark.levels

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NAMES = (
    *("x", "gamma", "gamma_added", "beta", "beta_added", "weight", "bias"),
    *("pre_gate", "pre_gate_added", "pre_residual", "residual"),
)
FUNCTIONS = pytest.mark.parametrize("function", [norm_film, norm_film_ref])


def default_dim(norm):
    return -1 if norm in ("layer", "rms") else 1


def normalised(h, norm, num_groups, channel_dim, weight, bias, eps, running=(None, None)):
    """By PyTorch's own function, with the channels where that one wants them."""
    C = h.shape[channel_dim]
    if weight is None and bias is not None:  # whose gradient F.group_norm cannot make alone
        weight = torch.ones_like(bias)
    if norm in ("layer", "rms"):
        rows = h.movedim(channel_dim, -1)
        if norm == "layer":
            n = F.layer_norm(rows, (C,), weight, bias, eps)
        else:
            n = F.rms_norm(rows, (C,), weight, eps)
            n = n if bias is None else n + bias
        return n.movedim(-1, channel_dim)
    maps = h.movedim(channel_dim, 1).flatten(2) if h.dim() > 2 else h[..., None]
    if norm == "group":
        n = F.group_norm(maps, num_groups, weight, bias, eps)
    elif norm == "instance":
        n = F.instance_norm(maps, weight=weight, bias=bias, eps=eps)
    else:
        n = F.batch_norm(maps, *running, weight, bias, running[0] is None, eps=eps)
    return n.view(h.movedim(channel_dim, 1).shape).movedim(1, channel_dim)


def broadcast(parameter, added, x, channel_dim):
    """A parameter by its rank, as a user would write it."""

    def view(t):
        if t.dim() in (0, x.dim()):
            return t
        shape = [1] * x.dim()
        shape[channel_dim] = t.shape[-1]
        if t.dim() == 2:
            shape[0] = t.shape[0]
        return t.view(shape)

    return view(parameter) if added is None else view(parameter) + view(added)


def plain(
    inputs,
    norm,
    num_groups=None,
    channel_dim=None,
    eps=1e-5,
    gamma_offset=0.0,
    activation=None,
    running=(None, None),
    stored=None,
):
    """The definition, composed of PyTorch's functions; ``stored``: the dtype to which h is rounded."""
    x, gamma, gamma_added, beta, beta_added, weight, bias, gate, gate_added, pre_residual, residual = (
        inputs[name] for name in NAMES
    )
    channel_dim = (default_dim(norm) if channel_dim is None else channel_dim) % x.dim()
    h = x if gate is None else broadcast(gate, gate_added, x, channel_dim) * x
    h = h if pre_residual is None else pre_residual + h
    h = h if stored is None else h + (h.to(stored).to(h.dtype) - h).detach()
    z = normalised(h, norm, num_groups, channel_dim, weight, bias, eps, running)
    if gamma is not None:
        z = (broadcast(gamma, gamma_added, x, channel_dim) + gamma_offset) * z
    if beta is not None:
        z = z + broadcast(beta, beta_added, x, channel_dim)
    y = ACTIVATIONS[activation](z)
    y = y if residual is None else y + residual
    return y if gate is None and pre_residual is None else (y, h)


def ours(inputs, function=norm_film, **options):
    def pair(name):
        t, added = inputs[name], inputs[f"{name}_added"]
        return t if added is None else (t, added)

    if "running" in options:
        options["running_mean"], options["running_var"] = options.pop("running")
        options["training"] = False
    names = ("weight", "bias", "pre_residual", "residual")
    given = {name: inputs[name] for name in names}
    return function(inputs["x"], pair("gamma"), pair("beta"), pre_gate=pair("pre_gate"), **given, **options)


def make_inputs(shapes, dtype=torch.float32, seed=0):
    """Of these shapes by name, None for all others."""
    generator = torch.Generator().manual_seed(seed)
    return {name: numbers(shapes[name], generator).to(dtype) if name in shapes else None for name in NAMES}


def run(function, inputs, dtype=None, layout=lambda t: t, **options):
    """Outputs and the gradients of all inputs for random gradients of the outputs."""
    like = inputs["x"].dtype
    leaves = {k: t.to(dtype or t.dtype).requires_grad_() for k, t in inputs.items() if t is not None}
    laid_out = {
        k: layout(t) if t.dim() == inputs["x"].dim() and t.shape == inputs["x"].shape else t
        for k, t in leaves.items()
    }
    if dtype is not None and "running" in options:
        options["running"] = [t.to(dtype) for t in options["running"]]
    outputs = function({name: laid_out.get(name) for name in NAMES}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    grads = [numbers(y.shape, generator).to(like).to(y.dtype) for y in outputs]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    names = ("y", "h")[: len(outputs)]
    return dict(zip(names, outputs, strict=True)) | {
        f"grad_{name}": g for name, g in zip(leaves, found, strict=True)
    }


def largest_rstd(h, norm, num_groups, channel_dim, eps, running):
    """1 / sqrt(var + eps), of which errors of h are multiples."""
    if running is not None:
        return (running[1].double() + eps).rsqrt().max().item()
    h = h.double().movedim(channel_dim, 1).flatten(2)[..., None] if h.dim() > 2 else h.double()[..., None, None]
    B, C, N, _ = h.shape
    if norm in ("layer", "rms"):
        groups = h[..., 0].transpose(1, 2).reshape(-1, C)
    elif norm == "batch":
        groups = h[..., 0].transpose(0, 1).reshape(C, -1)
    else:
        groups = h.reshape(B * (num_groups if norm == "group" else C), -1)
    var = groups.square().mean(1) if norm == "rms" else groups.var(1, correction=0)
    return (var + eps).rsqrt().max().item()


def check(inputs, layout=lambda t: t, function=norm_film, **options):
    """As near to plain PyTorch in float64 as PyTorch is in the same dtype."""
    actual = run(lambda leaves, **o: ours(leaves, function, **o), inputs, layout=layout, **options)
    eager = run(plain, inputs, layout=layout, **options)
    exact = run(partial(plain, stored=inputs["x"].dtype), inputs, torch.float64, layout=layout, **options)
    x = inputs["x"]
    norm = options["norm"]
    dim = (options.get("channel_dim") or default_dim(norm)) % x.dim()

    def size(*names):
        return sum(inputs[n].double().abs().max().item() for n in names if inputs[n] is not None)

    gate = size("pre_gate", "pre_gate_added") if inputs["pre_gate"] is not None else 1.0
    h = exact.get("h", x.double())
    rstd = largest_rstd(h, norm, options.get("num_groups"), dim, options.get("eps", 1e-5), options.get("running"))
    n = 1 + (gate * size("x") + size("pre_residual")) * rstd  # magnitude of what cancels in the normalised h
    weight = max(size("weight"), 1.0)
    gamma = 1 + size("gamma", "gamma_added")
    z = gamma * (n * weight + size("bias")) + size("beta", "beta_added")
    dz = 6.0 * (1 + z)  # an error of z moves the slope by at most its curvature, below 1
    dh = 6.0 + dz * gamma * weight * rstd * n
    magnitude = {
        "y": z + size("residual"),
        "h": n,
        "grad_x": dh * gate,
        "grad_gamma": dz * (n * weight + size("bias")),
        "grad_beta": dz,
        "grad_weight": dz * gamma * n,
        "grad_bias": dz * gamma,
        "grad_pre_gate": dh * size("x"),
        "grad_pre_residual": dh,
        "grad_residual": 6.0,
    }
    for name, result in actual.items():
        of = inputs.get(name.removeprefix("grad_"))
        terms = max(x.numel() // max(1 if of is None else of.numel(), 1), 1)
        scale = magnitude[name.removesuffix("_added")] * terms**0.5
        assert_close_to_reference(result, eager[name], exact[name], terms=terms, name=name, scale=scale)
    return actual


def options_of(norm):
    return {"norm": norm, "num_groups": 3} if norm == "group" else {"norm": norm}


# PyTorch's own norms, on their own options

MAPS = [((2, 6, 4, 5), 1), ((2, 6, 40), 1), ((2, 7, 6), -1), ((3, 6), 1), ((2, 3, 6, 4), 2)]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, channel_dim", MAPS)
@pytest.mark.parametrize("norm", NORMS)
def test_matches_the_norms_of_pytorch(norm, shape, channel_dim, dtype, affine):
    if norm == "instance" and len(shape) == 2:
        pytest.skip("PyTorch has none over one element")
    C = shape[channel_dim]
    shapes = {"x": shape} | ({"weight": (C,), "bias": (C,)} if affine else {})
    check(make_inputs(shapes, dtype), channel_dim=channel_dim, eps=1e-3, **options_of(norm))


# Compositions


@pairwise(
    norm=NORMS,
    dtype=DTYPES,
    shape=[(2, 6, 4, 5), (2, 6, 33), (3, 5, 6), (5, 6)],
    absent=[
        (),
        ("gamma", "gamma_added"),
        ("beta", "beta_added", "bias"),
        ("weight", "bias"),
        ("pre_gate", "pre_gate_added"),
        ("pre_residual",),
        ("pre_gate", "pre_gate_added", "pre_residual"),
        ("residual", "gamma_added", "beta_added", "pre_gate_added"),
    ],
    activation=[None, "relu", "silu", "gelu"],
)
def test_compositions(norm, dtype, shape, absent, activation):
    channel_dim = 1 if shape[1] == 6 else 2
    if norm == "instance" and len(shape) == 2:
        shape = (*shape, 2)
    B, C = shape[0], shape[channel_dim]
    shapes = {
        **{"x": shape, "gamma": (B, C), "gamma_added": (C,), "beta": (1, C), "beta_added": (B, C)},
        **{"weight": (C,), "bias": (C,), "pre_gate": (B, C), "pre_gate_added": (C,)},
        **{"pre_residual": shape, "residual": shape},
    }
    inputs = make_inputs({name: s for name, s in shapes.items() if name not in absent}, dtype)
    check(inputs, channel_dim=channel_dim, activation=activation, gamma_offset=1.0, **options_of(norm))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_activations(norm, activation):
    for shape, channel_dim in (((2, 6, 67), 1), ((2, 67, 6), 2)):
        shapes = {"x": shape, "gamma": (2, 6), "beta": (6,), "residual": shape}
        check(make_inputs(shapes), channel_dim=channel_dim, activation=activation, **options_of(norm))


def before_the_activation(inputs, **options):
    z = plain(
        {name: t if t is None else t.double() for name, t in (inputs | {"residual": None}).items()}, **options
    )
    return z[0] if isinstance(z, tuple) else z


@settings(max_examples=examples(100))
@given(data=st.data())
def test_any_combination(data):
    norm = data.draw(st.sampled_from(NORMS))
    rank = data.draw(st.integers(2 if norm in ("layer", "rms") else 3, 5))
    shape = list(data.draw(st.lists(st.integers(1, 9), min_size=rank, max_size=rank)))
    channel_dim = data.draw(st.integers(1, rank - 1))
    num_groups = data.draw(st.integers(1, 4)) if norm == "group" else None
    shape[channel_dim] *= num_groups or 1
    if norm in ("instance", "batch", "group"):  # PyTorch has none of a single element
        shape[-1 if channel_dim < rank - 1 else 1] += 1
    shape = tuple(shape)
    of_parameters = [*parameter_shapes(shape, channel_dim, True)]
    if norm in ("layer", "rms") or BACKEND == "auto":  # of maps no kernels take them, and one is asked for by name
        of_parameters += parameter_shapes(shape, channel_dim, False)
    shapes = {"x": shape}
    for name in NAMES[1:]:
        if data.draw(st.booleans()) and (not name.endswith("_added") or name.removesuffix("_added") in shapes):
            fixed = {"weight": (shape[channel_dim],), "bias": (shape[channel_dim],)}
            fixed |= {"pre_residual": shape, "residual": shape}
            shapes[name] = fixed.get(name) or data.draw(st.sampled_from(of_parameters))
    order = data.draw(st.permutations(range(rank)))
    inputs = make_inputs(shapes, data.draw(st.sampled_from(DTYPES)))
    activation = data.draw(st.sampled_from(list(ACTIVATIONS)))
    options = {
        "norm": norm,
        "num_groups": num_groups,
        "channel_dim": channel_dim,
        "eps": 0.1,
        "gamma_offset": data.draw(st.sampled_from([0.0, 1.0])),
    }
    off_the_kink(activation, before_the_activation(inputs, **options))
    check(inputs, layout=stored_in(order), activation=activation, **options)


# Statistics


@pytest.mark.parametrize("dtype, mean", [(torch.float32, 1e4), (torch.bfloat16, 64.0), (torch.float64, 1e8)])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "rms"])
def test_a_mean_far_beyond_the_deviation(norm, dtype, mean):
    for shape, channel_dim in (((3, 12, 40, 41), 1), ((3, 700, 48), 2), ((2, 3, 30000), 1)):
        inputs = make_inputs({"x": shape, "gamma": (shape[channel_dim],)})
        x = (inputs["x"] + mean).to(dtype)
        inputs = {name: x if name == "x" else t if t is None else t.to(dtype) for name, t in inputs.items()}
        check(inputs, channel_dim=channel_dim, **options_of(norm))


@cpu_alone
@pytest.mark.parametrize("dtype, mean", [(torch.float32, 1e4), (torch.bfloat16, 64.0)])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "rms"])
def test_the_mean_is_known_beyond_the_precision_of_x(norm, dtype, mean):
    """PyTorch's error is that of a mean rounded to float32: 5e-4 deviations at 1e4."""
    for shape, channel_dim in (((3, 12, 40, 41), 1), ((3, 700, 48), 2), ((2, 3, 30000), 1)):
        x = (numbers(shape, torch.Generator().manual_seed(0)) + mean).to(dtype)
        options = {"channel_dim": channel_dim, **options_of(norm)}
        exact = norm_film_ref(x.double(), **options)
        error = (norm_film(x, **options).double() - exact).abs().max().item()
        assert error < 32 * torch.finfo(dtype).eps * exact.abs().max().item(), shape


@pytest.mark.parametrize("norm", NORMS)
def test_constant_input_has_variance_zero(norm):
    shapes = {"x": (2, 6, 5), "gamma": (2, 6), "beta": (2, 6)}
    inputs = make_inputs(shapes)
    inputs["x"] = torch.full((2, 6, 5), 3.0)
    results = run(ours, inputs, channel_dim=1, **options_of(norm))
    if norm != "rms":
        assert torch.equal(results["y"], inputs["beta"][:, :, None].expand(2, 6, 5))
    assert all(t.isfinite().all() for t in results.values())


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance"])
def test_one_element_a_group(norm):
    shape = (3, 4, 1)
    channel_dim, C = (2, 1) if norm in ("layer", "rms") else (1, 4)
    inputs = make_inputs({"x": shape, "beta": (C,)})
    options = {"norm": norm, "channel_dim": channel_dim, "num_groups": 4 if norm == "group" else None}
    found = run(ours, inputs, **options)
    x = inputs["x"]
    expected = torch.zeros(shape) if norm != "rms" else x * (x.square() + 1e-5).rsqrt()
    torch.testing.assert_close(found["y"], expected + broadcast(inputs["beta"], None, x, channel_dim))
    exact = run(partial(ours, function=norm_film_ref), inputs, torch.float64, **options)
    # Gradients that cancel are multiplied by 1 / sqrt(eps) = 316.
    torch.testing.assert_close(found["grad_x"].double(), exact["grad_x"], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_eps_is_not_rounded_to_half_precision(norm, dtype):
    """1e-8 would be 0 in float16; the variance here is as small."""
    x = (numbers((2, 6, 40), torch.Generator().manual_seed(0)) * 1e-4).to(dtype)
    options = {"channel_dim": 1, "eps": 1e-8, **options_of(norm)}
    y, expected = norm_film(x, **options).double(), norm_film_ref(x.double(), **options)
    torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert (expected - norm_film_ref(x.double(), **options | {"eps": 0.0})).abs().max() > 0.1


@pytest.mark.parametrize("norm", NORMS)
def test_huge_magnitudes(norm):
    for shape, channel_dim in (((2, 6, 40), 1), ((2, 40, 6), 2)):
        x = numbers(shape, torch.Generator().manual_seed(0))
        options = {"channel_dim": channel_dim, **options_of(norm)}
        for size in (1e15, -1e15):
            y = norm_film((size * x).float(), **options)
            exact = norm_film_ref((size * x).float().double(), **options)
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_a_number_stays_in_its_group(norm):
    clean = numbers((3, 6, 40), torch.Generator().manual_seed(0)).float()
    spoilt = clean.clone()
    spoilt[1, 2, 7] = float("nan")
    results = []
    for x in (clean.requires_grad_(), spoilt.requires_grad_()):
        y = norm_film(x, channel_dim=1, **options_of(norm))
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    members = {
        "layer": (1, slice(None), 7),
        "rms": (1, slice(None), 7),
        "group": (1, slice(2, 4), slice(None)),
        "instance": (1, 2, slice(None)),
        "batch": (slice(None), 2, slice(None)),
    }[norm]
    spoils = torch.zeros(3, 6, 40, dtype=torch.bool)
    spoils[members] = True
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found.isnan(), spoils)
        assert torch.equal(found[~spoils], expected[~spoils])


# Batch norm


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_are_those_of_batchnorm(dtype, momentum):
    module = torch.nn.BatchNorm2d(6, momentum=momentum)
    torch.nn.init.normal_(module.weight)
    buffers = {name: t.clone() for name, t in module.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    for training in (True, True, True, False, True):
        module.train(training)
        x = (numbers((4, 6, 5, 7), generator) * 3 + 2).to(dtype)
        y = norm_film(
            x,
            norm="batch",
            weight=module.weight,
            bias=module.bias,
            training=training,
            momentum=momentum,
            **buffers,
        )
        tolerance = {"atol": 0.05, "rtol": 0.02} if dtype is torch.bfloat16 else {}
        torch.testing.assert_close(y, module(x), **tolerance)
        torch.testing.assert_close(buffers, dict(module.named_buffers()))


def test_evaluation_takes_the_running_statistics():
    generator = torch.Generator().manual_seed(3)
    running = numbers((6,), generator).float(), numbers((6,), generator).float().square()
    before = [t.clone() for t in running]
    for dtype in (torch.float32, torch.bfloat16):
        for shape, channel_dim in (((2, 6, 35), 1), ((2, 35, 6), 2), ((1, 6), 1)):
            names = {"x": shape, "gamma": (shape[0], 6), "beta": (6,), "weight": (6,), "bias": (6,)}
            names |= {"pre_residual": shape, "pre_gate": (6,)}
            inputs = make_inputs(names, dtype)
            of = [t.to(dtype) for t in running]
            check(inputs, norm="batch", running=of, channel_dim=channel_dim, activation="relu", eps=0.1)
    assert all(map(torch.equal, running, before))


# Derivatives and transforms


@pytest.mark.machinery
@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_derivatives(norm):
    shape = (2, 6, 3)
    shapes = {
        **{"x": shape, "gamma": (2, 6), "gamma_added": (6,), "beta": (1, 6), "weight": (6,), "bias": (6,)},
        **{"pre_gate": (2, 6), "pre_residual": shape, "residual": shape},
    }
    inputs = make_inputs(shapes, torch.float64)
    given = [name for name in NAMES if inputs[name] is not None]

    def function(*leaves):
        filled = dict.fromkeys(NAMES) | dict(zip(given, leaves, strict=True))
        return ours(filled, channel_dim=1, activation="gelu", gamma_offset=1.0, eps=0.1, **options_of(norm))

    leaves = [inputs[name].requires_grad_() for name in given]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# Autocast and errors


@FUNCTIONS
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_precision_of_features(function, half):
    x, gamma = torch.randn(2, 3, 5) * 100, torch.randn(2, 5)
    expected = norm_film_ref(x, gamma.to(half).float(), norm="layer", residual=x)
    with torch.autocast(DEVICE, half):
        y = function(x, gamma.to(half), norm="layer", residual=x)
        torch.testing.assert_close(y, expected)
        assert function(x.to(half), gamma, norm="layer").dtype == half
        assert function(x.double(), gamma.double(), norm="layer").dtype == torch.float64
        y, h = function(x.to(half), norm="rms", pre_residual=x)
    assert y.dtype == h.dtype == torch.float32
    torch.testing.assert_close(h, x + x.to(half).float())


BUFFER = torch.zeros(3)


@FUNCTIONS
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"norm": "layernorm"}, ValueError, ["norm", "'layer'", "'layernorm'"]),
        ({"norm": "group"}, TypeError, ["num_groups", "an int", "NoneType"]),
        ({"norm": "group", "num_groups": 2}, ValueError, ["num_groups", "divisor of the 3", "2"]),
        ({"norm": "group", "num_groups": 0}, ValueError, ["num_groups", "divisor of the 3", "0"]),
        ({"num_groups": 3}, ValueError, ["num_groups", "None", "'instance'", "3"]),
        ({"x": [1.0]}, TypeError, ["x", "Tensor", "list"]),
        ({"x": torch.ones(2, 3, 4).long()}, ValueError, ["x", "floating-point", "int64"]),
        ({"gamma": torch.ones(2, 2)}, ValueError, ["gamma", "(3,) or (2, 3)", "(2, 2)"]),
        ({"pre_gate": torch.ones(4)}, ValueError, ["pre_gate", "(3,) or (2, 3)", "(4,)"]),
        ({"pre_gate": (BUFFER, None)}, TypeError, ["pre_gate[1]", "Tensor", "NoneType"]),
        ({"pre_residual": torch.ones(2, 3, 1)}, ValueError, ["pre_residual", "(2, 3, 4)", "(2, 3, 1)"]),
        ({"pre_residual": torch.ones(2, 3, 4).double()}, ValueError, ["pre_residual", "float32", "float64"]),
        ({"residual": torch.ones(2, 3, 1)}, ValueError, ["residual", "(2, 3, 4)", "(2, 3, 1)"]),
        ({"residual": 1.0}, TypeError, ["residual", "Tensor or None", "float"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "(3,)", "(4,)"]),
        ({"bias": torch.ones(3).half()}, ValueError, ["bias", "float32", "float16"]),
        ({"bias": 0.0}, TypeError, ["bias", "Tensor or None", "float"]),
        ({"eps": -1.0}, ValueError, ["eps", "from 0 up", "-1.0"]),
        ({"channel_dim": 3}, ValueError, ["channel_dim", "got 3"]),
        ({"activation": "swish"}, ValueError, ["activation", "'silu'", "'swish'"]),
        ({"running_mean": BUFFER, "running_var": BUFFER}, ValueError, ["running_mean", "'instance'", "batch"]),
        ({"norm": "batch", "running_mean": BUFFER}, ValueError, ["running_var", "beside", "None"]),
        (
            {"norm": "batch", "running_mean": BUFFER[:2], "running_var": BUFFER},
            *(ValueError, ["running_mean", "(3,)", "(2,)"]),
        ),
        ({"norm": "batch", "training": False}, ValueError, ["running_mean", "training is False"]),
        (
            {"norm": "batch", "x": torch.ones(1, 3), "gamma": None},
            ValueError,
            ["x", "more than one value", "(1, 3)"],
        ),
        (
            {"norm": "batch", "running_mean": BUFFER, "running_var": BUFFER, "momentum": None},
            *(ValueError, ["num_batches_tracked", "momentum is None"]),
        ),
        ({"backend": "gpu"}, ValueError, ["backend", "'cpu'", "'gpu'"]),
        ({"backend": "cuda"}, UnsupportedError, ["(2, 3, 4)", "no kernels of norm_film"]),
    ],
)
def test_bad_input_is_named(function, changes, error, words):
    arguments = {"x": torch.randn(2, 3, 4), "gamma": torch.randn(2, 3), "norm": "instance"} | changes
    with pytest.raises(error) as caught:
        function(**arguments)
    for word in ("norm_film", *words):
        assert word in str(caught.value)
