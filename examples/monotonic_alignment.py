"""Monotonic alignment (Raffel et al. 2017, arXiv:1704.00784): expected in training, hard in decoding.

A reader moves from left to right and stops at place j with probability p_ij = sigmoid(e_ij); the next one starts
there. What a paper adds to the scores is a few lines over ``fusedattn.additive_scores``.
"""

import torch
import torch.nn.functional as F

import fusedattn


def expected(scores, previous):
    """alpha (B, T), where an output stops, from where the one before did (its alpha), both as probabilities.

    alpha_j = p_j sum_{k <= j} previous_k prod_{k <= l < j} (1 - p_l), by logarithms: no product underflows.
    """
    passed = F.logsigmoid(-scores).cumsum(1)
    until = F.pad(passed, (1, 0))[:, :-1]  # log prod_{l < j} (1 - p_l)
    between = until.unsqueeze(1) - until.unsqueeze(2)  # [k, j]
    ahead = torch.ones_like(between, dtype=torch.bool).triu()
    reached = previous.unsqueeze(1) @ between.masked_fill(~ahead, -torch.inf).exp()
    return torch.sigmoid(scores) * reached.squeeze(1)


def hard(scores, previous):
    """One place (B, T): the first with p >= 1/2 from that of the output before, or none."""
    stops = (scores >= 0) & (previous.cumsum(1) > 0)
    return (stops & (stops.cumsum(1) == 1)).to(scores.dtype)


torch.manual_seed(0)
memory, queries = torch.randn(4, 50, 256), torch.randn(4, 5, 64, requires_grad=True)
project, weight = torch.nn.Linear(256, 64), torch.nn.Parameter(torch.randn(64) / 8)
start = F.pad(torch.ones(4, 1), (0, 49))  # before the first output: at the first place

scores = fusedattn.additive_scores(queries, project(memory), weight)

alpha = start
for e in (scores + torch.randn_like(scores)).unbind(1):  # with noise, training makes p nearly 0 or 1
    alpha = expected(e, alpha)
context = torch.einsum("bt,btc->bc", alpha, memory)
context.sum().backward()
print("expected place", f"{(alpha[0] @ torch.arange(50.0)).item():.1f}", "gradient", tuple(queries.grad.shape))

place, path = start, []
for e in scores.unbind(1):
    place = hard(e, place)
    path.append(place[0].argmax().item())
print("hard path", path)
