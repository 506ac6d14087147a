"""Who competes: plain PyTorch, torch.compile of the same lines, the strongest rival (identity.py), fusedattn, and
x.clone() beside FiLM."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

import fusedattn

from .cases import AttentionCase, Case, FilmCase
from .identity import Identity

Function = Callable[..., Tensor | tuple[Tensor, ...]]

EAGER = ("eager @", "eager sum")  # the two ways to write attention's score; a ratio quotes the faster
COMPILED = ("compile @", "compile sum")
IDENTITY = "identity"
FUSED = "fused"
COMPILED_FUSED = "fused compile"
CLONE = "clone"
RIVALS = ("eager", "compile", IDENTITY)  # kinds: a contender's name begins with its own


def attention_matmul(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *bias: Tensor, phi=torch.tanh
) -> Tensor:
    return sum(bias, phi(query[:, :, None] + key[:, None]) @ weight).softmax(-1) @ value


def attention_sum(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, *bias: Tensor, phi=torch.tanh
) -> Tensor:
    return sum(bias, (phi(query[:, :, None] + key[:, None]) * weight).sum(-1)).softmax(-1) @ value


def film_channels_first(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (x * gamma[:, :, None, None]).add_(beta[:, :, None, None])


def film_channels_end(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (x * gamma[:, None]).add_(beta[:, None])


def clone(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return x.clone()


class Stepwise:
    """A loop over the first argument; the step is what users compile, as the whole loop would be unrolled."""

    def __init__(self, step: Function):
        self.step = step

    def __call__(self, queries: Tensor, *others: Tensor) -> Tensor:
        return torch.stack([self.step(query, *others) for query in queries])


def compiled(function: Function) -> Function:
    """Compiled for the shapes it first meets, as a user with fixed shapes would have it."""
    if isinstance(function, Stepwise):
        return type(function)(compiled(function.step))
    return torch.compile(function, fullgraph=True, dynamic=False)


def _eager(case: Case) -> dict[str, Function]:
    if isinstance(case, AttentionCase):
        return dict(zip(EAGER, (attention_matmul, attention_sum), strict=True))
    if isinstance(case, FilmCase):
        return {"eager": film_channels_end if case.layout == "BTC" else film_channels_first}
    return case.eager()


def _fast(case: Case) -> dict[str, Function]:
    if isinstance(case, AttentionCase):
        return {FUSED: fusedattn.additive_attention}
    if isinstance(case, FilmCase):
        return {FUSED: partial(fusedattn.film, channel_dim=case.channel_dim), CLONE: clone}
    return {FUSED: case.fused()}


def _compiles_fused(case: Case) -> bool:
    return not isinstance(case, AttentionCase | FilmCase) and case.compiles_fused


def _to_compile(case: Case, eager: Iterable[str]) -> dict[str, str]:
    """The names of compiled contenders, by those of the eager ones that they are made of."""
    if isinstance(case, AttentionCase | FilmCase) or case.compiles_eager:
        return {name: name.replace("eager", "compile") for name in eager}
    return {}


def names(case: Case) -> tuple[str, ...]:
    """All that :func:`of` makes."""
    eager = _eager(case)
    identity = (IDENTITY,) if isinstance(case, AttentionCase) else ()
    fused = (COMPILED_FUSED,) if _compiles_fused(case) else ()
    return *eager, *_to_compile(case, eager).values(), *identity, *_fast(case), *fused


def of(case: Case, compile: bool = True) -> dict[str, Function]:
    """Every contender of a case by name, eager ones first. With ``compile`` the compiled code of earlier cases is
    dropped: its number is limited."""
    eager, graphs = _eager(case), {}
    if compile:
        torch._dynamo.reset()
        graphs = {name: compiled(eager[of]) for of, name in _to_compile(case, eager).items()}
        if isinstance(case, AttentionCase):
            graphs[IDENTITY] = Identity(compiled)
        if _compiles_fused(case):
            graphs[COMPILED_FUSED] = compiled(case.fused())
    return {**eager, **graphs, **_fast(case)}


def several(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One output, or all of them."""
    return x if isinstance(x, tuple) else (x,)


def step(case: Case, mode: str, name: str, function: Function, inputs: tuple[Tensor, ...], grad):
    """A callable that runs one forward pass, or one forward and backward pass, and returns the results."""
    if mode == "forward" or name == CLONE:

        def forward():
            with torch.no_grad():
                return several(function(*inputs))

        return forward

    leaves = tuple(x.detach().requires_grad_() for x in inputs)

    def training():
        outputs = several(function(*leaves))
        return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, several(grad))

    return training


def reference(case: Case, inputs: tuple[Tensor, ...], grad) -> tuple[Tensor, ...]:
    """Outputs and gradients in float64 by the first eager form, block by block so that all that lies between stays
    in cache; a gradient is summed over the blocks that share its input."""
    function = next(iter(_eager(case).values()))
    outputs = tuple(torch.empty_like(g, dtype=torch.float64) for g in several(grad))
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in inputs]
    for where in case.blocks():
        leaves = [x[at].double().requires_grad_() for x, at in zip(inputs, where, strict=True)]
        parts = several(function(*leaves))
        for output, part in zip(outputs, parts, strict=True):
            output[where[0]] = part.detach()
        found = torch.autograd.grad(parts, leaves, [g[where[0]].double() for g in several(grad)])
        for total, at, g in zip(grads, where, found, strict=True):
            total[at] += g
    return *outputs, *grads
