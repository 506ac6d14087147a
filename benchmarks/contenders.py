"""Who competes: plain PyTorch, torch.compile of the same lines, the strongest rival (identity.py), fusedattn, and
x.clone() beside FiLM."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fusedattn

from .cases import AttentionCase, Case, FilmCase
from .identity import Identity

Function = Callable[..., Tensor]

EAGER = ("eager @", "eager sum")  # the two ways to write attention's score; a ratio quotes the faster
COMPILED = ("compile @", "compile sum")
IDENTITY = "identity"
FUSED = "fused"
CLONE = "clone"
RIVALS = ("eager", "compile", IDENTITY)  # kinds: a contender's name begins with its own


def attention_matmul(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return (torch.tanh(query[:, :, None] + key[:, None]) @ weight).softmax(-1) @ value


def attention_sum(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    return (torch.tanh(query[:, :, None] + key[:, None]) * weight).sum(-1).softmax(-1) @ value


def film_channels_first(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (x * gamma[:, :, None, None]).add_(beta[:, :, None, None])


def film_channels_end(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return (x * gamma[:, None]).add_(beta[:, None])


def clone(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return x.clone()


def compiled(function: Function) -> Function:
    """Compiled for the shapes it first meets, as a user with fixed shapes would have it."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def names(case: Case) -> tuple[str, ...]:
    """All that :func:`of` makes."""
    if isinstance(case, AttentionCase):
        return *EAGER, *COMPILED, IDENTITY, FUSED
    return "eager", "compile", FUSED, CLONE


def of(case: Case, compile: bool = True) -> dict[str, Function]:
    """Every contender of a case by name. Compiled code of earlier cases is dropped: its number is limited."""
    torch._dynamo.reset()
    if isinstance(case, AttentionCase):
        eager = dict(zip(EAGER, (attention_matmul, attention_sum), strict=True))
        fast = {FUSED: fusedattn.additive_attention}
    else:
        eager = {"eager": film_channels_end if case.layout == "BTC" else film_channels_first}
        fast = {FUSED: partial(fusedattn.film, channel_dim=case.channel_dim), CLONE: clone}
    graphs = {}
    if compile:
        graphs = {name.replace("eager", "compile"): compiled(f) for name, f in eager.items()}
        if isinstance(case, AttentionCase):
            graphs[IDENTITY] = Identity(compiled)
    return {**eager, **graphs, **fast}


def step(case: Case, mode: str, name: str, function: Function, inputs: tuple[Tensor, ...], grad: Tensor):
    """A callable that runs one forward pass, or one forward and backward pass, and returns the results."""
    if mode == "forward" or name == CLONE:

        def forward():
            with torch.no_grad():
                return (function(*inputs),)

        return forward

    leaves = tuple(x.detach().requires_grad_() for x in inputs)

    def training():
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    return training


def reference(case: Case, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients in float64, few rows at a time so that all that lies between stays in cache."""
    function = _plain(case)
    output = torch.empty_like(grad, dtype=torch.float64)
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in inputs]
    for b in range(case.B):
        element = slice(b, b + 1)
        for rows in case.blocks_of_rows():
            # the first input has the output's rows; a weight without a batch sums its gradients
            where = [(element, rows)] + [element if x.dim() > 1 else ... for x in inputs[1:]]
            leaves = [x[at].double().requires_grad_() for x, at in zip(inputs, where, strict=True)]
            part = function(*leaves)
            output[element, rows] = part.detach()
            found = torch.autograd.grad(part, leaves, grad[element, rows].double())
            for total, at, g in zip(grads, where, found, strict=True):
                total[at] += g
    return output, *grads


def _plain(case: Case) -> Function:
    if isinstance(case, FilmCase):
        return film_channels_end if case.layout == "BTC" else film_channels_first
    return attention_matmul
