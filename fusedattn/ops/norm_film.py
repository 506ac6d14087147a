"""A norm, then the feature-wise affine of FiLM, its activation and a residual: conditional norms of every kind.

Mathematics, with gamma, beta and the gate broadcast along x (see ``fusedattn/ops/film.py``)::

    h = x, or with pre_residual r and pre_gate g       h = r + g x
    n = (h - mean) / sqrt(var + eps)                   mean and (biased) variance of h over its group
    u = n weight + bias
    z = (gamma + gamma_offset) u + beta                y = activation(z) + residual

A group is what shares one mean and variance::

    layer      the channels of one position            instance   the positions of one channel of a batch element
    rms        the same, with mean 0: var is mean h^2  batch      the positions of one channel, all batch elements
    group      the positions and C / num_groups neighbouring channels of a batch element

Backward, with dh the gradient of h as an output, and means over the group::

    dz = dy activation'(z)         dgamma = sum dz u               dbeta = sum dz
    du = (gamma + offset) dz       dweight = sum du n              dbias = sum du
    dn = weight du                 dh += (dn - mean(dn) - n mean(dn n)) / sqrt(var + eps)      (rms: no mean(dn))
    dx = g dh                      dg = sum dh x                   dr = dh

Statistics that are given, those of batch norm in evaluation, are constants: dh += dn / sqrt(var + eps).

In half precision h is rounded, as it is returned, and all that follows is computed in float32.

Symbols: B batch, C channels, T positions, G groups. Kernels: ``csrc/norm_film/``. Tests:
``tests/test_norm_film.py``, ``tests/test_norm_film_transforms.py``.
"""

import torch
from torch import Tensor

from fusedattn import _autograd, _conditioning
from fusedattn._conditioning import (
    FUNCTIONS,
    HALF,
    NUMBERS,
    Parameter,
    along,
    check_affine,
    check_features,
    check_like,
    check_parameter,
    check_same,
    gradient_fakes,
    have_one_per_channel,
    in_dtype,
    parts,
    per_channel,
)
from fusedattn._dispatch import autocast_enabled, choose, fail, once_per_signature, overridable
from fusedattn._options import NormFilmOptions as Options

# In the order of the enum in csrc/norm_film/options.h.
NORMS = ("layer", "rms", "group", "instance", "batch")
_NUMBERS = {name: number for number, name in enumerate(NORMS)}

# Reference


def _statistics(h: Tensor, options: Options) -> tuple[Tensor | None, Tensor]:
    """Mean (None for rms) and variance of each group, with 1 in place of the sizes that they were taken over.

    h has its channels as (groups, channels of a group), at channel_dim and the dimension after it.
    """
    norm, channel_dim = NORMS[options.norm], options.channel_dim
    dims = [channel_dim + 1]
    if norm not in ("layer", "rms"):
        dims += [d for d in range(1, h.dim()) if d not in (channel_dim, channel_dim + 1)]
    if norm == "batch":
        dims.append(0)
    if norm == "rms":
        return None, h.square().mean(dims, keepdim=True)
    var, mean = torch.var_mean(h, dims, correction=0, keepdim=True)
    return mean, var


