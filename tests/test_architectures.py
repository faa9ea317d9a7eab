"""Which families of chat models can be guarded. Each test names the mutations that it kills."""

import inspect
import json
import re
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from conftest import (
    CONTEXT,
    GROUPED,
    KINDS,
    PATHS,
    REFUSED,
    TOKENS,
    asked,
    fill_b,
    forward,
    guard_for,
    ids_of,
    make_guard,
    make_model,
    make_tokenizer,
    plain,
    random_model,
    score,
    until,
)
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, TorchAoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as FAMILIES
from transformers.pytorch_utils import Conv1D

from checkpoint import adapter_header, fingerprint, load_chat_model, load_guard, save_adapter, use_fast_dtype
from checks import context_length
from errors import UserError, one_line
from lora import LoRALinear, merge_lora

TURNS = [("how is the bread?" * 2, "harmful"), ("hi", "safe"), ("the answer is harmful", "or not")]


def conversations(tokenizer):
    return [ids_of(tokenizer, *turn) for turn in TURNS]


def lora_layers(model):
    return sum(isinstance(module, LoRALinear) for module in model.modules())


def learn(guard, steps=12):
    """Teach that the first conversation is harmful, and the others are not."""
    optimizer = torch.optim.AdamW(guard.adapter().values(), lr=3e-3)
    target = torch.zeros(3, 3)
    target[0] = 1
    losses = []
    for _ in range(steps):
        logits = forward(guard.train(), conversations(guard.tokenizer))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def save(guard, kind, folder):
    """Write the chat model and the guard as train.py does. Returns config.json and adapter.safetensors."""
    config, adapter = folder / "config.json", folder / "adapter.safetensors"
    make_model(kind).save_pretrained(folder / "chat-model")
    guard.tokenizer.save_pretrained(folder / "chat-model")
    base = {"base_model": str(folder / "chat-model"), "dtype": "float32"}
    base["base_fingerprint"] = fingerprint(guard.chat_model, guard.tokenizer)
    config.write_text(json.dumps(base | {"guard": asdict(guard.config)}))
    save_adapter(adapter, guard.adapter(), adapter_header(base["base_fingerprint"], guard.config))
    return config, adapter


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_architecture_is_guarded_from_training_to_answers(kind, path, tmp_path):
    """Kills: a target that is left out, states from below the final projection, a file that changes LoRA."""
    guard = make_guard(kind, trained=False, guard_path=path)
    linear = [m for m in make_model(kind).base_model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert lora_layers(guard) == len(linear) > 5
    assert guard.max_tokens + guard.guard_prompt_ids.numel() == CONTEXT
    learn(guard)
    rows = conversations(guard.tokenizer)
    loaded = load_guard(*save(guard, kind, tmp_path), device_id=-1)
    assert torch.equal(score(loaded, rows), score(guard, rows))
    [*_, (answer, verdict)] = loaded.stream(asked(rows[0]), max_new_tokens=20, verdict_every=8)
    assert answer == until(plain(kind, rows[0]), 2)
    alone = score(loaded, [rows[0] + answer])[0].sigmoid().tolist()
    assert [verdict.unsafe, *verdict.categories.values()] == pytest.approx(alone, abs=1e-4)


def test_one_pass_asks_at_all_cuts_unless_slots_stand_for_positions():
    """Kills: a family that is judged in turn for nothing, MPT's slots taken for positions, a lost window."""
    guards = {kind: make_guard(kind) for kind in KINDS}
    assert [kind for kind, guard in guards.items() if guard.window == 0] == ["mpt"]
    slid = {kind for kind, guard in guards.items() if guard.window == 8}
    assert slid == {"mistral", "gemma2", "gemma3", "starcoder2", "gpt_neo"}


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma3", "starcoder2", "gpt_neo"])
def test_a_text_within_the_window_is_asked_at_once(kind):
    """Kills: a mask that one kind of layer ignores, a window that is measured without the guard prompts."""
    config, shape = KINDS[kind]
    name = "window_size" if kind == "gpt_neo" else "sliding_window"
    guard = guard_for(
        random_model(config(**TOKENS | shape | {name: 128, "max_position_embeddings": CONTEXT}))
    )
    fill_b(guard)
    size, asked = guard.guard_prompt_ids.shape[1], []
    ask = guard.ask
    guard.ask = lambda cache, cuts: asked.append(cuts.shape[1]) or ask(cache, cuts)
    for length, passes in ((128 - 5 * size, [5]), (129 - 5 * size, [1] * 5)):
        ids, cuts = text(length), [30, 40, 50, 61, length]
        in_turn = guard.guard_logits(guard.states_in_turn(ids, torch.tensor(cuts)))
        asked.clear()
        assert torch.allclose(guard([ids], [cuts])[0], in_turn, atol=1e-4)
        assert asked == passes


@pytest.mark.parametrize("kind", ["mpt", "mistral"])
def test_asked_in_turn_no_neighbour_matters(kind):
    """Kills: a text that is read in other pieces because a neighbour in the batch has more cuts."""
    guard, asked = make_guard(kind), []
    ask = guard.ask
    guard.ask = lambda cache, cuts: asked.extend(cuts.flatten().tolist()) or ask(cache, cuts)
    guard([text(31), text(120)], [[31], [3, 60, 90, 120]])
    assert asked == [31, 3, 60, 90, 120]


@pytest.mark.parametrize("path", PATHS)
def test_8_bit_base_is_guarded_by_adapters_in_fp32(path, tmp_path):
    """Kills: adapters in the base's type, a base of plain tensors only, a cast of quantised matrices."""
    make_model().save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "8-bit")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "8-bit")
    chat_model, tokenizer = load_chat_model(str(tmp_path / "8-bit"))
    assert chat_model.model.layers[0].mlp.up_proj.weight.dequantize().unique().numel() < 48 * 32
    assert fingerprint(chat_model, tokenizer) == fingerprint(make_model(), make_tokenizer())
    guard = guard_for(chat_model, guard_path=path)
    assert {parameter.dtype for parameter in guard.adapter().values()} == {torch.float32}
    learn(guard)
    with pytest.raises(UserError, match="quantised"):
        use_fast_dtype(guard, "bfloat16")
    [*_, (answer, _)] = guard.stream(asked(conversations(tokenizer)[0]), max_new_tokens=8)
    assert len(answer) == 8
    before = score(guard, conversations(tokenizer))
    merge_lora(guard.chat_model)  # nothing can be added to weights in 8 bits
    assert torch.equal(score(guard, conversations(tokenizer)), before) and lora_layers(guard)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_verdict_is_a_texts_own_where_rotary_frequencies_change(rope, path):
    """Kills: rows of a batch that are rotated as the longest of them is."""
    rope = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 4.0}
    rope |= {"original_max_position_embeddings": CONTEXT // 2}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4} if rope["rope_type"] == "longrope" else {}
    config = LlamaConfig(**TOKENS, max_position_embeddings=CONTEXT, rope_parameters=rope, **GROUPED)
    assert context_length(config) == (CONTEXT // 2 if "long_factor" in rope else CONTEXT)
    guard = guard_for(random_model(config), guard_path=path)
    fill_b(guard)
    rows = [[5 + n % 300 for n in range(length)] for length in (40, 120, 200, 230)]
    alone = torch.cat([score(guard, [row]) for row in rows])
    assert torch.allclose(score(guard, rows), alone, atol=1e-4)


def test_rotary_frequencies_stay_fp32():
    """Kills: a model that is cast with its buffers, so late positions of long texts are turned wrongly."""
    guard, last = make_guard(), torch.tensor([[4_000]])
    rotate = guard.chat_model.model.rotary_emb
    wanted = rotate(torch.ones(1), last)
    use_fast_dtype(guard, "bfloat16")
    assert all(map(torch.equal, rotate(torch.ones(1), last), wanted))
    assert guard.chat_model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in guard.adapter().values()} == {torch.float32}


# ---------------------------------------------------------------- what the trial refuses


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_be_guarded_is_refused_and_left_as_it_was(name, path):
    """Kills: attention to what follows, a cache or a state that is ignored, LoRA that stays inside."""
    config, reasons = REFUSED[name]
    chat_model, ids = random_model(config), torch.tensor([[5, 6, 7]])
    before = chat_model(ids).logits
    if not reasons[path]:
        assert lora_layers(guard_for(chat_model, guard_path=path).chat_model)
        return
    with pytest.raises(ValueError, match=reasons[path]):
        guard_for(chat_model, guard_path=path)
    assert not lora_layers(chat_model) and torch.equal(chat_model(ids).logits, before)
    if path == "activated" and not reasons["full"]:
        guard_for(chat_model, guard_path="full")


# ---------------------------------------------------------------- all families of transformers

SIZES = {  # the first pattern that the name of a setting matches -> its small size; None: its default
    "pad_token_id|eos_token_id": 2,
    "_id$|_index$|^chunk_size_feed|audio_channels|kernel|mem_blocks|^qk_head": None,
    "^n_group$|topk_group|dense_replace|dense_layers": 1,
    "kv_shared": 0,
    "vocab": 320,
    "position|max_seq|context_len|n_ctx": 256,
    "window|chunk_size$|index_topk$|block_size|local_attention$": 8,
    "intermediate|ffn|inner|dff|dim_ff|feed_forward": 48,
    "kv_heads|key_value_heads|key_heads|per_tok|topk$|top_k|moe_k|n_groups": 2,
    "heads$|n_head$|experts$|patch_size|layers$|n_layer$|num_blocks": 4,
    "lora_rank|nope_head|v_head_dim|state": 16,
    "head_dim$|d_head|d_kv|dim_head|head_size|kv_channels|rotary_dim|image_size": 8,
    "rank|buckets": 16,
    "hidden_size|d_model|embd|emb_dim|embed.*dim|embedding_size|width|_rel|dim_model": 32,
}
DERIVED = ("token_id", "key_value_heads", "head_dim", "intermediate_size", "experts", "per_tok")
HALF = {"layer_types": ["mamba", "hybrid"] * 2}
OWN = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "BambaConfig": {"attn_layer_indices": [1, 3], "mamba_d_head": 16},
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteTextConfig": {"layer_types": ["full_attention"] * 4},
    "FalconH1Config": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_head": 16},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"head_dim": 16},
    "NemotronHConfig": {"mamba_num_heads": 4},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_head_dim": 8, "indexer_kv_heads": 1}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"attention_hidden_size": 64, "attention_head_dim": 16} | HALF,
    "Zamba2Config": {"n_mamba_heads": 4, "layers_block_type": HALF["layer_types"]} | HALF,
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"hidden_size": 64, "qk_dim_factor": 1.0, "chunk_size": 64},
}


