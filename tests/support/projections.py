"""What people put in the place of a model's Linear layers."""

import torch
from torch import nn


class Adapted(nn.Module):
    """A Linear layer with a low-rank part beside it, as LoRA has it; it says what peft's says of itself."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.a, self.b = nn.Linear(base.in_features, rank, False), nn.Linear(rank, base.out_features, False)
        self.weight = base.weight

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(x))


@torch.no_grad()
def merged(base):
    """The layer itself, with the low-rank part in its weight."""
    adapter = Adapted(base)
    base.weight += adapter.b.weight @ adapter.a.weight
    return base


class Quantised(nn.Linear):
    """In 8 bits with a scale for each output: no floating-point weight to read."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class Clipped(nn.Linear):
    """With outputs that are cut off: its weight does not say what it makes."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight

    def forward(self, x):
        return super().forward(x).clamp(-0.3, 0.3)


def replaced(model, kind, names=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")):
    """The model, its Linear layers of these names made anew."""
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, kind(getattr(module, name)))
    return model
