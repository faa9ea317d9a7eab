"""Exercise 1: a LoRA layer from its formula.

    y = W x + gate * (alpha / r) * B (A x)

    W   (out, in)   the weight of the base; frozen
    A   (r, in)     trained; starts Kaiming-uniform (nn.init), so never at zero
    B   (out, r)    trained; starts at zero, so a new layer computes exactly what its base does

`gate.is_open` says whether the update counts. With the gate shut, return what the base computes, bit for
bit. Exercise 2 builds the gate.

Check yourself: pytest exercises -k 1_lora. The project's own layer is LoRALinear in lora.py.
"""

from torch import nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus its low-rank update: x (..., in) -> (..., out). size: (in, out)."""

    def __init__(self, base, size, r, lora_alpha, gate):
        super().__init__()
        raise NotImplementedError  # freeze the base; make the parameters lora_A and lora_B

    def forward(self, x):
        raise NotImplementedError
