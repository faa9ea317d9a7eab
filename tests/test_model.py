"""The two paths, the cache, and the adapter file. Each test names the mutation that it kills."""

import copy
import json
import math
import os
import pickle
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
import safetensors.torch
import torch
from transformers import DynamicCache

import checkpoint
import common
import model as model_module
from checkpoint import EMBEDDED, load_guard
from common import UserError, write_whole
from conftest import CONTEXT, make_guard, make_model, make_tokenizer
from data import encode
from lora import LoRALinear
from model import GUARD, GuardedChat, fingerprint, probabilities

KINDS = ["llama", "mistral", "gpt2"]
PATHS = ["activated", "full"]
TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]


def conversations(guard, texts=TEXTS):
    return [encode(guard.tokenizer, text, "safe") for text in texts]


def all_tensors(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def read(guard, ids):
    with torch.no_grad():
        return guard.chat_model.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_logits_are_bitwise_those_of_an_untouched_model(kind, path):
    """Kills: a gate left open after a verdict, an update that is added when shut, a base that is changed, a head that
    multiplies otherwise because it is frozen."""
    guard, plain = make_guard(kind, guard_path=path), make_model(kind)
    ids = torch.tensor([conversations(guard)[2][:40]])
    with torch.no_grad():
        wanted = plain(ids).logits
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        last = {"input_ids": ids.expand(2, -1), "logits_to_keep": 1}
        assert torch.equal(guard.chat_model(**last).logits, plain(**last).logits)
        guard.score(conversations(guard))
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        with guard.gate.opened():
            assert not torch.equal(guard.chat_model(ids).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_path_computes_what_an_untouched_model_does(kind):
    """Kills: an update that is multiplied by zero, a head that copies its frozen weight for a prompt's last token."""
    ids, counts = torch.tensor([[5, 6, 7, 8]]), []
    for model in (make_guard(kind).chat_model, make_model(kind)):
        with torch.no_grad(), torch.profiler.profile() as profiled:
            model(ids, logits_to_keep=1)
        counts.append(Counter({event.key: event.count for event in profiled.key_averages()}))
    copied = Counter(f"aten::{name}" for name in ("clone", "copy_", "empty", "empty_like"))  # the token, no more
    assert counts[0] - counts[1] == copied and not counts[1] - counts[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_between_two_decode_steps_changes_neither_them_nor_the_cache(kind):
    """Kills: judging on the cache itself, cropping it afterwards (wrong once a window has slid), a gate left open,
    logits that nobody may change."""
    guard, plain = make_guard(kind), make_model(kind)
    ids = conversations(guard)[2][:30]  # longer than the sliding window
    ours, theirs = read(guard, ids), DynamicCache(config=plain.config)
    inference = []
    with torch.no_grad():
        plain(torch.tensor([ids]), past_key_values=theirs)
        guard.chat_model.base_model.register_forward_hook(
            lambda module, inputs, output: inference.append(output.last_hidden_state.is_inference())
        )
        for token in (7, 8, 9):
            before, length = all_tensors(ours), ours.get_seq_length()
            assert not guard.judge(ours).is_inference()
            assert ours.get_seq_length() == length
            assert all(map(torch.equal, all_tensors(ours), before))
            step = guard.chat_model(torch.tensor([[token]]), past_key_values=ours).logits
            assert torch.equal(step, plain(torch.tensor([[token]]), past_key_values=theirs).logits)
    assert inference == [True, False] * 3  # a verdict without autograd, then a step of the chat


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_verdict_equals_one_computed_token_by_token_without_a_cache(kind, path, monkeypatch):
    """Kills: an open gate over the conversation, wrong positions for the guard prompt, a head on the wrong token."""
    guard = make_guard(kind, guard_path=path)
    ids = conversations(guard)[2][:30]
    question = guard.guard_prompt_ids[0].tolist()
    assert (path == "full") == (question == [])
    mask = torch.tensor([float(path == "full")] * len(ids) + [1.0] * len(question))[None, :, None]
    scores = guard.score([ids, ids[:7]])[:1]

    def masked(layer, x):
        return layer.base(x) + mask * (x @ layer.delta().T)

    monkeypatch.setattr(LoRALinear, "forward", masked)
    with torch.no_grad():
        hidden = guard.chat_model.base_model(torch.tensor([ids + question]), use_cache=False).last_hidden_state
        assert torch.allclose(guard.head(hidden[:, -1]), scores, atol=1e-5)


def test_activated_path_equals_pefts_activated_lora():
    """Kills: any departure from what others call activated LoRA: the update acts on the invocation tokens alone."""
    peft = pytest.importorskip("peft")
    guard = make_guard(lora_targets=["q_proj", "v_proj"])
    question = guard.guard_prompt_ids[0].tolist()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=question
    )
    theirs = peft.get_peft_model(make_model(), config).eval()
    result = peft.set_peft_model_state_dict(theirs, {k: v for k, v in guard.adapter().items() if "lora_" in k})
    assert not result.unexpected_keys
    ids = conversations(guard)[0]
    with torch.no_grad():
        output = theirs(torch.tensor([ids + question]), output_hidden_states=True)
        assert torch.allclose(guard.head(output.hidden_states[-1][:, -1]), guard.score([ids]), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_depends_on_neither_padding_nor_neighbours_nor_order(kind, path):
    """Kills: pooling at the last column, padding on the other side, a mask left out where rows are padded, an
    unsorted result. The pad id is the end-of-text id, which the text also holds."""
    guard = make_guard(kind, guard_path=path)
    rows = [*conversations(guard), [5, guard.tokenizer.pad_token_id, 6, 7, guard.tokenizer.pad_token_id]]
    alone = torch.cat([guard.score([row]) for row in rows])
    assert torch.allclose(guard.score(rows), alone, atol=1e-5)
    assert torch.allclose(guard.score(rows[::-1], batch_size=2), alone.flip(0), atol=1e-5)
    assert (alone[0] - alone[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_a_step_changes_adapters_and_head_and_nothing_else(path):
    """Kills: a base that is not frozen, an adapter or head without gradient, a gate that stays shut in training."""
    guard = make_guard(guard_path=path, trained=False)
    before = {name: parameter.detach().clone() for name, parameter in guard.named_parameters()}
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves in the second step only
        guard.train()(conversations(guard)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, parameter in guard.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("head.")}


@pytest.mark.parametrize(
    ("dtype", "learning", "flash"), [("bfloat16", True, 2), ("bfloat16", False, 4), ("float32", True, 4)]
)
def test_only_the_guard_prompt_of_16_bit_training_goes_without_the_flash_kernel(dtype, learning, flash):
    """Kills: another kernel for the chat path, for verdicts in use or in fp32, switches that stay as they were set."""
    guard = make_guard()
    guard.chat_model.to(getattr(torch, dtype))
    guard.train(learning)
    with torch.profiler.profile() as profiled:
        guard([[5, 6, 7]])
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == flash  # 2 layers, read and judged
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()


def test_the_frozen_model_does_not_drop_out_in_training():
    """Kills: training mode for the base, whose dropout (GPT-2 has some) would train the guard on another model."""
    guard = make_guard("gpt2").train()
    assert torch.equal(guard(conversations(guard)), guard(conversations(guard)))


@pytest.mark.parametrize("path", PATHS)
def test_lora_dropout_acts_in_training_alone(path):
    """Kills: a training mode that does not reach the LoRA layers, and a score that leaves them in it."""
    guard = make_guard(guard_path=path, lora_dropout=0.5).train()
    assert not torch.equal(guard(conversations(guard)), guard(conversations(guard)))
    assert torch.equal(guard.score(conversations(guard)), guard.score(conversations(guard)))


def test_logits_are_fp32_under_autocast():
    """Kills: a head in bf16, which rounds different scores to the same."""
    guard = make_guard()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = guard(conversations(guard))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_heads():
    """Kills: a stand-in for unsafe that is not the largest category, an output too many, a bias that was declined."""
    guard = make_guard(unsafe_head=False, clf_head_bias=False)
    scores = guard.score(conversations(guard))
    assert scores.shape == (4, 3) and torch.equal(scores[:, 0], scores[:, 1:].amax(1))
    assert {name for name in guard.adapter() if "head" in name} == {"guard_head.weight"}
    assert guard.adapter()["guard_head.weight"].shape == (2, 32)
    assert make_guard().adapter()["guard_head.weight"].shape == (3, 32)


@pytest.mark.parametrize("size", [100, 10**6])
@pytest.mark.parametrize("path", PATHS)
def test_a_long_text_is_seen_whole_and_its_worst_window_counts(path, size, monkeypatch):
    """Kills: cutting at the context, windows longer than that or than WINDOW, windows of a text that fits the context,
    windows without overlap, the last or the mean window instead of the worst."""
    guard, seen = make_guard(guard_path=path), []
    monkeypatch.setattr(model_module, "WINDOW", size)
    monkeypatch.setattr(
        guard, "forward", lambda ids: seen.extend(ids) or torch.tensor([[max(i) * 1.0] * 3 for i in ids])
    )
    text = list(range(3, 903))
    assert guard.score([text, [5, 4]])[:, 0].tolist() == [902, 5]
    assert guard.score([text[::-1]])[:, 0].tolist() == [902]
    windows = [window for window in seen if len(window) > 2 and window[0] < window[1]]
    assert max(map(len, windows)) == min(size, guard.max_tokens) <= CONTEXT
    pairs = {pair for window in windows for pair in pairwise(window)}
    assert pairs == set(pairwise(text))
    seen.clear()
    guard.score([text[: guard.max_tokens]])
    assert seen == [text[: guard.max_tokens]]


def test_a_cache_that_cannot_be_lent_is_refused():
    """Kills: judging on a static cache, which is written in place."""
    from transformers import StaticCache

    guard = make_guard()
    cache = StaticCache(config=guard.chat_model.config, max_cache_len=64)
    with torch.no_grad():
        guard.chat_model(torch.tensor([[4, 5, 6]]), past_key_values=cache)
    with pytest.raises(UserError, match="StaticLayer"):
        guard.judge(cache)


def test_caches_kept_in_a_folder_give_the_same_verdicts_and_are_read_once(tmp_path, monkeypatch):
    """Kills: a cut that is not made, or made on the wrong side; padding that is attended to; a file for another text,
    model or dtype; conversations that are read again; a cache in which the guard's own tokens are kept."""
    guard = make_guard()
    ids, ends = conversations(guard), [3, 9, 5, 7][: len(TEXTS)]
    plain, whole = guard(ids, ends), guard(ids)
    assert torch.allclose(plain, guard([row[:end] for row, end in zip(ids, ends, strict=True)]))
    guard.keep_caches(tmp_path / "caches")
    read = []
    forward = guard.chat_model.base_model.forward
    monkeypatch.setattr(guard.chat_model.base_model, "forward", lambda **kw: read.append(kw) or forward(**kw))
    assert torch.allclose(guard(ids, ends), plain, atol=1e-5)
    assert len(read) == len(ids) + 1 and len(list(guard.cache_dir.iterdir())) == len(ids)
    assert torch.allclose(guard(ids), whole, atol=1e-5) and torch.allclose(guard(ids[::-1]), whole.flip(0), atol=1e-5)
    assert len(read) == len(ids) + 3
    scaled = make_model()
    scaled.config.rope_theta = 7.0
    for other in (make_model(seed=1), scaled):  # the first differs in its matrices alone
        other = GuardedChat(other, make_tokenizer(), categories=["theft", "hate"])
        other.keep_caches(tmp_path / "caches")
        assert other.cache_dir != guard.cache_dir


def test_a_guard_whose_caches_cannot_be_kept_is_refused_before_a_file_is_written(tmp_path):
    """Kills: a window of the last tokens taken for the whole conversation, a cache that the guard has changed."""
    for guard in (make_guard("mistral"), make_guard("gemma3"), make_guard(guard_path="full")):
        with pytest.raises(UserError, match="caches"):
            guard.keep_caches(tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


def test_a_damaged_cache_file_is_named(tmp_path):
    """Kills: a traceback, and a verdict on what is left of the file."""
    guard = make_guard()
    guard.keep_caches(tmp_path)
    guard(conversations(guard)[:1])
    [path] = guard.cache_dir.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=path.name):
        guard(conversations(guard)[:1])


# The adapter file.


@pytest.fixture
def saved(tmp_path, model_folder, monkeypatch):
    """(guard, config path, adapter path) of a guard whose base model is a local folder."""
    guard = make_guard()
    config = {"base_model": model_folder, "dtype": "float32", "calibration": guard.calibration}
    config |= guard.settings | {"threshold": 0.5, "prompt_threshold": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    guard.save_adapter(tmp_path / "adapter.safetensors")
    return guard, tmp_path / "config.json", tmp_path / "adapter.safetensors"


def rewrite(path, change):
    """Save the adapter's tensors again after `change` has had its way with them; the header stays."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def test_save_and_load_give_equal_scores_and_equal_bytes(saved, tmp_path):
    """Kills: a tensor that is not saved or not loaded, one saved in less precision, metadata in no fixed order."""
    guard, config, adapter = saved
    loaded, thresholds = load_guard(config, adapter)
    assert torch.equal(loaded.score(conversations(loaded)), guard.score(conversations(guard)))
    assert thresholds == (0.9, 0.5)
    loaded.save_adapter(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == adapter.read_bytes()


def test_a_loaded_guard_is_cast_once_and_judges_bit_for_bit_as_before(saved):
    """Kills: adapters that are cast in every pass, a cast that rounds otherwise, a head or a buffer cast with them."""
    _, config, adapter = saved
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    loaded, _ = load_guard(config, adapter)
    dtypes = {name: parameter.dtype for name, parameter in loaded.adapter().items()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "head" in name} == {torch.float32}
    cast = loaded.score(conversations(loaded))
    for name, tensor in safetensors.torch.load_file(adapter).items():
        loaded.adapter()[name].data = tensor  # fp32 again
    assert torch.equal(loaded.score(conversations(loaded)), cast)


@pytest.mark.parametrize(
    ("stored", "capabilities", "wanted"),
    [
        (torch.bfloat16, {"avx2": True, "avx512_bf16": False, "avx512_fp16": True, "amx_bf16": False}, torch.float32),
        (torch.bfloat16, {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        (torch.float16, {"avx512_bf16": True, "avx512_fp16": False}, torch.float32),
        (torch.float16, {"fp16_arith": True}, torch.float16),
        (torch.float64, {}, torch.float64),
    ],
)
def test_16_bits_are_left_where_the_processor_has_no_instructions_for_them(stored, capabilities, wanted, monkeypatch):
    """Kills: no change, a change on every processor, instructions for another type, and a wider type made narrower."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    guard = make_guard()
    guard.chat_model.to(stored)
    before = {name: tensor.clone() for name, tensor in guard.chat_model.state_dict().items()}
    guard.use_fast_dtype()
    for name, tensor in guard.chat_model.state_dict().items():
        assert tensor.dtype == wanted and torch.equal(tensor, before[name].to(wanted))


def test_16_bits_stay_on_a_gpu(monkeypatch):
    """Kills: the processor's instructions asked for where it does not compute."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    guard = make_guard()
    guard.to(torch.bfloat16).to("meta").use_fast_dtype()
    assert guard.chat_model.dtype == torch.bfloat16


def test_only_adapters_and_head_are_saved_under_pefts_names(saved):
    """Kills: saving the base, and names that other tools cannot read."""
    tensors = safetensors.torch.load_file(saved[2])
    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    layers += [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
    wanted = {f"base_model.model.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    assert set(tensors) == wanted | {"guard_head.weight", "guard_head.bias"}


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "missing": (lambda tensors: tensors.pop(Q), Q),
    "extra": (lambda tensors: tensors.update({"other.weight": torch.ones(2)}), "other.weight"),
    "misshapen": (lambda tensors: tensors.update({Q: torch.ones(4, 31)}), Q),
    "transposed": (lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}), Q),
    "foreign": (lambda tensors: tensors.update({"transformer.h.0.lora_A.weight": tensors.pop(Q)}), "transformer.h.0"),
    "not finite": (lambda tensors: tensors[Q][0].fill_(float("nan")), Q),
    "not numbers": (lambda tensors: tensors.update({Q: tensors[Q].int()}), Q),
    "finite in fp64 alone": (lambda tensors: tensors.update({Q: tensors[Q].double().fill_(1e300)}), Q),
    "in a type that few operations know": (lambda tensors: tensors.update({Q: tensors[Q].to(torch.float8_e4m3fn)}), Q),
}


@pytest.mark.parametrize("change, named", DAMAGE.values(), ids=DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_changes_nothing(saved, change, named):
    """Kills: loading what fits and skipping the rest, checking one way only, checking after copying."""
    _, _, adapter = saved
    rewrite(adapter, change)
    guard = make_guard(trained=False)
    before = copy.deepcopy({name: parameter.detach() for name, parameter in guard.adapter().items()})
    with pytest.raises(UserError, match=named):
        guard.load_adapter(adapter)
    assert all(torch.equal(parameter, before[name]) for name, parameter in guard.adapter().items())


@pytest.mark.parametrize(
    "field, value", [("lora_alpha", 8.0), ("guard_prompt", "Bad?"), ("categories", ["hate", "theft"])]
)
def test_an_adapter_with_other_settings_is_refused_by_field(saved, field, value):
    """Kills: trusting the shapes, which are the same here."""
    with pytest.raises(UserError, match=field):
        make_guard(**{field: value}).load_adapter(saved[2])


def test_another_base_of_the_same_shapes_is_refused(saved):
    """Kills: a fingerprint that is not compared, or without the template, the vocabulary, the config or the norms."""
    other = make_tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "model")
    settings = {name: saved[0].settings[name] for name in ("categories", "lora_r", "guard_prompt")}
    with pytest.raises(UserError, match="base_fingerprint"):
        GuardedChat(make_model(), other, **settings).load_adapter(saved[2])
    other = make_tokenizer()
    other.add_tokens(["new"])
    with pytest.raises(UserError, match="base_fingerprint"):
        GuardedChat(make_model(), other, **settings).load_adapter(saved[2])
    changes = [lambda m: m.model.norm.weight.data.mul_(2), lambda m: setattr(m.config, "hidden_act", "gelu")]
    changes += [lambda m: setattr(m.config, "num_attention_heads", 8)]
    for change in changes:
        model = make_model()
        change(model)
        with pytest.raises(UserError, match="base_fingerprint"):
            GuardedChat(model, make_tokenizer(), **settings).load_adapter(saved[2])


def claims(header, size=0):
    """A safetensors file whose header is this, and then `size` bytes."""
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def entry(shape, end):
    return {Q: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


STRANGE = {
    "random bytes": [random.Random(seed).randbytes(seed * 37) for seed in range(60)],
    "one byte many times": [bytes([byte]) * 100 for byte in range(256)],
    "a header of gigabytes": [(2**size).to_bytes(8, "little") + b"{}" for size in range(5, 63)],
    "a tensor of gigabytes": [claims(entry([2**16, 2**16], 2**34)), claims(entry([2**62, 2**62], 64), 64)],
    "a tensor behind the end": [claims(entry([4, 4], 64), 63), claims(entry([4, 4], -1), 64)],
    "no tensors": [claims({}), claims([]), claims({"__metadata__": {"lora_guard": "[" * 10**5}})],
    "settings that are none": [claims({"__metadata__": {"lora_guard": text}}) for text in ("", "[]", "3", "null")],
    "a pickle": [pickle.dumps({Q: 1})],
}


@pytest.mark.parametrize("contents", STRANGE.values(), ids=STRANGE)
def test_a_strange_adapter_is_refused_at_once(saved, contents, monkeypatch):
    """Kills: an error of another class, reading the chat model first."""
    _, config, adapter = saved
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    for content in contents:
        adapter.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter\.safetensors") as error:
            load_guard(config, adapter)
        assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_an_adapter_of_strange_numbers_is_refused_at_once(saved, monkeypatch):
    """Kills: reading the chat model before the numbers are looked at."""
    _, config, adapter = saved
    rewrite(adapter, DAMAGE["not finite"][0])
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    with pytest.raises(UserError, match="no finite numbers"):
        load_guard(config, adapter)


def test_an_adapter_that_is_cut_anywhere_is_refused(saved, monkeypatch):
    """Kills: loading what is left, and an error of another class."""
    _, config, adapter = saved
    content = adapter.read_bytes()
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    header = 8 + int.from_bytes(content[:8], "little")
    with open(adapter, "r+b") as file:
        for length in [*range(len(content) - 1, header, -101), *range(header, -1, -1)]:
            file.truncate(length)
            with pytest.raises(UserError, match="cannot read the adapter"):
                load_guard(config, adapter)


def test_a_chat_model_that_is_code_is_refused_and_not_run(saved, tmp_path, monkeypatch):
    """Kills: trust in the code of a model that a config names, in the terminal's answer, or in a pickle."""
    _, config, adapter = saved
    touch = f"open({str(tmp_path / 'was run')!r}, 'w')"

    class Payload:
        def __reduce__(self):
            return eval, (touch,)

    strange = tmp_path / "strange"
    make_tokenizer().save_pretrained(strange)
    (strange / "code.py").write_text(touch)
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    kinds = [{"model_type": "strange", "auto_map": code}, json.loads(make_model().config.to_json_string())]
    (strange / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for kind in kinds:
        (strange / "config.json").write_text(json.dumps(kind))
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model": str(strange)}))
        with pytest.raises(UserError, match="cannot load the chat model"):
            load_guard(config, adapter)
        assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"base_model": 3}', "\x00\x01", "[" * 100_000, "\xff" * 100_000]
)
def test_a_damaged_config_is_refused(saved, text):
    """Kills: a KeyError or JSON error that reaches the user."""
    _, config, adapter = saved
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json") as error:
        load_guard(config, adapter)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "field, value",
    [
        ("lora_r", "4"),
        ("lora_r", 10**13),
        ("base_model", 3),
        ("guard_prompt", None),
        ("threshold", "high"),
        ("prompt_threshold", None),
        ("guard_path", "half"),
        ("categories", "x"),
        ("categories", ["theft", "theft"]),
        ("categories", [["theft"], ["hate"]]),
        ("guard_prompt", ["a", "b"]),
        ("base_fingerprint", {"config": "0"}),
        ("calibration", {"shift": [[0.0]] * 3, "temperature": [[1.0]] * 3}),
        ("calibration", None),
        ("calibration", {"shift": [0.0, 0.0, 0.0], "temperature": [1.0]}),
        ("calibration", {"shift": [0.0], "temperature": [1.0]}),
        ("calibration", {"shift": [0.0, 0.0, math.nan], "temperature": [1.0, 1.0, 1.0]}),
        ("calibration", {"shift": [0.0, 0.0, 0.0], "temperature": [1.0, 0.0, 1.0]}),
    ],
)
def test_a_config_with_a_wrong_value_is_refused_by_field(saved, field, value):
    """Kills: settings that are used before they are checked, an adapter that does not say what it was learnt with."""
    guard, config, adapter = saved
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: value}))
    with pytest.raises(UserError) as error:
        load_guard(config, adapter)
    assert any(name in str(error.value) for name in ("config.json", field))
    if field in guard.settings:  # the same in both
        guard.settings[field] = value
        guard.save_adapter(adapter)
        with pytest.raises(UserError) as error:
            load_guard(config, adapter)
        assert any(name in str(error.value) for name in ("config.json", field, field.replace("_", " "), "LoRA rank"))


def test_probabilities_are_what_the_calibration_makes_of_the_logits(saved):
    """Kills: a shift or temperature that is not read, of another output, in the wrong order or in single precision."""
    _, config, adapter = saved
    calibration = {"shift": [0.3, -1.0, 2.0], "temperature": [2.0, 0.5, 1.0]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"calibration": calibration}))
    guard, _ = load_guard(config, adapter)
    logits = torch.tensor([[1.0, 2.0, 3.0], [40.0, -1.0, torch.nan]])
    found = probabilities(logits, guard.calibration)
    wanted = [[1 / (1 + math.exp(-z)) for z in row] for row in ([0.35, 6.0, 1.0], [19.85, 0.0])]
    assert found[0].tolist() == pytest.approx(wanted[0], abs=1e-12)
    assert found[1, :2].tolist() == pytest.approx(wanted[1], abs=1e-12) and found[1, 2].isnan()
    assert found[1, 0] < 1


