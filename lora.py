"""LoRA by hand: a frozen linear layer plus a low-rank update that one gate switches on and off.

    y = W x + gate * (alpha / r) * B (A x)

    W  (out, in)   frozen
    A  (r, in)     trained; starts Kaiming-uniform
    B  (out, r)    trained; starts at zero, so a new layer computes exactly what its base does

With the gate shut only W x is computed, so the model behaves bit for bit as before.
Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

import itertools
import math
import re
import threading
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Gate(threading.local):
    """The switch that all LoRA layers of a model share: shut by default, and separate in each thread."""

    is_open = False

    @contextmanager
    def opened(self):
        previous = self.is_open
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = previous  # not False, because `with` blocks may be nested

    def __reduce__(self):
        return Gate, ()  # a copied or pickled model gets a gate of its own


class LoRALinear(nn.Module):
    """A frozen linear layer plus its low-rank update (arXiv 2106.09685, equation 3).

    base: any module that maps (..., in) to (..., out), so quantised layers work unchanged.
    size: (in, out). lora_dropout: share of the entries of x that A does not see in training.
    in_fp32: compute the update in fp32, not in x's dtype. For a few tokens this is faster on a CPU.
    """

    def __init__(self, base, size, r, lora_alpha, lora_dropout, gate, in_fp32=False):
        super().__init__()
        self.base = base
        self.gate = gate
        self.scaling = lora_alpha / r
        self.lora_dropout = lora_dropout
        self.in_fp32 = in_fp32
        # fp32 even on a bf16 base: bf16 would round away most of Adam's steps.
        tensor = next(itertools.chain(base.parameters(), base.buffers()))  # any of them knows the device
        place = {"dtype": torch.float32, "device": tensor.device}
        self.lora_A = nn.Parameter(torch.empty(r, size[0], **place))
        self.lora_B = nn.Parameter(torch.zeros(size[1], r, **place))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        # Not self.base(x): a chat runs hundreds of these layers a token, and nn.Module's call takes time.
        y = self._modules["base"].forward(x)  # (..., out)
        if not self.gate.is_open:
            return y
        dtype = self.lora_A.dtype if self.in_fp32 else x.dtype
        x = F.dropout(x.to(dtype), self.lora_dropout, self.training)
        ax = F.linear(x, self.lora_A.to(dtype))  # (..., r)
        update = F.linear(ax, self.lora_B.to(dtype))  # (..., out)
        return torch.add(y, update.to(y.dtype), alpha=self.scaling)


def linear_size(module):
    """(in, out) of a linear layer, or None. GPT-2's Conv1D calls its sizes nx and nf."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        size = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(n, int) for n in size):
            return size
    return None


def inject_lora(model, targets, r, lora_alpha, lora_dropout=0.0, reached=None, in_fp32=False):
    """Freeze `model`, put a LoRALinear around each of its target layers, and return their Gate.

    targets: layer names such as "q_proj" or "self_attn.q_proj", or "all-linear". [] injects nothing.
    reached: names of the layers that may be targets; by default all. Others would learn nothing.
    Raises ValueError for a target that matches no layer, and for a layer with hooks, which LoRALinear skips.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model already carries a guard; load it once more for a second one")
    linear = {}
    for name, module in model.named_modules():
        if linear_size(module) and (reached is None or name in reached):
            linear[name] = module
    chosen = set()
    for target in targets:
        if target == "all-linear":
            matches = set(linear)
        else:
            matches = {name for name in linear if f".{name}".endswith(f".{target}")}
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ValueError(f"LoRA target {target!r} matches no layer that a text reaches, but: {known}")
        chosen |= matches
    for name in chosen:
        if any(getattr(linear[name], kind) for kind in HOOKS):
            raise ValueError(f"{name} has hooks, which LoRALinear does not call; remove them first")
    model.requires_grad_(False)  # freeze first, inject second: what requires a gradient is trained
    gate = Gate()
    for name, base in linear.items():  # in the model's order, so a seed fixes every A
        if name in chosen:
            layer = LoRALinear(base, linear_size(base), r, lora_alpha, lora_dropout, gate, in_fp32)
            model.set_submodule(name, layer)
    return gate


@torch.no_grad()
def merge_lora(model):
    """Replace W by W + (alpha / r) B A, so the guard judges whole texts faster. The model can no longer chat.

    Layers that are no nn.Linear, or whose W is quantised, keep their LoRALinear.
    """
    for name, layer in list(model.named_modules()):
        is_plain = isinstance(layer, LoRALinear) and type(layer.base) is nn.Linear
        if is_plain and type(layer.base.weight) is nn.Parameter:
            weight = layer.base.weight
            merged = weight + layer.scaling * (layer.lora_B @ layer.lora_A)  # (out, in), in fp32
            # A new one, because layers may share a W and have updates of their own.
            layer.base.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
            model.set_submodule(name, layer.base)
    model.generate = refuse_to_chat


def refuse_to_chat(*_, **__):
    raise ValueError("this model has the guard in its weights and only judges; load it again to chat")


@torch.no_grad()
def reached_layers(model, ids):
    """Names of the linear layers that a text, ids (1, T), passes on its way to the last hidden state."""
    linear = {name: module for name, module in model.named_modules() if linear_size(module)}
    called, hooks = set(), []
    for name, module in linear.items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: called.add(name)))
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    # A router skips some experts for this text. Other texts reach them, so all experts count.
    kinds = {re.sub(r"experts\.\d+", "experts", name) for name in called}
    return {name for name in linear if re.sub(r"experts\.\d+", "experts", name) in kinds}
