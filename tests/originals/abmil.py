"""AMLab-Amsterdam/AttentionDeepMIL, model.py: its two networks as formulas."""

from torch import nn


class _Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.M, self.L, self.ATTENTION_BRANCHES = 500, 128, 1
        layers = [layer for c in ((1, 20), (20, 50)) for layer in (nn.Conv2d(*c, 5), nn.ReLU(), nn.MaxPool2d(2))]
        self.feature_extractor_part1 = nn.Sequential(*layers)
        self.feature_extractor_part2 = nn.Sequential(nn.Linear(800, self.M), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(self.M, 1), nn.Sigmoid())

    def forward(self, x):
        H = self.feature_extractor_part2(self.feature_extractor_part1(x.squeeze(0)).view(-1, 800))
        A = self.scores(H).mT.softmax(1)
        probability = self.classifier(A @ H)
        return probability, (probability >= 0.5).float(), A


class Attention(_Bag):
    def __init__(self):
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(self.M, self.L), nn.Tanh(), nn.Linear(self.L, 1))

    def scores(self, H):
        return self.attention(H)


class GatedAttention(_Bag):
    def __init__(self):
        super().__init__()
        self.attention_V = nn.Sequential(nn.Linear(self.M, self.L), nn.Tanh())
        self.attention_U = nn.Sequential(nn.Linear(self.M, self.L), nn.Sigmoid())
        self.attention_w = nn.Linear(self.L, 1)

    def scores(self, H):
        return self.attention_w(self.attention_V(H) * self.attention_U(H))