def test_settings_that_make_no_sense_are_refused():
    """Kills: a check left out; a misspelt setting taken for the default."""
    names = {"categories": ["a", "a"]}, {"categories": "ab"}, {"categories": [1, 2]}, {"guard_prompt": ["a", "b"]}
    for wrong in ({"lora_r": 0}, {"lora_alpha": -1.0}, {"lora_dropout": 1.0}, {"guard_prompt": ""}, *names):
        with pytest.raises(UserError):
            make_guard(**wrong)
    with pytest.raises(UserError, match="categories"):
        make_guard(categories=[], unsafe_head=False)
    with pytest.raises(TypeError, match="lora_rank"):
        make_guard(lora_rank=8)
    assert GUARD["categories"] == []


def test_models_that_cannot_be_had_are_refused_in_one_line(tmp_path, model_folder):
    """Kills: a traceback for a model that does not exist, is damaged, or has no chat template."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    (tmp_path / "empty").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_model().save_pretrained(tmp_path / "untaught")
    tokenizer.save_pretrained(tmp_path / "untaught")
    names = ["no/such-model", str(tmp_path / "nowhere"), str(tmp_path / "broken.gguf"), str(tmp_path / "empty")]
    for name in [*names, str(tmp_path / "untaught")]:
        with pytest.raises(UserError) as error:
            checkpoint.load_chat_model(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert "chat template" in str(error.value)


def test_the_embedded_model_is_unpacked_once(tmp_path, monkeypatch):
    """Kills: unpacking at every start, a damaged copy that stays or stops the start, a folder that must be writable,
    one dtype or version in place of another, weights out of line, what is left of a copy that failed."""
    unpacked, load = [], checkpoint._from_pretrained

    def spy(source, options, **file):
        if not file:
            return load(source, options)
        unpacked.append(options["dtype"])
        return make_model().to(getattr(torch, options["dtype"])), make_tokenizer()

    monkeypatch.setattr(checkpoint, "_from_pretrained", spy)
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "assets")
    for dtype, wanted in ((None, "bfloat16"), ("float32", "float32"), (None, "bfloat16"), ("float32", "float32")):
        chat_model, tokenizer = checkpoint.load_chat_model(EMBEDDED, dtype)
        assert chat_model.dtype == getattr(torch, wanted)
        assert all(parameter.data_ptr() % 64 == 0 for parameter in chat_model.parameters())
        same = make_model().to(chat_model.dtype).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in chat_model.state_dict().items())
        assert encode(tokenizer, TEXTS[0]) == encode(make_tokenizer(), TEXTS[0])
    assert unpacked == ["bfloat16", "float32"] and len(list((tmp_path / "assets/lora-guard").iterdir())) == 2
    damages = (lambda: [os.truncate(path, 1000) for path in tmp_path.rglob("*.safetensors")],)
    damages += (lambda: [path.unlink() for path in tmp_path.rglob("*.jinja")],)
    damages += (lambda: monkeypatch.setattr(checkpoint.transformers, "__version__", "6.0"),)
    for number, damage in enumerate(damages, 3):
        damage()
        for _ in range(2):
            assert checkpoint.load_chat_model(EMBEDDED)[1].chat_template
        assert len(unpacked) == number
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "full")
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(Exception("disk full")))
    checkpoint.load_chat_model(EMBEDDED)
    assert not list((tmp_path / "full/lora-guard").iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "file")
    checkpoint.load_chat_model(EMBEDDED)
    assert len(unpacked) == 7


@pytest.mark.slow
def test_the_kept_copy_of_the_embedded_model_is_the_model(tmp_path, monkeypatch):
    """Kills: weights that are rounded on the way, a tokenizer that cuts otherwise, another guard's fingerprint."""
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path)
    (model, tokenizer), (kept, other) = (checkpoint.load_chat_model(EMBEDDED) for _ in range(2))
    tensors = kept.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert fingerprint(model, tokenizer) == fingerprint(kept, other)
    assert model.config.to_json_string() == kept.config.to_json_string()
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == other.special_tokens_map
    assert model.generation_config.to_dict() == kept.generation_config.to_dict()


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """Kills: writing in place, and leaving the old file half overwritten."""
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(common.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(UserError, match=f"cannot write {re.escape(str(path))}: disk full"):
        write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
