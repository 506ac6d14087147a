"""The attention of fairseq's LSTM decoder for speech translation.

Conventions: the source is (S, B, C), its padding (S, B) True at padding and filled with -inf; the weights are
(S, B). The source is projected anew in each step, so that each makes the gradients of its keys.
"""

import torch

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import ATTENTION, NAN_ROWS, score_weight, summed
from fusedattn.ops.additive_attention import additive_attention


def _forward(self, decoder_state, source_hids, encoder_padding_mask):
    padding = encoder_padding_mask
    context, weights = additive_attention(
        self.decoder_proj(decoder_state).unsqueeze(1),
        self.encoder_proj(source_hids).transpose(0, 1),
        source_hids.transpose(0, 1),
        score_weight(self.to_scores),
        mask=None if padding is None else ~padding.bool().t().unsqueeze(1),
        return_weights=True,
    )
    return summed(context, source_hids, weights).squeeze(1), weights.squeeze(1).t()


def _probe(module, sizes, draw):
    inputs = draw(2, sizes["Q"]), draw(4, 2, sizes["K"])
    padding = torch.tensor([[False, False], [False, True], [True, True], [False, True]])
    return module(*inputs, None), module(*inputs, padding)


ADAPTERS = (
    Adapter(
        name="fairseq.MLPAttention",
        source="facebookresearch/fairseq, fairseq/models/speech_to_text/berard.py",
        fuses=ATTENTION,
        shapes={
            "encoder_proj.weight": ("D", "K"),
            "encoder_proj.bias": ("D",),
            "decoder_proj.weight": ("D", "Q"),
            "to_scores.weight": (1, "D"),
        },
        fused=_forward,
        probe=_probe,
        inside=("to_scores",),
        limits=NAN_ROWS,
    ),
)