def _reference(
    x,
    gamma,
    beta,
    gamma_added,
    beta_added,
    weight,
    bias,
    pre_gate,
    pre_gate_added,
    pre_residual,
    running_mean,
    running_var,
    residual,
    options: Options,
):
    """(y, h, mean, var): h is (0,) where it is x, the statistics are flat."""
    channel_dim, C = options.channel_dim, x.shape[options.channel_dim]
    arithmetic = torch.float32 if x.dtype in HALF else x.dtype

    def factor(parameter, added=None):
        t, *others = (
            along(part, x, channel_dim).to(arithmetic) for part in (parameter, added) if part is not None
        )
        return t + others[0] if others else t

    h = x
    is_formed = pre_gate is not None or pre_residual is not None
    if is_formed:
        h = x.to(arithmetic)
        if pre_gate is not None:
            h = factor(pre_gate, pre_gate_added) * h
        if pre_residual is not None:
            h = pre_residual + h
        h = h.to(x.dtype)
    norm = NORMS[options.norm]
    groups = {"layer": 1, "rms": 1, "group": options.num_groups}.get(norm, C)
    before, after = h.shape[:channel_dim], h.shape[channel_dim + 1 :]
    grouped = h.to(arithmetic).reshape(*before, groups, C // groups, *after)
    if options.training:
        mean, var = _statistics(grouped, options)
    else:
        shape = [1] * grouped.dim()
        shape[channel_dim] = C
        mean, var = (t.to(arithmetic).view(shape) for t in (running_mean, running_var))
    centred = grouped if mean is None else grouped - mean
    z = (centred * (var + options.eps).rsqrt()).flatten(channel_dim, channel_dim + 1)
    if weight is not None:
        z = z * factor(weight)
    if bias is not None:
        z = z + factor(bias)
    if gamma is not None:
        z = (factor(gamma, gamma_added) + options.gamma_offset) * z
    if beta is not None:
        z = z + factor(beta, beta_added)
    y = FUNCTIONS[options.activation](z)
    y = y if residual is None else y + residual
    var = var.flatten().detach()
    mean = torch.zeros_like(var) if mean is None else mean.flatten().detach()
    return y.to(x.dtype), h if is_formed else x.new_empty(0), mean, var


@overridable
def norm_film_ref(
    x: Tensor,
    gamma: Parameter = None,
    beta: Parameter = None,
    *,
    norm: str,
    num_groups: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel_dim: int | None = None,
    gamma_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    pre_residual: Tensor | None = None,
    pre_gate: Parameter = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    backend: str = "reference",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`norm_film` in plain PyTorch, on any device: the definition that kernels are tested against.

    Same arguments, shapes, results and errors; one pass over memory per arithmetic operation.
    """
    return norm_film(
        x,
        gamma,
        beta,
        norm=norm,
        num_groups=num_groups,
        weight=weight,
        bias=bias,
        eps=eps,
        channel_dim=channel_dim,
        gamma_offset=gamma_offset,
        activation=activation,
        residual=residual,
        pre_residual=pre_residual,
        pre_gate=pre_gate,
        running_mean=running_mean,
        running_var=running_var,
        num_batches_tracked=num_batches_tracked,
        training=training,
        momentum=momentum,
        backend=backend,
    )


# Declaration


def _fwd_fake(x, *arguments):
    options = Options(*arguments[12:])
    gate, pre_residual = arguments[6], arguments[8]
    B, C = x.shape[0], x.shape[options.channel_dim]
    norm = NORMS[options.norm]
    if norm in ("layer", "rms"):
        groups = B
        for d in range(1, x.dim()):
            groups = groups * (x.shape[d] if d != options.channel_dim else 1)
    else:
        groups = {"group": B * options.num_groups, "instance": B * C, "batch": C}[norm]
    statistic = x.new_empty(groups, dtype=torch.float64)
    h = x.new_empty(0) if gate is None and pre_residual is None else torch.empty_like(x)
    return torch.empty_like(x), h, statistic, torch.empty_like(statistic)


def _bwd_fake(grad_y, grad_h, x, *arguments):
    *parameters, pre_residual = arguments[:9]
    grad_pre_residual = x.new_empty(0) if pre_residual is None else torch.empty_like(x)
    return torch.empty_like(x), *gradient_fakes(x, *parameters), grad_pre_residual


class _BatchFold(_conditioning.Fold):
    """Groups lie within a batch element: N of them become N B."""

    parameters = 8

    def outputs_apart(self, outputs):
        """h is (0,) where it is x."""
        dims = tuple(0 if t.numel() or t.dim() > 1 else None for t in outputs)
        return tuple(t if dim is None else self._apart(t) for t, dim in zip(outputs, dims, strict=True)), dims


class _ChannelFold(_autograd.Fold):
    """Groups go over the batch: N times as many channels, (B, C, ...) becomes (B, N C, ...)."""

    def folded(self):
        return tuple(map(self.output, self.tensors, self.dims))

    def _place(self, rank: int) -> int:
        """The channels' dimension in what has one value per channel, in (B, C), or in what is like x."""
        return self.options.channel_dim if rank > 2 else rank - 1

    def output(self, t, dim):
        if t is None:
            return None
        place = self._place(t.dim() - (dim is not None))
        t = (
            t.unsqueeze(place).expand(*t.shape[:place], self.N, *t.shape[place:])
            if dim is None
            else t.movedim(dim, place)
        )
        return t.flatten(place, place + 1)

    def outputs_apart(self, outputs):
        places = tuple(self._place(t.dim()) for t in outputs)
        return tuple(
            t.unflatten(p, (self.N, t.shape[p] // self.N)) for t, p in zip(outputs, places, strict=True)
        ), places

    def gradients_apart(self, grads):
        given = [t is not None for t in self.tensors[: len(grads)]]
        found, dims = self.outputs_apart(grads)
        return (
            tuple(t if ok else grad for t, grad, ok in zip(found, grads, given, strict=True)),
            tuple(dim if ok else None for dim, ok in zip(dims, given, strict=True)),
        )


def _fold(N, tensors, dims, options: Options) -> _autograd.Fold:
    return (_ChannelFold if NORMS[options.norm] == "batch" else _BatchFold)(N, tensors, dims, options)


NORM_FILM = _autograd.Op(
    "norm_film",
    inputs=(
        *("x", "gamma", "beta", "gamma_added", "beta_added", "weight", "bias"),
        *("pre_gate", "pre_gate_added", "pre_residual"),
    ),
    others=("running_mean", "running_var"),
    added=("residual",),
    options=Options,
    outputs=("y", "h", "mean", "var"),
    kept=("h", "mean", "var"),
    hidden=("mean", "var"),
    reference=_reference,
    fwd_fake=_fwd_fake,
    bwd_fake=_bwd_fake,
    fold=_fold,
    any_strides=True,
)


# Public function


def _is_for_kernels(first: Tensor | None, added: Tensor | None, x: Tensor, channel_dim: int) -> bool:
    """Whether kernels take a parameter as it is: (C,) or (B, C)."""
    if first is None:
        return True
    B, C = x.shape[0], x.shape[channel_dim]
    return (
        added is None
        and first.dim() in (1, 2)
        and first.shape[-1] == C
        and (first.dim() == 1 or first.shape[0] == B)
    )


def _for_kernels(
    first: Tensor | None, added: Tensor | None, x: Tensor, channel_dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """A pair as kernels take it: each of its tensors (C,), (B, C) or like x. What is small is added up."""
    if first is None or _is_for_kernels(first, added, x, channel_dim):
        return first, None
    small = [have_one_per_channel((t,), channel_dim) for t in (first, added)]
    summed = all(small) and added is not None

    def exact(t):
        """What is repeated or added up here is rounded once, and so is its gradient."""
        narrow = t is not None and t.dtype in HALF
        return t.float() if narrow and (summed or t.dim() == 0 or 1 in t.shape) else t

    first, added = exact(first), exact(added)
    if all(small):
        return per_channel(first, added, x, channel_dim), None
    first, added = (
        per_channel(t, None, x, channel_dim) if t is None or is_small else t.expand(x.shape)
        for t, is_small in zip((first, added), small, strict=True)
    )
    return first, added


def _check_norm(x: Tensor, norm, num_groups, weight, bias, eps, channel_dim: int) -> None:
    C = x.shape[channel_dim]
    if norm == "group":
        if not isinstance(num_groups, int) or isinstance(num_groups, bool):
            raise TypeError(
                f"norm_film: num_groups: expected an int for group norm, got {type(num_groups).__name__}"
            )
        if num_groups < 1 or C % num_groups != 0:
            fail("norm_film", "num_groups", f"a divisor of the {C} channels", num_groups)
    elif num_groups is not None:
        fail("norm_film", "num_groups", f"None for norm {norm!r}", num_groups)
    if isinstance(eps, Tensor) or not eps >= 0:
        fail("norm_film", "eps", "a number from 0 up", eps)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_like("norm_film", name, t, x, "a Tensor or None", wider=True)
            if t.shape != (C,):
                fail("norm_film", name, f"shape {(C,)}", tuple(t.shape))


def _check_running(
    x: Tensor, norm, channel_dim: int, running_mean, running_var, num_batches_tracked, training: bool, momentum
) -> None:
    C = x.shape[channel_dim]
    running = {"running_mean": running_mean, "running_var": running_var}
    for name, t in {**running, "num_batches_tracked": num_batches_tracked}.items():
        if t is not None and norm != "batch":
            fail("norm_film", name, f"None for norm {norm!r}, it is batch norm's", "a Tensor")
    if (running_mean is None) != (running_var is None):
        absent = "running_mean" if running_mean is None else "running_var"
        fail("norm_film", absent, "a Tensor beside the other running statistic", None)
    for name, t in running.items():
        if t is not None:
            check_like("norm_film", name, t, x, "a Tensor or None", wider=True)
            if t.shape != (C,):
                fail("norm_film", name, f"shape {(C,)}", tuple(t.shape))
    if norm != "batch":
        return
    if not training and running_mean is None:
        fail("norm_film", "running_mean", "a Tensor where training is False", None)
    if training and x.numel() == C:
        fail("norm_film", "x", "more than one value per channel in training", f"shape {tuple(x.shape)}")
    if isinstance(momentum, Tensor):
        fail("norm_film", "momentum", "a number or None", "a Tensor")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        fail("norm_film", "num_batches_tracked", "a Tensor where momentum is None, for a cumulative average", None)


def _update(
    running_mean: Tensor, running_var: Tensor, num_batches_tracked, momentum, mean: Tensor, var: Tensor, n: int
) -> None:
    """The running statistics after a batch of n values per channel, in place; of the variance the unbiased one."""
    rate = momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            rate = 1.0 / num_batches_tracked.to(running_mean.dtype)
    for running, found in ((running_mean, mean), (running_var, var * (n / (n - 1)))):
        running.lerp_(found.to(running.dtype), rate)


_NO_KERNELS = {"cuda": "it has no kernels of norm_film"}
_NOT_PER_CHANNEL = _NO_KERNELS | dict.fromkeys(
    ("cpu", "triton"),
    "gamma, beta or pre_gate has one value a place, its kernels of group, instance and batch norm take one per "
    "channel",
)


@once_per_signature
def _plan(
    tensors, norm, num_groups, eps, channel_dim, gamma_offset, activation, training, momentum, backend
) -> tuple[str, Options, bool]:
    """The backend, the options, and whether its kernels take parameters as they are; raises for what cannot be
    computed."""
    x, *parameters, weight, bias, gate, gate_added, pre_residual, mean, var, num_batches, residual = tensors
    check_features("norm_film", x, channel_dim)
    check_affine("norm_film", x, parameters, channel_dim, gamma_offset, activation, residual)
    check_parameter("norm_film", "pre_gate", gate, gate_added, x, channel_dim)
    if pre_residual is not None:
        check_same("norm_film", "pre_residual", pre_residual, x)
    _check_norm(x, norm, num_groups, weight, bias, eps, channel_dim)
    _check_running(x, norm, channel_dim, mean, var, num_batches, training, momentum)
    channel_dim = int(channel_dim) % x.dim()
    gamma, beta, gamma_added, beta_added = parameters
    takes = norm in ("layer", "rms") or have_one_per_channel((*parameters, gate, gate_added), channel_dim)
    unable = _NO_KERNELS if takes else _NOT_PER_CHANNEL
    backend = choose("norm_film", backend, x.device, x.dtype, lambda: f"x {tuple(x.shape)}", unable)
    pairs = (gamma, gamma_added), (beta, beta_added), (gate, gate_added)
    as_they_are = backend == "reference" or all([_is_for_kernels(*pair, x, channel_dim) for pair in pairs])
    training = training or norm != "batch"
    numbers = num_groups or 0, training, eps, channel_dim, gamma_offset, NUMBERS[activation]
    return backend, Options(_NUMBERS[norm], *numbers), as_they_are


@overridable
def norm_film(
    x: Tensor,
    gamma: Parameter = None,
    beta: Parameter = None,
    *,
    norm: str,
    num_groups: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    channel_dim: int | None = None,
    gamma_offset: float = 0.0,
    activation: str | None = None,
    residual: Tensor | None = None,
    pre_residual: Tensor | None = None,
    pre_gate: Parameter = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = True,
    momentum: float | None = 0.1,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A norm and FiLM: ``activation((gamma + gamma_offset) * (n(h) * weight + bias) + beta) + residual``, fused.

    n is the norm, h is x or, with ``pre_residual`` or ``pre_gate``, ``pre_residual + pre_gate * x``: what a
    transformer block does between two of its layers. It is adaLN (Peebles & Xie 2023, arXiv:2212.09748), adaptive
    group norm (Dhariwal & Nichol 2021, arXiv:2105.05233), conditional instance norm (Dumoulin et al. 2017,
    arXiv:1610.07629) and conditional batch norm (de Vries et al. 2017, arXiv:1707.00683).

    Args:
        x: (B, ...) of rank 2 or more with C channels at ``channel_dim``; float32, float64, float16 or bfloat16.
            Arithmetic and statistics are at least float32.
        gamma, beta: as those of :func:`fusedattn.film`, in any of its shapes, pairs included. None for a factor of
            1 (``gamma_offset`` is then not applied) and for 0.
        norm: ``"layer"``, ``"rms"`` (Zhang & Sennrich 2019, arXiv:1910.07467), ``"group"``, ``"instance"`` or
            ``"batch"``. Layer and rms normalise the channels of each position.
        num_groups: of group norm, a divisor of C. Default: None, as the others need it.
        weight, bias: the norm's own, (C,), in the dtype of x or float32 beside half precision. Default: None.
        eps: added to the variance. Default: 1e-5.
        channel_dim: any dimension but 0, negative ones count from the end. Default: -1 for layer and rms, else 1.
        gamma_offset: 1.0 gives the (1 + gamma) form. Default: 0.0.
        activation: as that of :func:`fusedattn.film`. Default: None.
        residual: like x, added after the activation. Default: None.
        pre_residual: like x. Default: None, for 0.
        pre_gate: in the shapes of gamma, pairs included. Default: None, for 1.
        running_mean, running_var: (C,), of batch norm alone: moved in place towards those of the batch by
            ``momentum`` in training, used in place of them in evaluation. Default: None.
        num_batches_tracked: of batch norm alone, an integer of one element, counted up in training. Default: None.
        training: of batch norm alone; False takes the running statistics. Default: True.
        momentum: of batch norm alone; None for a cumulative average, 1 / num_batches_tracked. Default: 0.1.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        y with the shape and dtype of x; (y, h) where pre_residual or pre_gate is given. In half precision y is the
        norm of the rounded h, the one that is returned.

    Under autocast x, h and residual keep their precision, as for :func:`fusedattn.film`; gamma, beta and pre_gate
    are cast to the dtype of x, except float64 ones. x in half precision beside a float32 pre_residual becomes
    float32, as in PyTorch's addition. Second derivatives and forward-mode ones are computed through the reference
    formula.

    Raises:
        TypeError: x is not a Tensor, another input neither that nor None nor, for gamma, beta and pre_gate, a
            pair; channel_dim or num_groups not an int.
        ValueError: an input with the wrong shape, dtype, device or value; batch norm in training with one value
            per channel.
        UnsupportedError: no backend, or not the one asked for, can run these inputs.
    """
    if norm not in NORMS:
        fail("norm_film", "norm", f"one of {', '.join(map(repr, NORMS))}", repr(norm))
    if channel_dim is None:
        channel_dim = -1 if norm in ("layer", "rms") else 1
    if isinstance(x, Tensor) and autocast_enabled(x.device):
        if isinstance(pre_residual, Tensor) and pre_residual.dtype is torch.float32 and x.dtype in HALF:
            x = x.float()
        gamma, beta, pre_gate = (in_dtype(t, x.dtype) for t in (gamma, beta, pre_gate))
    gamma, gamma_added = parts("norm_film", "gamma", gamma)
    beta, beta_added = parts("norm_film", "beta", beta)
    gate, gate_added = parts("norm_film", "pre_gate", pre_gate)
    backend, options, as_they_are = _plan(
        (
            *(x, gamma, beta, gamma_added, beta_added, weight, bias, gate, gate_added, pre_residual),
            *(running_mean, running_var, num_batches_tracked, residual),
        ),
        *(norm, num_groups, eps, channel_dim, gamma_offset, activation, training, momentum, backend),
    )
    training, channel_dim = options.training, options.channel_dim
    if not as_they_are:
        gamma, gamma_added = _for_kernels(gamma, gamma_added, x, channel_dim)
        beta, beta_added = _for_kernels(beta, beta_added, x, channel_dim)
        gate, gate_added = _for_kernels(gate, gate_added, x, channel_dim)
    running = (None, None) if training else (running_mean, running_var)
    parameters = gamma, beta, gamma_added, beta_added, weight, bias, gate, gate_added
    y, h, mean, var = NORM_FILM(backend, (x, *parameters, pre_residual, *running, residual), options)
    if training and running_mean is not None and running_var is not None:
        n = x.numel() // x.shape[channel_dim]
        _update(running_mean, running_var, num_batches_tracked, momentum, mean, var, n)
    return y if pre_gate is None and pre_residual is None else (y, h)
