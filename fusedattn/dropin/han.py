"""The hierarchical attention network of sgrvinod/a-PyTorch-Tutorial-to-Text-Classification: known, and left alone.

Its attention is a few percent of its recurrent networks, over packed sequences that a fused one would have to pad.
Measured with scores, softmax and context fused, of 64 documents of 15 sentences of 20 words: forward 1.08 times as
fast, a training step 0.9 times.
"""

from fusedattn.dropin._adapter import Adapter, original

_REASON = "its recurrent networks take nearly all of its time: fused, a training step takes no less"


def _words(self, sentences, words_per_sentence):
    return original(self)(sentences, words_per_sentence)


def _sentences(self, documents, sentences_per_document, words_per_sentence):
    return original(self)(documents, sentences_per_document, words_per_sentence)


def _adapter(class_name, level, fused, shapes):
    return Adapter(
        name=f"han.{class_name}",
        source="sgrvinod/a-PyTorch-Tutorial-to-Text-Classification, model.py",
        fuses="nothing",
        shapes={
            f"{level}_rnn.*": None,
            f"{level}_attention.weight": ("D", "2H"),
            f"{level}_attention.bias": ("D",),
            f"{level}_context_vector.weight": (1, "D"),
            **shapes,
        },
        fused=fused,
        probe=lambda module, sizes, draw: None,
        reasons=lambda module: [_REASON],
    )


ADAPTERS = (
    _adapter("WordAttention", "word", _words, {"embeddings.weight": ("V", "E")}),
    _adapter("SentenceAttention", "sentence", _sentences, {"word_attention.*": None}),
)
