"""Which families of chat models can be guarded. Each test names the mutations that it kills."""

import inspect
import re
from unittest.mock import patch

import conftest
import pytest
import torch
from conftest import PATHS, asked, fill_b, forward, guard_for, make_guard, make_model, plain, score, until
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from checkpoint import fingerprint, load_chat_model
from errors import one_line
from lora import LoRALinear, merge_lora


def text(length):
    """Token ids."""
    return torch.randint(3, 320, (length,), generator=torch.Generator().manual_seed(length)).tolist()


ROWS = [text(31), text(12), text(7)]


def lora_layers(model):
    return sum(isinstance(module, LoRALinear) for module in model.modules())


def learn(guard):
    """Teach that the first text is harmful, and the others are not."""
    optimizer = torch.optim.AdamW(guard.adapter().values(), lr=1e-3)
    target = torch.tensor([[1.0], [0.0], [0.0]]).expand(-1, 3)
    losses = []
    for _ in range(24):
        logits = forward(guard.train(), ROWS)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", conftest.KINDS)
def test_architecture_is_guarded_from_training_to_answers(kind, path):
    """Kills: a target that is left out, states from below the final projection, an answer that changes."""
    guard = make_guard(kind, trained=False, guard_path=path)
    linear = [m for m in make_model(kind).base_model.modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    assert lora_layers(guard) == len(linear) > 5
    assert guard.max_tokens + guard.guard_prompt_ids.numel() == conftest.CONTEXT
    learn(guard)
    [*_, (answer, _)] = guard.stream(asked(ROWS[0]), max_new_tokens=20, verdict_every=8)
    assert answer == until(plain(kind, ROWS[0]), 2)


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt_neo"])
def test_a_text_within_the_window_is_asked_at_once(kind):
    """Kills: a mask that one kind of layer ignores or that shows too much, a window lost or too long."""
    guard = guard_for(make_model(kind, sliding_window=128, window_size=128))
    fill_b(guard)
    longest = 128 - 5 * guard.guard_prompt_ids.shape[1]
    for length, passes in ((longest, 1), (longest + 1, 5)):
        ids, cuts = text(length), [30, 40, 50, 61, length]
        in_turn = guard.guard_logits(guard.states_in_turn(ids, torch.tensor(cuts)))
        with patch.object(guard, "ask", wraps=guard.ask) as ask:
            assert torch.allclose(guard([ids], [cuts])[0], in_turn, atol=1e-4)
        assert ask.call_count == passes


@pytest.mark.parametrize("path", PATHS)
def test_8_bit_base_is_guarded_and_not_merged(path, tmp_path):
    """Kills: a fingerprint that quantising changes, layers without LoRA, a merge of quantised matrices."""
    make_model().save_pretrained(tmp_path / "plain")
    conftest.make_tokenizer().save_pretrained(tmp_path / "8-bit")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **options).save_pretrained(tmp_path / "8-bit")
    chat_model, tokenizer = load_chat_model(str(tmp_path / "8-bit"))
    assert fingerprint(chat_model, tokenizer) == fingerprint(make_model(), conftest.make_tokenizer())
    guard = guard_for(chat_model, guard_path=path)
    learn(guard)
    before = score(guard, ROWS)
    merge_lora(guard.chat_model)  # nothing can be added to weights in 8 bits
    assert torch.equal(score(guard, ROWS), before)


