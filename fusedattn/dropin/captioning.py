"""The attention of sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning.

Conventions: relu in place of tanh, three layers with biases, no mask; the last one's bias the softmax cancels. The
decoder comes with the image's features in every step, with those of fewer images as captions end.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import KEPT, STEPS, projected_keys, step, summed


def _forward(self, encoder_out, decoder_hidden):
    keys = projected_keys(self, encoder_out, self.encoder_att)
    query = self.decoder_att(decoder_hidden).unsqueeze(1)
    context, weights = step(query, keys, [self.full_att], activation="relu")
    return summed(context, encoder_out, weights).squeeze(1), weights.squeeze(1)


def _probe(module, sizes, draw):
    """Two steps, the second of fewer images."""
    features, hidden = draw(2, 4, sizes["K"]), draw(2, sizes["Q"])
    return module(features[:2], hidden), module(features[:1], hidden[:1])


ADAPTERS = (
    Adapter(
        name="captioning.Attention",
        source="sgrvinod/a-PyTorch-Tutorial-to-Image-Captioning, models.py",
        fuses=f"{STEPS}, whose features are projected once",
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
        limits="steps over the same features do not see edits of encoder_att through .data in between",
        state=(KEPT,),
    ),
)
