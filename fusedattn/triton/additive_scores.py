"""The scores of additive attention alone, in Triton: the kernels are attention's (``additive_attention.py``).

Backward is given what attention's first kernel computes, g_ij, but for cap and scale, which are (Tq, Tk) large:
they and the padded transposes that the kernels read are PyTorch's own.
"""

import torch
import triton
from torch.nn.functional import pad

from fusedattn._dtypes import accumulation_dtype
from fusedattn._options import AdditiveAttentionOptions, schema
from fusedattn._options import AdditiveScoresOptions as Options
from fusedattn.triton._common import Kernel, asked_for, on_device_of, register
from fusedattn.triton.additive_attention_bwd import PAD, key_gradient, key_rows, query_gradient, query_rows
from fusedattn.triton.additive_attention_fwd import write_scores
from fusedattn.triton.additive_attention_problem import Problem, check


def _problem(query, key, weight, options: Options) -> Problem:
    # The keys stand for values, at which nobody looks.
    return Problem(query, key, key, weight, None, None, None, None, AdditiveAttentionOptions(-1, -1, *options))


def _scores(problem: Problem):
    scores = problem.empty(problem.B, problem.H, problem.Tq, problem.Tk)
    if scores.numel():
        write_scores(problem, scores, 0, problem.Tq)
    return scores


def additive_scores_fwd(query, key, weight, *options):
    """``fusedattn::additive_scores_fwd_triton``."""
    check(query, key, key, weight, None, None, None)
    with on_device_of(query):
        scores = _scores(_problem(query, key, weight, Options(*options)))
    return scores.to(query.dtype).view(*query.shape[:-1], key.shape[-2])


def additive_scores_bwd(grad_scores, query, key, weight, *rest):
    """``fusedattn::additive_scores_bwd_triton``."""
    *numbers, output_mask = rest
    options = Options(*numbers)
    of_query, of_key, of_weight = asked_for(output_mask, 3)
    Tq, Tk = query.shape[-2], key.shape[-2]
    check(query, key, key, weight, None, None, None, grad_scores=(grad_scores, (Tq, Tk), query.dtype))
    inputs = {"query": (query, of_query), "key": (key, of_key), "weight": (weight, of_weight)}
    if not (grad_scores.numel() and query.shape[-1]):
        return tuple(t.new_zeros(t.shape if asked else 0) for t, asked in inputs.values())
    with on_device_of(query):
        problem = _problem(query, key, weight, options)
        g = grad_scores.reshape(problem.B, problem.H, Tq, Tk).to(accumulation_dtype(query.dtype)) * options.scale
        if options.softcap:
            g = g * (1.0 - (_scores(problem) / options.softcap).square_())
        queries, keys = query_rows(problem, 0, Tq), key_rows(problem)
        found = {}
        if of_query or of_weight:
            rows = _padded(g.transpose(2, 3))
            found["query"], found["weight"] = query_gradient(problem, rows, queries, keys, 0)
        if of_key:
            found["key"] = key_gradient(problem, _padded(g), queries, keys, 0)
    return tuple(
        found[name].to(t.dtype).view(t.shape) if asked else t.new_empty(0) for name, (t, asked) in inputs.items()
    )


def _padded(g: torch.Tensor) -> torch.Tensor:
    """Rows padded with 0 to a multiple of PAD."""
    return pad(g, (0, triton.cdiv(g.shape[-1], PAD) * PAD - g.shape[-1])).contiguous()


_INPUTS = "Tensor query, Tensor key, Tensor weight"
register(f"additive_scores_fwd_triton({_INPUTS}, {schema(Options)}) -> Tensor", additive_scores_fwd)
register(
    f"additive_scores_bwd_triton(Tensor grad_scores, {_INPUTS}, {schema(Options)}, int output_mask) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_weight)",
    additive_scores_bwd,
)


def kernels(target=("cuda", 90)) -> list[Kernel]:
    """None but attention's, in specialisations that its typical calls have."""
    return []