@pytest.mark.parametrize("path", PATHS)
def test_longrope_has_its_original_context_so_neighbours_do_not_matter(path):
    """Kills: rows of a batch that are rotated as the longest of them is."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "factor": 4.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [8.0] * 4, "original_max_position_embeddings": conftest.CONTEXT // 2}
    guard = guard_for(make_model(rope_parameters=rope), guard_path=path)
    fill_b(guard)
    assert guard.max_tokens + guard.guard_prompt_ids.numel() == conftest.CONTEXT // 2
    rows = [text(length) for length in (40, 120, 200)]
    alone = torch.cat([score(guard, [row]) for row in rows])
    assert torch.allclose(score(guard, rows), alone, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", conftest.REFUSED)
def test_model_that_cannot_be_guarded_is_refused_and_left_as_it_was(name, path):
    """Kills: attention to what follows, which rounding hides; a cache that is ignored; LoRA that stays."""
    config, on_activated, on_full = conftest.REFUSED[name]
    chat_model = conftest.random_model(config)
    reason = on_activated if path == "activated" else on_full
    if reason is None:
        guard_for(chat_model, guard_path=path)
        return
    with pytest.raises(ValueError, match=reason):
        guard_for(chat_model, guard_path=path)
    assert not lora_layers(chat_model)


# ---------------------------------------------------------------- all families of transformers

FAMILIES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "gpt-sw3"]  # this is GPT-2
SIZES = {  # the first pattern that the name of a setting matches -> its small size; None: its default
    "pad_token_id|eos_token_id": 2,
    "^chunk_size_feed|^qk_head": None,
    "^n_group$|topk_group|dense_replace|dense_layers": 1,
    "kv_shared": 0,
    "vocab": 320,
    "position|max_seq|context_len|n_ctx": 256,
    "window|chunk_size$|index_topk$|block_size|local_attention$": 8,
    "intermediate|ffn|inner|dff|dim_ff|feed_forward": 48,
    "key_value_heads|key_heads|per_tok|topk$|top_k|moe_k|n_groups": 2,
    "heads$|n_head$|experts$|patch_size|layers$|n_layer$|num_blocks": 4,
    "nope_head|v_head_dim|state|rank|buckets": 16,
    "head_dim$|d_kv|dim_head|head_size|kv_channels|rotary_dim|image_size": 8,
    "hidden_size|d_model|embd|emb_dim|embed.*dim|embedding_size|width|_rel|dim_model": 32,
}
DERIVED = ("token_id", "key_value_heads", "head_dim", "intermediate_size", "experts", "per_tok")
OWN = {
    "BailingHybridConfig": {"layer_group_size": 2},
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "Dots3NoteTextConfig": {"layer_types": ["full_attention"] * 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"head_dim": 16},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_kv_heads": 1}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "ReformerConfig": {"is_decoder": True, "axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16)},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"layer_types": ["mamba", "hybrid"] * 2},
    "Zamba2Config": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "xLSTMConfig": {"hidden_size": 64, "qk_dim_factor": 1.0},
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
    chat_model = conftest.random_model(config)
    chat_model.generation_config.eos_token_id = 2
    with torch.no_grad():
        for parameter in chat_model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return chat_model


def answer_of(chat_model):
    ids = torch.tensor([ROWS[0]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "pad_token_id": 2}
    return until(chat_model.generate(ids, do_sample=False, **options)[0, 31:].tolist(), 2)


@torch.no_grad()
def outcome(family, path):
    """What becomes of a random model of a family. Raises AssertionError for a guard that is wrong."""
    try:
        chat_model = sharp_model(CONFIG_MAPPING[family])
        answer = answer_of(chat_model)
    except Exception as error:
        return f"not built: {one_line(error)}"
    try:
        guard = guard_for(chat_model, guard_path=path)
    except ValueError as error:
        assert "\n" not in str(error) and not lora_layers(chat_model) and answer_of(chat_model) == answer
        return f"refused: {error}"
    fill_b(guard, std=0.1)
    ids = text(150)
    several = guard([ids, ROWS[2]], [[20, 75, 150], [7]])  # (2, 3, 1 + K)
    alone = torch.cat([forward(guard, [row]) for row in (ids[:20], ids[:75], ids, ROWS[2])])
    assert torch.allclose(torch.cat([several[0], several[1, :1]]), alone, atol=1e-4)
    assert [*guard.stream(asked(ROWS[0]), max_new_tokens=12)][-1][0] == answer
    return "worked"


@pytest.mark.slow
@pytest.mark.parametrize(("path", "at_least"), [("activated", 90), ("full", 120)])
def test_every_family_is_guarded_rightly_or_refused_in_one_line(path, at_least):
    """Kills: a family that the trial accepts and the guard misjudges, a traceback, a trial too strict."""
    worked = 0
    for family in FAMILIES:
        what = outcome(family, path)
        print(f"{family}, {path}: {what}")  # the last line names the family that fails
        worked += what == "worked"
    print(f"{path}: {worked} of {len(FAMILIES)} worked")
    assert worked > at_least
