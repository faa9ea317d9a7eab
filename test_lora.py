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
x = torch.randn(4, 2, IN, generator=torch.Generator().manual_seed(0))


class Quantised(nn.Module):
    """A linear layer in its own format. LoRALinear may rely on the two sizes and on the forward only."""

    in_features, out_features = IN, OUT

    def __init__(self):
        super().__init__()
        self.register_buffer("levels", torch.randint(-8, 8, (OUT, IN), dtype=torch.int8))

    def forward(self, x):
        return F.linear(x, self.levels.to(x.dtype) / 8)


BASES = {"Linear": lambda: nn.Linear(IN, OUT), "Conv1D": lambda: Conv1D(OUT, IN), "quantised": Quantised}


def make_layer(kind="Linear", dropout=0.0, seed=0, gate=None):
    torch.manual_seed(seed)
    layer = LoRALinear(BASES[kind](), (IN, OUT), R, ALPHA, dropout, gate or Gate())
    nn.init.normal_(layer.lora_B)
    return layer


# ---------------------------------------------------------------- The layer


def test_untrained_layer_computes_what_its_base_does():
    """Kills: a B that does not start at zero, an A that does."""
    layer = LoRALinear(nn.Linear(IN, OUT), (IN, OUT), R, ALPHA, 0.0, Gate())
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
    assert torch.equal(layer(x), layer.base(x))


def test_gradients_are_those_of_the_dense_form():
    """Kills: a detached A, B or x, a gradient without the scaling."""
    layer, ours = make_layer(), x.clone().requires_grad_()
    with layer.gate.opened():
        layer(ours).square().sum().backward()
    a, b, theirs = (tensor.detach().clone().requires_grad_() for tensor in (layer.lora_A, layer.lora_B, x))
    dense = layer.base.weight + ALPHA / R * b @ a  # (OUT, IN)
    F.linear(theirs, dense, layer.base.bias).square().sum().backward()
    for one, other in ((layer.lora_A, a), (layer.lora_B, b), (ours, theirs)):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_on_a_bf16_base_adapters_are_fp32_and_the_update_has_the_chosen_dtype(in_fp32, dtype):
    """Kills: adapters in bf16, where Adam's steps vanish; an update or an output in another dtype."""
    base = nn.Linear(IN, OUT, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(base.weight)  # so the output is the update alone
    layer = LoRALinear(base, (IN, OUT), R, R, 0.0, Gate(), in_fp32)  # alpha is r: no scaling
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    nn.init.normal_(layer.lora_B)
    text = x.bfloat16()
    ax = F.linear(text.to(dtype), layer.lora_A.to(dtype))
    update = F.linear(ax, layer.lora_B.to(dtype)).bfloat16()
    with layer.gate.opened():
        assert torch.equal(layer(text), update)


def test_dropout_acts_in_training_only_and_on_the_update_only():
    """Kills: dropout in evaluation, no dropout in training, dropout on what the base reads."""
    layer = make_layer(dropout=0.5)
    with layer.gate.opened():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))
    assert torch.equal(layer.train()(x), layer.base(x))


def test_merged_layers_compute_what_the_open_gate_does():
    """Kills: no scaling, a merge in place, where layers share a W; a Conv1D or quantised layer lost."""
    gate = Gate()
    layers = nn.ModuleList(make_layer(kind, seed=n, gate=gate) for n, kind in enumerate(["Linear", *BASES]))
    layers[1].base.weight = layers[0].base.weight  # each has an update of its own
    with gate.opened():
        wanted = [layer(x) for layer in layers]
        merge_lora(layers)
        torch.testing.assert_close([layer(x) for layer in layers], wanted)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear, LoRALinear, LoRALinear]
    with pytest.raises(ValueError, match="only judges"):
        layers.generate(x)


# ---------------------------------------------------------------- The gate


def test_gate_returns_to_its_previous_state():
    """Kills: a gate that starts open, that stays open after an error, or that an inner `with` shuts."""
    gate = Gate()
    assert not gate.is_open
    with pytest.raises(RuntimeError), gate.opened():
        with gate.opened():
            assert gate.is_open
        assert gate.is_open
        raise RuntimeError
    assert not gate.is_open


def test_each_thread_and_each_copy_has_its_own_gate():
    """Kills: one state for all threads, a thread or a copy that inherits an open gate."""
    gate = Gate()
    with ThreadPoolExecutor(1) as other, gate.opened():
        assert not other.submit(lambda: gate.is_open).result()
        assert not copy.deepcopy(gate).is_open


# ---------------------------------------------------------------- Putting layers into a model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["self_attn.o_proj"], ["all-linear"]])
def test_injection_trains_r_times_in_plus_out_and_freezes_the_rest(targets):
    """Kills: injecting before freezing, LoRA around lm_head, a gate for each layer, a match by prefix."""
    model = make_model()
    sizes = {name: m.weight.shape for name, m in model.model.named_modules() if isinstance(m, nn.Linear)}
    ends = ("_proj",) if targets == ["all-linear"] else tuple(targets)
    wanted = {f"model.{name}": R * sum(shape) for name, shape in sizes.items() if name.endswith(ends)}
    gate = inject_lora(model, targets, R, ALPHA, reached=reached_layers(model, IDS))
    assert all(module.gate is gate for module in model.modules() if isinstance(module, LoRALinear))
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".lora_")[0] for name in learns} == set(wanted)
    assert sum(p.numel() for p in learns.values()) == sum(wanted.values())


@pytest.mark.parametrize("target, why", [("proj", "no layer"), ("lm_head", "no layer"), ("up_proj", "hooks")])
def test_target_that_gets_no_layer_is_refused_and_the_model_left_as_it_was(target, why):
    """Kills: a match by substring, LoRA above the states, hooks that LoRALinear skips, half an injection."""
    model = make_model()
    model.model.layers[1].mlp.up_proj.register_full_backward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"{target}.*{why}"):
        inject_lora(model, ["q_proj", target], R, ALPHA, reached=reached_layers(model, IDS))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_experts_that_a_text_misses_count_as_reached():
    """Kills: experts without LoRA because the router sent the few tokens of the trial elsewhere."""
    model = nn.Module()
    model.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.unused = nn.Linear(4, 4)
    model.base_model = lambda input_ids, use_cache: model.experts[0](torch.ones(4))
    assert reached_layers(model, IDS) == {"experts.0", "experts.1", "experts.2"}
