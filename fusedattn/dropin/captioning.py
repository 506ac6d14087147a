"""The attention of sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning.

Conventions: relu in place of tanh, three layers with biases, no mask; the last one's bias the softmax cancels.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import ATTENTION, score_weight, summed
from fusedattn.ops.additive_attention import additive_attention


def _forward(self, encoder_out, decoder_hidden):
    context, weights = additive_attention(
        self.decoder_att(decoder_hidden).unsqueeze(1),
        self.encoder_att(encoder_out),
        encoder_out,
        score_weight(self.full_att),
        activation="relu",
        return_weights=True,
    )
    return summed(context, encoder_out, weights).squeeze(1), weights.squeeze(1)


def _probe(module, sizes, draw):
    return module(draw(2, 4, sizes["K"]), draw(2, sizes["Q"]))


ADAPTERS = (
    Adapter(
        name="captioning.Attention",
        source="sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, models.py",
        fuses=ATTENTION,
        shapes={
            "encoder_att.weight": ("D", "K"),
            "encoder_att.bias": ("D",),
            "decoder_att.weight": ("D", "Q"),
            "decoder_att.bias": ("D",),
            "full_att.weight": (1, "D"),
            "full_att.bias": (1,),
        },
        fused=_forward,
        probe=_probe,
        inside=("full_att", "relu", "softmax"),
    ),
)