def tiny(kind):
    """A small config of this class."""
    options = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        size = next((size for pattern, size in SIZES.items() if re.search(pattern, name)), None)
        if size is not None and (type(parameter.default) is int or name.endswith(DERIVED)):
            options[name] = size
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = 4
    parts = {name: getattr(kind(), name) for name in kind.sub_configs}
    options |= {name: tiny(type(part)).to_dict() for name, part in parts.items() if part is not None}
    return kind(**options | OWN.get(kind.__name__, {}))


def sharp_model(kind):
    """A random model whose attention is far from even, so that what it should not see shows."""
    config = tiny(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 12e6, "it is not small"
    torch.manual_seed(0)
    chat_model = AutoModelForCausalLM.from_config(config).eval()
    chat_model.generation_config.eos_token_id = 2
    with torch.no_grad():
        for parameter in chat_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return chat_model


def text(length):
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def answer_of(chat_model):
    ids = torch.tensor([text(31)])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 2}
    return until(chat_model.generate(ids, do_sample=False, **options)[0, 31:].tolist(), 2)


@torch.no_grad()
def outcome(kind, path):
    """(What became of a guard, the refusal's words). Raises AssertionError for a wrong guard."""
    chat_model = sharp_model(kind)
    answer, ids = answer_of(chat_model), text(150)
    try:
        guard = guard_for(chat_model, guard_path=path)
    except ValueError as error:
        assert "\n" not in str(error) and not lora_layers(chat_model) and answer_of(chat_model) == answer
        return "refused", str(error)
    fill_b(guard, std=0.1)
    rows = [ids, ids[:75], text(7)]
    alone = torch.cat([forward(guard, [row]) for row in rows])
    together = [forward(guard, rows)]  # beside others
    several = guard(rows, [[20, 75, 150], [75], [7]])  # at several cuts
    together.append(torch.stack([several[0, 2], several[0, 1], several[2, 0]]))
    if path == "full":
        with guard.gate.opened():  # cut off
            hidden = guard.chat_model.base_model(guard.tensor(ids), use_cache=False).last_hidden_state
        together.append(guard.guard_logits(hidden[0, [149, 74]]))
    else:
        cache, continued = DynamicCache(config=chat_model.config.get_text_config(decoder=True)), []
        for part in (ids[:75], ids[75:]):  # continued
            guard.chat_model.base_model(guard.tensor(part), past_key_values=cache, use_cache=True)
            end = torch.tensor([[cache.get_seq_length()]])
            continued.insert(0, guard.guard_logits(guard.ask(cache, end))[:, 0])
        together.append(torch.cat(continued))
    for found in together:
        apart = (found - alone[: len(found)]).abs().max().item()
        assert apart < 1e-4, f"its verdicts are {apart:.2g} apart"
    assert [*guard.stream(asked(text(31)), max_new_tokens=12)][-1][0] == answer, "it answers in another way"
    return "worked", ""


