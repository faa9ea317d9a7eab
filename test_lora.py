"""The LoRA maths. Each test names the mutations that it kills."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import make_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lora import Gate, LoRALinear, inject_lora, merge_lora, reached_layers

IN, OUT, R, ALPHA = 6, 5, 3, 7.0
IDS = torch.tensor([[5, 6, 7]])


class Quantised(nn.Module):
    """A linear layer in its own format. LoRALinear may rely on the two sizes and on the forward only."""

    in_features, out_features = IN, OUT

    def __init__(self):
        super().__init__()
        self.register_buffer("levels", torch.randint(-8, 8, (OUT, IN), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.levels.to(x.dtype) / 8)


BASES = {"Linear": lambda: nn.Linear(IN, OUT), "Conv1D": lambda: Conv1D(OUT, IN), "quantised": Quantised}
x = torch.randn(4, 2, IN, generator=torch.Generator().manual_seed(0))


def make_layer(kind="Linear", trained=True, dropout=0.0):
    torch.manual_seed(0)
    layer = LoRALinear(BASES[kind](), (IN, OUT), R, ALPHA, dropout, Gate())
    if trained:
        nn.init.normal_(layer.lora_B)
    return layer


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_untrained_layer_computes_what_its_base_does():
    """Kills: a B that does not start at zero, an A that does."""
    layer = make_layer(trained=False)
    with layer.gate.opened():
        assert torch.equal(layer(x), layer.base(x))
    assert layer.lora_A.abs().max() > 0


@pytest.mark.parametrize("kind", BASES)
def test_open_gate_adds_the_scaled_product_and_shut_gate_nothing(kind):
    """Kills: scaling by r / alpha, no scaling, A and B swapped, a gate that forward does not read."""
    layer = make_layer(kind)
    update = ALPHA / R * x @ (layer.lora_B @ layer.lora_A).T  # (..., OUT)
    with layer.gate.opened():
        assert torch.allclose(layer(x), layer.base(x) + update, atol=1e-5)
    assert update.abs().max() > 0.1 and torch.equal(layer(x), layer.base(x))


def test_gradients_are_those_of_the_dense_form():
    """Kills: a detached A, B or x, the two low-rank products in the wrong order."""
    layer = make_layer()
    target, ours = torch.randn(4, 2, OUT), x.clone().requires_grad_()
    with layer.gate.opened():
        F.mse_loss(layer(ours), target).backward()
    a, b, theirs = (tensor.detach().clone().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, x))
    dense = layer.base.weight.detach() + ALPHA / R * b @ a
    F.mse_loss(F.linear(theirs, dense, layer.base.bias.detach()), target).backward()
    for one, other in ((layer.lora_A, a), (layer.lora_B, b), (ours, theirs)):
        assert torch.allclose(one.grad, other.grad, atol=1e-6)
    assert a.grad.abs().max() > 1e-3 and b.grad.abs().max() > 1e-3


def test_adapters_are_fp32_beside_a_bf16_base():
    """Kills: adapters in the base's dtype, where Adam's steps vanish; an output in another dtype."""
    model = nn.Sequential(nn.Linear(IN, OUT)).to(torch.bfloat16)
    gate = inject_lora(model, ["all-linear"], R, ALPHA)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    with gate.opened():
        assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_update_is_computed_in_the_dtype_that_was_chosen(in_fp32, dtype):
    """Kills: an update in bf16 that should be in fp32, and the reverse."""
    layer = make_layer()
    layer.in_fp32 = in_fp32
    layer.base = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.base.weight)  # so the output is the update alone
    text = x.to(torch.bfloat16)
    ax = F.linear(text.to(dtype), layer.lora_A.to(dtype))
    update = F.linear(ax, layer.lora_B.to(dtype)).to(torch.bfloat16)
    with layer.gate.opened():
        assert torch.equal(layer(text), torch.add(torch.zeros_like(update), update, alpha=ALPHA / R))


@pytest.mark.parametrize("kind", BASES)
def test_merged_layer_computes_what_the_open_gate_does(kind):
    """Kills: no scaling, a transposed update, a Conv1D or quantised layer that is merged or lost."""
    model = nn.Sequential(make_layer(kind))
    with model[0].gate.opened():
        wanted = model(x)
        merge_lora(model)
        torch.testing.assert_close(model(x), wanted)
    assert (type(model[0]) is nn.Linear) == (kind == "Linear")
    with pytest.raises(ValueError, match="only judges"):
        model.generate(x)


def test_layers_that_share_a_weight_are_merged_each_for_itself():
    """Kills: a merge in place, which would add every update to both layers."""
    first, second = make_layer(), make_layer()
    second.base.weight = first.base.weight
    nn.init.normal_(second.lora_A)
    model = nn.ModuleList([first, second])
    wanted = []
    for layer in model:
        with layer.gate.opened():
            wanted.append(layer(x))
    merge_lora(model)
    torch.testing.assert_close([layer(x) for layer in model], wanted)


def test_dropout_acts_in_training_only_and_on_the_update_only():
    """Kills: dropout in evaluation, no dropout in training, dropout on what the base reads."""
    layer = make_layer(dropout=0.5)
    with layer.gate.opened():
        layer.eval()
        still = layer(x)
        assert torch.equal(layer(x), still)
        layer.train()
        assert not torch.equal(layer(x), still)
    assert torch.equal(layer(x), layer.base(x))


def test_gate_returns_to_its_previous_state():
    """Kills: a gate that starts open, that stays open after an error, or that an inner `with` shuts."""
    gate = Gate()
    assert not gate.is_open
    with pytest.raises(RuntimeError, match="outside"), gate.opened():
        with pytest.raises(RuntimeError, match="inside"), gate.opened():
            raise RuntimeError("inside")
        assert gate.is_open
        raise RuntimeError("outside")
    assert not gate.is_open


def test_each_thread_has_its_own_gate():
    """Kills: one state for all threads, a thread or a copy that inherits an open gate."""
    gate = Gate()
    with ThreadPoolExecutor(1) as other, gate.opened():
        assert not other.submit(lambda: gate.is_open).result()
        inner = gate.opened()
        other.submit(inner.__enter__).result()
        assert other.submit(lambda: gate.is_open).result()
        other.submit(inner.__exit__, None, None, None).result()
        assert gate.is_open
        assert not copy.deepcopy(gate).is_open


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["self_attn.o_proj"], ["all-linear"]])
def test_injection_trains_r_times_in_plus_out_and_freezes_the_rest(targets):
    """Kills: injecting before freezing, LoRA around lm_head, a gate for each layer, a match by prefix."""
    model = make_model()
    sizes = {name: m.weight.shape for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    ends = ("_proj",) if targets == ["all-linear"] else tuple(targets)
    wanted = {f"model.{name}": R * sum(shape) for name, shape in sizes.items() if name.endswith(ends)}
    gate = inject_lora(model, targets, R, ALPHA, reached=reached_layers(model, IDS))
    assert all(module.gate is gate for module in model.modules() if isinstance(module, LoRALinear))
    learns = trainable(model)
    assert {name.rpartition(".lora_")[0] for name in learns} == set(wanted)
    assert sum(p.numel() for p in learns.values()) == sum(wanted.values())


@pytest.mark.parametrize("targets", [["qproj"], ["proj"], ["self_attn"], ["q_proj", "no"], ["lm_head"]])
def test_target_that_matches_no_linear_layer_is_refused(targets):
    """Kills: a missing layer that is ignored, a match by substring, LoRA around a layer above the states."""
    model = make_model()
    with pytest.raises(ValueError, match=f"{targets[-1]}.*q_proj"):
        inject_lora(model, targets, R, ALPHA, reached=reached_layers(model, IDS))


def test_experts_that_a_text_misses_count_as_reached():
    """Kills: experts without LoRA because the router sent the few tokens of the trial elsewhere."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.unused = nn.Linear(4, 4)

        def base_model(self, input_ids, use_cache):
            self.experts[0](torch.ones(4))

    assert reached_layers(Experts(), IDS) == {f"experts.{n}" for n in range(3)}


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_full_backward_hook"])
def test_target_with_hooks_is_refused(hook):
    """Kills: hooks that LoRALinear skips, which changes the chat path; half an injection."""
    model = make_model()
    handle = getattr(model.model.layers[1].mlp.up_proj, hook)(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has hooks"):
        inject_lora(model, ["up_proj"], R, ALPHA)
    assert all(parameter.requires_grad for parameter in model.parameters())
    handle.remove()  # the refusal left the model as it was, so it can be injected now
    inject_lora(model, ["up_proj"], R, ALPHA)
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 2
