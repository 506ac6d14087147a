"""ermongroup/ncsn, models/cond_refinenet_dilated.py: its conditional norms as formulas."""

from torch import nn


class _Conditional(nn.Module):
    def __init__(self, num_features, num_classes, bias=True):
        super().__init__()
        self.num_features, self.bias = num_features, bias
        self.embed = nn.Embedding(num_classes, num_features * (1 + bias))

    def affine(self, x, y):
        gamma, *beta = self.embed(y)[:, :, None, None].split(self.num_features, 1)
        return gamma * x + beta[0] if beta else gamma * x


class ConditionalInstanceNorm2d(_Conditional):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.instance_norm = nn.InstanceNorm2d(self.num_features)

    def forward(self, x, y):
        return self.affine(self.instance_norm(x), y)


class ConditionalBatchNorm2d(_Conditional):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.bn = nn.BatchNorm2d(self.num_features, affine=False)

    def forward(self, x, y):
        return self.affine(self.bn(x), y)