@pytest.mark.slow
def test_every_family_is_guarded_rightly_or_refused_in_one_line():
    """Kills: a family that the trial accepts and the guard misjudges, a traceback instead of a line."""
    numbers, faults = Counter(), []
    for kind in dict.fromkeys(FAMILIES):
        name = kind.__name__.removesuffix("Config")
        try:
            answer_of(sharp_model(kind))
        except Exception as error:
            numbers["not built"] += 1
            print(f"{name}: not built, {one_line(error)[:150]}")
            continue
        for path in PATHS:
            try:
                what, why = outcome(kind, path)
                print(f"{name}, {path}: {what} {why}")
            except Exception as error:
                what = "wrong"
                faults.append(f"{name}, {path}: {type(error).__name__} {one_line(error)}")
            numbers[path, what] += 1
    print(numbers)
    assert not faults, faults
    assert numbers["activated", "worked"] > 90 and numbers["full", "worked"] > 120


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", PATHS)
def test_attention_to_what_follows_is_seen_in_any_dtype(path, dtype):
    """Kills: a comparison of states, which rounding in 16 bits hides; a gradient that is always zero."""
    config, _ = REFUSED["attention to what follows"]
    with pytest.raises(ValueError, match="what follows a text"):
        guard_for(random_model(config).to(dtype), guard_path=path)
    assert guard_for(make_model().to(dtype), guard_path=path)
