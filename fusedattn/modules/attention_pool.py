"""Pooling of bags of instances, around :func:`fusedattn.attention_pool`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from fusedattn._dispatch import beside, check_backend, not_scriptable
from fusedattn.ops.attention_pool import attention_pool

torch.fx.wrap("beside")  # recorded by torch.fx.symbolic_trace, which cannot follow what depends on dtypes


class GatedAttentionPool(nn.Module):
    """Gated attention over the instances of a bag (Ilse et al. 2018, arXiv:1802.04712, equation 9).

    ``z = sum_t a_t x_t`` with ``a = softmax_t(w . (tanh(V x_t) * sigmoid(U x_t)))``; without ``gated`` their
    equation 8, tanh alone. Starts as ``nn.Linear`` layers do; the scores' constant, of no effect, is left out.

    Args:
        in_dim: width of the instances.
        attention_dim: D, width of the score network.
        num_heads: K weights over the same features, as CLAM's branches. Default: None, for one and no dimension.
        gated: whether there is a gate. Default: True.
        bias: biases beside V and U. Default: True.
        backend: see :func:`fusedattn.attention_pool`. Default: ``"auto"``.
        device, dtype: of the parameters. Default: PyTorch's.

    Raises:
        ValueError: a backend that does not exist; when called, what :func:`fusedattn.attention_pool` refuses.
    """

    def __init__(
        self,
        in_dim: int,
        attention_dim: int,
        num_heads: int | None = None,
        *,
        gated: bool = True,
        bias: bool = True,
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_backend("GatedAttentionPool", backend)
        factory = {"device": device, "dtype": dtype}
        self.backend = backend
        self.hidden_proj = nn.Linear(in_dim, attention_dim, bias, **factory)
        self.gate_proj = nn.Linear(in_dim, attention_dim, bias, **factory) if gated else None
        self.weight = nn.Parameter(
            torch.empty(*([] if num_heads is None else [num_heads]), attention_dim, **factory)
        )
        self._reset_weight()

    def _reset_weight(self) -> None:
        bound = self.weight.shape[-1] ** -0.5  # nn.Linear's
        nn.init.uniform_(self.weight, -bound, bound)

    def reset_parameters(self) -> None:
        """As at the start."""
        self.hidden_proj.reset_parameters()
        if self.gate_proj is not None:
            self.gate_proj.reset_parameters()
        self._reset_weight()

    def forward(
        self, x: Tensor, *, lengths: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, in_dim), of which the first lengths (B,) count: z (B, in_dim), or (B, K, in_dim); with
        ``return_weights`` also the weights (B, T), or (B, K, T)."""
        hidden = self.hidden_proj(x)
        gate = None if self.gate_proj is None else self.gate_proj(x)
        return attention_pool(  # type: ignore[return-value]
            hidden,
            x.to(hidden.dtype),
            beside(hidden, self.weight),
            gate,
            lengths=lengths,
            return_weights=return_weights,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def __prepare_scriptable__(self) -> NoReturn:
        not_scriptable(self)
