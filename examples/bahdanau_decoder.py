"""One decoder step after another over an encoder's memory; keys are projected once."""

import torch

import fusedattn

memory, lengths = torch.randn(4, 50, 256), torch.tensor([50, 42, 17, 33])
attention = fusedattn.BahdanauAttention(query_dim=128, memory_dim=256, attention_dim=64)
cell = torch.nn.LSTMCell(256, 128)

keys = attention.project_keys(memory, key_lengths=lengths)
state = torch.zeros(4, 128), torch.zeros(4, 128)
for _ in range(10):
    context, weights = attention(state[0], keys)
    state = cell(context, state)
print("context", tuple(context.shape), "weights", tuple(weights.shape))
