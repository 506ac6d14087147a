"""The location-sensitive attention of NVIDIA's Tacotron 2, which others copied.

Conventions: no biases; the decoder projects the memory once, by ``memory_layer``, and passes it with the weights
of the last step and their sum, (B, 2, T); the mask is True at padding, filled with ``score_mask_value``.
"""

from fusedattn.dropin._adapter import Adapter
from fusedattn.dropin._scores import KEPT, LOCATED, NAN_ROWS, Seeing, kept_keys, locate


def _forward(self, attention_hidden_state, memory, processed_memory, attention_weights_cat, mask):
    keys = kept_keys(
        self,
        (processed_memory, memory, mask),
        lambda: (processed_memory, memory, None if mask is None else ~mask.unsqueeze(1)),
        exponentials=False,
    )
    query, layer = self.query_layer(attention_hidden_state), self.location_layer
    seeing = Seeing(self.v.linear_layer, layer.location_conv.conv, layer.location_dense.linear_layer)
    return locate(query, keys, attention_weights_cat, seeing)


def _probe(module, sizes, draw):
    """A step with padding, and one without."""
    memory, previous = draw(2, 5, sizes["K"]), draw(2, 2, 5)
    padding = draw(2, 5) > 0.5
    padding[:, 0] = False
    processed = module.memory_layer(memory)
    return [module(draw(2, sizes["Q"]), memory, processed, previous, mask) for mask in (padding, None)]


def _reasons(module):
    reasons = []
    if module.score_mask_value != -float("inf"):
        reasons.append(f"score_mask_value is {module.score_mask_value}, not -inf")
    conv = module.location_layer.location_conv.conv
    width = conv.kernel_size[0]
    if width % 2 == 0 or conv.padding != ((width - 1) // 2,) or conv.stride != (1,) or conv.dilation != (1,):
        reasons.append("its convolution does not keep the length by zeros at either end")
    return reasons


ADAPTERS = (
    Adapter(
        name="tacotron2.Attention",
        source="NVIDIA/tacotron2, model.py",
        fuses=LOCATED,
        shapes={
            "query_layer.linear_layer.weight": ("D", "Q"),
            "memory_layer.linear_layer.weight": ("D", "K"),
            "v.linear_layer.weight": (1, "D"),
            "location_layer.location_conv.conv.weight": ("F", 2, "W"),
            "location_layer.location_dense.linear_layer.weight": ("D", "F"),
        },
        fused=_forward,
        probe=_probe,
        inside=("v", "location_layer"),
        reasons=_reasons,
        limits=NAN_ROWS,
        state=(KEPT,),
    ),
)
