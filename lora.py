"""LoRA by hand: a frozen linear layer, a low-rank update beside it, and one gate that switches every update on or off.

    y = W x + gate * (alpha / r) * B (A x)        A (r, in) Kaiming-uniform, B (out, r) zero, W frozen

W is never touched, so with the gate shut the model is the one it was, bit for bit; only A and B learn.
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

import math
import threading
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from common import UserError


class Gate(threading.local):
    """The one switch that all LoRA layers of a model share: shut by default, open only inside `with gate.opened()`.

    Each thread sees its own: a verdict in one must not open the gate under an answer that another is writing.
    """

    is_open = False

    def __reduce__(self):  # a copy of a model gets a gate of its own, shut
        return Gate, ()

    @contextmanager
    def opened(self):
        # Back to the previous state, not to shut: an inner `with` must not close the gate on the outer one.
        previous, self.is_open = self.is_open, True
        try:
            yield
        finally:
            self.is_open = previous


class LoRALinear(nn.Module):
    """A frozen linear-like module plus a gated low-rank update (arXiv 2106.09685, equation 3).

    base: maps (..., in) to (..., out). W x is computed by its own forward, so quantised layers serve as they are.
    sizes: (in, out). lora_dropout: share of x's entries dropped on the way to A, in training only.
    lora_A (r, in) and lora_B (out, r) are made in fp32 whatever the base's dtype: Adam's small steps are lost in bf16.
    """

    def __init__(self, base, sizes, r, lora_alpha, lora_dropout, gate):
        super().__init__()
        self.base, self.gate, self.scaling, self.lora_dropout = base, gate, lora_alpha / r, lora_dropout
        self.lora_A = nn.Parameter(torch.empty(r, sizes[0], dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(sizes[1], r, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        # Not self.base(x): the chat comes here hundreds of times a token, and nn.Module's look-up and call take longer
        # than the rest of this line. They serve hooks, which inject_lora has seen to: new ones go on this layer.
        y = self._modules["base"].forward(x)  # (..., out)
        if not self.gate.is_open:
            return y
        if self.training:  # not called in vain: a verdict passes hundreds of these layers
            x = F.dropout(x, self.lora_dropout)
        ax = F.linear(x, self.lora_A.to(x.dtype))  # (..., r)
        return torch.add(y, F.linear(ax, self.lora_B.to(x.dtype)), alpha=self.scaling)  # (..., out)

    @property
    def weight(self):
        """Raises UserError: a model that computes W x itself, past this layer, would never get the update."""
        raise UserError("this model computes with the weight of a LoRA target past the layer, so it cannot be guarded")

    def delta(self):
        """The update as a matrix: (alpha / r) B A, shape (out, in), fp32."""
        return self.scaling * self.lora_B @ self.lora_A


def linear_sizes(module):
    """(in, out) of a linear-like module, else None. GPT-2's Conv1D, whose weight is (in, out), calls them nx and nf."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return tuple(getattr(module, name) for name in names)
    return None


def inject_lora(model, targets, r, lora_alpha, lora_dropout=0.0, within=""):
    """Freeze `model`, then put a LoRALinear around every target below the submodule named `within`; returns their Gate.

    targets: names of linear layers or ends of their paths ("q_proj", "self_attn.q_proj"), or "all-linear" for all;
    with none, the model is frozen and nothing more. Raises UserError for a target that matches no linear layer or has
    hooks.
    """
    below = f"{within}." if within else ""
    linear = {name: module for name, module in model.named_modules() if name.startswith(below) and linear_sizes(module)}
    chosen = set()
    for target in targets:
        matches = [name for name in linear if target == "all-linear" or f".{name}".endswith(f".{target}")]
        if not matches:
            layers = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"LoRA target {target!r} matches no linear layer; this model has: {layers}")
        chosen.update(matches)
    largest = max((max(linear_sizes(linear[name])) for name in chosen), default=r)
    if r > largest:
        raise UserError(f"a LoRA rank of {r} is no low rank: the largest layer is {largest} wide")
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    for name in chosen:
        if any(getattr(linear[name], kind) for kind in hooks):
            raise UserError(f"{name} has hooks, which would not be called any more: remove them first")
    model.requires_grad_(False)
    gate = Gate()
    for name in [name for name in linear if name in chosen]:  # in the model's order, so that a seed fixes every A
        parent, _, child = name.rpartition(".")
        layer = LoRALinear(linear[name], linear_sizes(linear[name]), r, lora_alpha, lora_dropout, gate)
        setattr(model.get_submodule(parent), child, layer)
    return gate


def trainable(model):
    """{name: parameter} of what learns: freeze first, inject second, and what requires a gradient is trained."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
