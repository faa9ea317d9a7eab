import math

import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    def __init__(self, base, size, r, lora_alpha, gate):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.gate = gate
        self.scaling = lora_alpha / r
        self.lora_A = nn.Parameter(torch.empty(r, size[0]))
        self.lora_B = nn.Parameter(torch.zeros(size[1], r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)  # (..., out)
        if not self.gate.is_open:
            return y
        ax = F.linear(x, self.lora_A)  # (..., r)
        return y + self.scaling * F.linear(ax, self.lora_B)  # (..., out)
