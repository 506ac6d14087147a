"""mahmoodlab/CLAM, models/model_clam.py: its attention networks as formulas."""

from torch import nn


def branch(L, D, activation, dropout):
    return nn.Sequential(nn.Linear(L, D), activation, *([nn.Dropout(0.25)] if dropout else []))


class Attn_Net(nn.Module):
    def __init__(self, L=1024, D=256, dropout=False, n_classes=1):
        super().__init__()
        self.module = branch(L, D, nn.Tanh(), dropout).append(nn.Linear(D, n_classes))

    def forward(self, x):
        return self.module(x), x


class Attn_Net_Gated(nn.Module):
    def __init__(self, L=1024, D=256, dropout=False, n_classes=1):
        super().__init__()
        self.attention_a = branch(L, D, nn.Tanh(), dropout)
        self.attention_b = branch(L, D, nn.Sigmoid(), dropout)
        self.attention_c = nn.Linear(D, n_classes)

    def forward(self, x):
        return self.attention_c(self.attention_a(x) * self.attention_b(x)), x
