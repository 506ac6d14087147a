"""sgrvinod/a-PyTorch-Tutorial-to-Text-Classification, model.py: what its attention to words is known by."""

from torch import nn


class WordAttention(nn.Module):
    def __init__(self, vocab_size, emb_size, word_rnn_size, word_rnn_layers, word_att_size, dropout):
        super().__init__()
        self.embeddings, self.dropout = nn.Embedding(vocab_size, emb_size), nn.Dropout(dropout)
        self.word_rnn = nn.GRU(emb_size, word_rnn_size, word_rnn_layers, bidirectional=True, batch_first=True)
        self.word_attention = nn.Linear(2 * word_rnn_size, word_att_size)
        self.word_context_vector = nn.Linear(word_att_size, 1, bias=False)

    def forward(self, sentences, words_per_sentence):
        raise NotImplementedError
