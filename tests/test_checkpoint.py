"""Loading chat models, saving and loading guards. Each test names the mutations that it kills."""

import argparse
import contextlib
import json
import math
import os
import pickle
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import guard_for, ids_of, make_guard, make_model, make_rows, make_tokenizer, score, write
from transformers.utils import logging

import checkpoint
import train
from checkpoint import (
    EMBEDDED,
    adapter_header,
    fingerprint,
    guard_of,
    load_chat_model,
    load_guard,
    save_adapter,
)
from errors import UserError, guard_arguments
from model import NEVER, GuardConfig

TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]
OTHER = "{} belongs to another guard or chat model; what differs: {}"


def save(guard, folder, model_folder):
    """Write config.json and adapter.safetensors as train.py does, and return both paths."""
    base = fingerprint(guard.chat_model, guard.tokenizer)
    config = {"base_model": model_folder, "dtype": "float32", "base_fingerprint": base}
    (folder / "config.json").write_text(json.dumps(config | {"guard": asdict(guard.config)}))
    save_adapter(folder / "adapter.safetensors", guard.adapter(), adapter_header(base, guard.config))
    return folder / "config.json", folder / "adapter.safetensors"


@pytest.fixture
def saved(tmp_path, model_folder):
    """(config path, adapter path) of a guard whose base model is a local folder."""
    return save(make_guard(prompt_threshold=0.9), tmp_path, model_folder)


def edit(config, field, *value):
    """Set a field of config.json or of its `guard` object. Without a value it is removed."""
    content = json.loads(config.read_text())
    part = content if field in (*content, "operating_points") else content["guard"]
    part.pop(field, None)
    part |= dict.fromkeys([field], *value) if value else {}
    config.write_text(json.dumps(content))


def rewrite(path, change_tensors=lambda _: None, header=()):
    """Save the adapter again with changed tensors, or with other fields in its header."""
    with safetensors.safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["lora_guard"])
    tensors = safetensors.torch.load_file(path)
    change_tensors(tensors)
    save_adapter(path, tensors, fields | dict(header))


def refusal(*paths, **options):
    """The line that load_guard refuses these files with."""
    with pytest.raises(UserError) as error:
        load_guard(*paths, device_id=-1, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


@pytest.fixture
def no_chat_model(monkeypatch):
    """What comes before the chat model is loaded, which takes a while."""
    monkeypatch.setattr(checkpoint, "load_chat_model", None)


# ---------------------------------------------------------------- a guard that is saved and loaded


@pytest.mark.parametrize("guard_path", ["activated", "full"])
def test_a_guard_that_is_loaded_is_the_one_that_was_saved(guard_path, tmp_path, model_folder):
    """Kills: a tensor not saved, not loaded or rounded, metadata in no fixed order, names that PEFT lacks."""
    guard = make_guard(prompt_threshold=0.9, guard_path=guard_path)
    config, adapter = save(guard, tmp_path, model_folder)
    loaded = load_guard(config)
    texts = [ids_of(guard.tokenizer, text, "safe") for text in TEXTS]
    assert torch.equal(score(loaded, texts), score(guard, texts)) and loaded.config == guard.config
    edit(config, "dtype", "bfloat16")
    loaded = load_guard(config, adapter)
    header = adapter_header(json.loads(config.read_text())["base_fingerprint"], loaded.config)
    save_adapter(tmp_path / "again.safetensors", loaded.adapter(), header)
    assert loaded.chat_model.dtype == torch.bfloat16
    assert (tmp_path / "again.safetensors").read_bytes() == adapter.read_bytes()
    layers = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    names = {f"layers.{i}.{layer}.lora_{matrix}" for i in range(2) for layer in layers for matrix in "AB"}
    wanted = {f"base_model.model.model.{name}.weight" for name in names}
    assert set(safetensors.torch.load_file(adapter)) == wanted | {"guard_head.weight", "guard_head.bias"}


def test_a_threshold_replaces_both_and_excludes_a_rate(saved):
    """Kills: one threshold that stays, NaN, which never flags, one of two arguments that is not heard."""
    loaded = load_guard(*saved, threshold=0.25)
    assert (loaded.config.prompt_threshold, loaded.config.threshold) == (0.25, 0.25)
    for threshold in (math.nan, math.inf):
        assert "threshold" in refusal(*saved, threshold=threshold)
    for threshold, rate in ((0.5, 0.05), (0.0, 0.0)):
        assert "either threshold or max_fpr" in refusal(*saved, threshold=threshold, max_fpr=rate)


PROMPTS = {"0.005": [0.95, 0.1], "0.05": [0.8, 0.5], "0.1": [0.7, 0.6]}
ANSWERS = {"0.1": [0.3, 0.9], "0.02": [0.5, 0.7]}
CHOSEN = [(PROMPTS, 0.02, 0.95, 0.5), (PROMPTS, 0.0999, 0.8, 0.5), (PROMPTS, 0.1, 0.7, 0.3)]
CHOSEN += [(PROMPTS, 1, 0.7, 0.3), ({"0.1": [0.7, 0.6]}, 0.05, NEVER, 0.5), ({}, 0.5, NEVER, 0.3)]


@pytest.mark.parametrize(("prompts", "rate", "prompt", "answer"), CHOSEN)
def test_a_rate_takes_the_highest_measured_one_within_it(saved, prompts, rate, prompt, answer):
    """Kills: a rate above the one asked for, prompts' for answers', the config's own, rates in no order."""
    edit(saved[0], "operating_points", {"prompt": prompts, "answer": ANSWERS})
    config = load_guard(*saved, max_fpr=rate).config
    assert (config.prompt_threshold, config.threshold) == (prompt, answer)


def test_a_rate_that_answers_lack_is_refused(saved, no_chat_model):
    """Kills: a guard that flags nothing, no word on which rate would do, a good config that is blamed."""
    edit(saved[0], "operating_points", {"prompt": PROMPTS, "answer": ANSWERS})
    for rate in (0.01, 0.0199, 0, -1):
        assert "0.02" in refusal(*saved, max_fpr=rate)
    assert "train.py" not in refusal(*saved, max_fpr=math.nan)
    edit(saved[0], "operating_points", {"prompt": PROMPTS, "answer": {}})
    assert "inf" not in refusal(*saved, max_fpr=0.5)


# ---------------------------------------------------------------- how it computes


SPEEDS = [("bfloat16", 9.0, 2.0, None, "float32"), ("float16", 2.0, 1.79, None, "float32")]
SPEEDS += [("float16", 2.0, 1.81, None, "float16"), ("bfloat16", 2.0, 9.0, None, "bfloat16")]
SPEEDS += [("bfloat16", 1.0, 9.0, "float32", "float32"), ("bfloat16", 9.0, 1.0, "bfloat16", "bfloat16")]
SPEEDS += [("float32", 1.0, 1.0, "float16", "float16")]


@pytest.mark.parametrize(("stored", "time", "fp32_time", "asked", "wanted"), SPEEDS)
def test_the_faster_dtype_computes(stored, time, fp32_time, asked, wanted, model_folder, monkeypatch):
    """Kills: no cast, noise that decides, --dtype unheard, LoRA, head or rotary frequencies in 16 bits."""
    times = {"float32": fp32_time, stored: time}
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, dtype: times[dtype])
    guard = guard_for(load_chat_model(model_folder, stored)[0])
    frozen = {name for name, p in guard.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in [*guard.named_parameters(), *guard.named_buffers()]}
    assert checkpoint.use_fast_dtype(guard, asked) == f"computing in {wanted}"
    for name, tensor in [*guard.named_parameters(), *guard.named_buffers()]:
        dtype = getattr(torch, wanted) if name in frozen else before[name].dtype
        assert tensor.dtype == dtype and torch.equal(tensor, before[name].to(dtype))
    kept = [*guard.adapter().values(), guard.chat_model.model.rotary_emb.inv_freq]
    assert all(tensor.dtype == torch.float32 for tensor in kept)


def test_what_the_times_do_not_speak_of_is_not_cast(model_folder, monkeypatch):
    """Kills: the CPU's times for another device's work, a quantised model that is cast, which breaks it."""
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, dtype: 9.0 if dtype == "bfloat16" else 1.0)
    on_gpu = guard_for(load_chat_model(model_folder, "bfloat16")[0]).to("meta")
    quantised = guard_for(load_chat_model(model_folder, "bfloat16")[0])
    quantised.chat_model.is_quantized = True
    for guard, asked in ((on_gpu, None), (quantised, None), (quantised, "bfloat16")):
        assert checkpoint.use_fast_dtype(guard, asked) == "computing in bfloat16"
        assert guard.chat_model.dtype == torch.bfloat16
    for asked in ("float32", "float16"):
        with pytest.raises(UserError, match="quantised"):
            checkpoint.use_fast_dtype(quantised, asked)
        assert quantised.chat_model.dtype == torch.bfloat16


def test_a_product_is_timed_in_its_dtype_after_a_warm_up(monkeypatch):
    """Kills: one dtype timed for another, the slow first run that counts, a mean."""
    monkeypatch.setattr(checkpoint.timeit, "repeat", lambda product, **_: [1, 9, product().itemsize, 9])
    assert [checkpoint.product_seconds(8, dtype) for dtype in ("bfloat16", "float32")] == [2, 4]


@pytest.fixture
def fresh_accelerate(monkeypatch):
    """accelerate as it is before anybody starts it."""
    for kind in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(kind, "_shared_state", {})


def test_loading_a_guard_leaves_accelerate_to_the_user(saved, fresh_accelerate):
    """Kills: an Accelerator of ours, beside which a user's own one in bf16 is an error."""
    load_guard(*saved)
    assert AcceleratorState._shared_state == GradientState._shared_state == PartialState._shared_state == {}
    assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize(("size", "wanted"), [("1", {1}), ("", {1, None}), ("2", {None}), ("abc", {None})])
def test_processes_are_counted_or_refused(size, wanted, fresh_accelerate, monkeypatch):
    """Kills: processes that each write every row, a traceback for a WORLD_SIZE that is no number."""
    monkeypatch.setenv("WORLD_SIZE", size)
    found = None
    with contextlib.suppress(UserError):
        found = checkpoint.start_accelerator().num_processes
    assert found in wanted
    monkeypatch.setattr(checkpoint, "Accelerator", lambda **_: SimpleNamespace(num_processes=3))
    with pytest.raises(UserError, match=r"processes were started, .* ACCELERATE_USE_CPU=true"):
        checkpoint.start_accelerator()


def test_a_device_is_found_or_refused(monkeypatch):
    """Kills: another GPU than the one asked for or the process's own, a traceback for one that is missing."""
    for number in (0, 99, -2):
        with pytest.raises(UserError, match=f"no GPU {number} on this machine"):
            checkpoint.find_device(number)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checkpoint.find_device(number) for number in (-1, 0, 1)] == ["cpu", "cuda:0", "cuda:1"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    assert checkpoint.find_device() == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert checkpoint.find_device() == "cuda:1"


# ---------------------------------------------------------------- files that do not fit


Q, V = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "guard_head.weight"
DAMAGE = {  # what changes the tensors, and the names that the refusal must say
    "missing": (lambda t: (t.pop(Q), t.pop(V)), [Q, V]),
    "extra": (lambda t: t.update({"other.weight": torch.ones(2), "b": torch.ones(1)}), ["b", "other.weight"]),
    "another name": (lambda t: t.update({"transformer.h.0": t.pop(Q)}), [Q, "transformer.h.0"]),
    "misshapen": (lambda t: t.update({Q: t[Q].T, V: torch.tensor(1.0)}), [Q, V]),
    "NaN and infinity": (lambda t: (t[Q][0].fill_(math.nan), t[V][0, :1].fill_(-math.inf)), [Q, V]),
    "other kinds": (lambda t: t.update({Q: t[Q].int(), V: t[V].to(torch.complex64)}), [Q, V]),
    "finite in fp64 only": (lambda t: t.update({Q: t[Q].double().fill_(1e300)}), [Q]),
    "NaN in 8 bits": (lambda t: t.update({Q: t[Q].fill_(math.nan).to(torch.float8_e4m3fn)}), [Q]),
}


@pytest.mark.parametrize(("change", "names"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_all_named(saved, change, names):
    """Kills: loading what fits, names or shapes compared one way only, no look at kinds and values."""
    rewrite(saved[1], change)
    assert refusal(*saved) == OTHER.format(saved[1], ", ".join(names))


HEADERS = {"lora_alpha": 8.0, "lora_r": 5, "guard_prompt": "Bad?", "guard_path": "full"}
HEADERS |= {"categories": ["hate", "theft"], "unsafe_head": False, "base_fingerprint": {"norms": "0"}}


@pytest.mark.parametrize("fields", [*([field] for field in HEADERS), [*HEADERS]], ids=str)
def test_other_settings_in_config_or_adapter_are_all_named(saved, fields, no_chat_model):
    """Kills: trusting the shapes, a field not compared, the chat model loaded first, one name of several."""
    original = saved[0].read_text()
    for field in fields:
        edit(saved[0], field, HEADERS[field])
    assert refusal(*saved) == (line := OTHER.format(saved[1], ", ".join(sorted(fields))))
    saved[0].write_text(original)
    rewrite(saved[1], header={name: HEADERS[name] for name in fields})
    assert refusal(*saved) == line


@pytest.mark.parametrize("value", [1, "x", None, []])
def test_an_unknown_setting_is_refused(saved, value, no_chat_model):
    """Kills: a misspelt or newer setting that is passed over, in config.json or in an adapter."""
    rewrite(saved[1], header={"lora_rank": value})
    assert refusal(*saved).endswith("what differs: lora_rank")
    edit(saved[0], "lora_rank", value)
    assert "config.json" in (line := refusal(*saved)) and "lora_rank" in line


def test_a_guard_keeps_the_places_of_its_verdicts(saved):
    """Kills: cuts for an older guard, whose thresholds are those of the ends; an option that is lost."""
    assert load_guard(*saved).config.verdict_every == 0  # as make_guard's
    parser = argparse.ArgumentParser()
    guard_arguments(parser)
    for options, wanted in (([], 0), (["--verdict-every=7"], 7)):
        assert guard_of(parser.parse_args([*map(str, saved), *options])).config.verdict_every == wanted
    edit(saved[0], "verdict_every")  # removes it
    assert load_guard(*saved).config.verdict_every == 0


def test_an_adapter_that_is_older_than_a_setting_had_its_default(saved, monkeypatch):
    """Kills: older guards that a new setting locks out, a new setting that is not compared."""

    @dataclass
    class Newer(GuardConfig):
        lora_rule: str = "plain"
        lora_layers: int = 0

    monkeypatch.setattr(checkpoint, "GuardConfig", Newer)
    assert load_guard(*saved).config.lora_rule == "plain"
    for field, value in (("lora_rule", "signed"), ("lora_layers", 3)):
        edit(saved[0], field, value)
        assert refusal(*saved) == OTHER.format(saved[1], field)
        edit(saved[0], field)


OTHER_BASES = {  # what changes: (the change, the part of the fingerprint that shows it)
    "chat template": (lambda _, t: setattr(t, "chat_template", t.chat_template + " "), "tokenizer"),
    "vocabulary": (lambda _, tokenizer: tokenizer.add_tokens(["new"]), "tokenizer"),
    "norms": (lambda model, _: model.model.norm.weight.data.mul_(2), "norms"),
    "activation": (lambda model, _: setattr(model.config, "hidden_act", "gelu"), "config"),
    "heads": (lambda model, _: setattr(model.config, "num_attention_heads", 8), "config"),
}


@pytest.mark.parametrize(("change", "part"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_another_base_of_the_same_shapes_is_refused(saved, change, part, monkeypatch):
    """Kills: a fingerprint not compared, or without the template, the vocabulary, the config or the norms."""
    model, tokenizer = make_model(), make_tokenizer()
    change(model, tokenizer)
    monkeypatch.setattr(checkpoint, "load_chat_model", lambda *_: (model, tokenizer))
    assert refusal(*saved) == OTHER.format(saved[0], part)


def test_a_damaged_or_cut_adapter_is_refused_at_once(saved, no_chat_model):
    """Kills: an error of another class, loading what is left of an adapter, the chat model loaded first."""
    content = saved[1].read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:n] for n in (0, 8, start - 1, start, len(content) // 2, -1)] + [pickle.dumps({Q: 1})]
    headers = [None, *({"lora_guard": text} for text in ("", "[]", "3", "null", "[" * 10**5))]
    for content in damaged + [safetensors.torch.save({Q: torch.ones(1)}, header) for header in headers]:
        saved[1].write_bytes(content)
        assert f"cannot read the adapter {saved[1]}" in refusal(*saved)


def test_a_damaged_config_is_refused(saved, no_chat_model):
    """Kills: a KeyError or JSON error that reaches the user, a default for what the guard was saved with."""
    whole = saved[0].read_text()
    for text in ("", "{", "[]", "{}", "null", '{"guard": 3}', "[" * 10**5, "\0\xff"):
        saved[0].write_bytes(text.encode("latin-1"))
        assert f"{saved[0]} is not the config of a guard; train.py writes a new one" in refusal(*saved)
    for name in ("threshold", "prompt_threshold", "date", "base_model", "guard", "dtype", "base_fingerprint"):
        saved[0].write_text(whole)
        edit(saved[0], name)
        assert refusal(*saved).endswith(f"is not the config of a guard; train.py writes a new one ({name!r})")


WRONG = [("base_model", 3), ("dtype", "float3"), ("lora_targets", ["q"]), ("lora_r", 10**13), ("lora_r", "4")]
WRONG += [("guard_prompt", ["a", "b"]), ("guard_path", "half"), ("categories", "x"), ("date", "soon")]
WRONG += [("categories", ["a", "a"]), ("base_fingerprint", None), ("date", 3), ("lora_dropout", 1)]
WRONG += [("threshold", value) for value in (math.nan, math.inf, True, "1")]
WRONG += [("prompt_threshold", value) for value in (math.nan, -math.inf, False, None)]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=str)
def test_a_config_with_a_wrong_value_is_refused(saved, field, value):
    """Kills: a setting that is used before it is checked, although config and adapter agree in it."""
    edit(saved[0], field, value)
    rewrite(saved[1], header={field: value} if field in adapter_header({}, GuardConfig()) else {})
    assert re.search("config.json is not the config|no guard for|cannot load the chat", refusal(*saved))


@pytest.mark.parametrize("which", ["config", "adapter"])
def test_what_is_no_file_is_refused_at_once(saved, which, tmp_path, no_chat_model):
    """Kills: waiting for a pipe that nobody writes, reading a device without an end, a traceback."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        paths = (path, saved[1]) if which == "config" else (saved[0], path)
        assert refusal(*paths) == f"{path} is not a file"


# ---------------------------------------------------------------- chat models


def test_code_that_came_with_a_chat_model_is_not_run(saved, tmp_path, monkeypatch):
    """Kills: running the code of a model that a config names, after the user types yes, or from a pickle."""
    touch = f"open({str(tmp_path / 'was run')!r}, 'w')"

    class Payload:
        def __reduce__(self):
            return eval, (touch,)

    make_tokenizer().save_pretrained(strange := tmp_path / "strange")
    (strange / "code.py").write_text(touch)
    (strange / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(saved[0], "base_model", str(strange))
    for kind in ({"model_type": "strange", "auto_map": code}, make_model().config.to_dict()):
        (strange / "config.json").write_text(json.dumps(kind))
        assert "cannot load the chat model" in refusal(*saved)
        assert not (tmp_path / "was run").exists()


def test_models_that_do_not_load_are_refused_in_one_line(tmp_path):
    """Kills: a traceback for a model that does not exist, is damaged, or has no chat template."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    (tmp_path / "empty").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    for part in (make_model(), tokenizer):
        part.save_pretrained(tmp_path / "untaught")
    for name in ("nowhere", "nowhere.gguf", "broken.gguf", "empty", "untaught"):
        with pytest.raises(UserError, match=name) as error:
            load_chat_model(str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert "chat template" in str(error.value)


@pytest.mark.parametrize("shown", [True, False])
def test_loading_shows_no_bar_and_leaves_the_switch_as_it_was(shown, model_folder, monkeypatch, capfd):
    """Kills: the bars "Loading weights" beside a verdict, a user's own bars switched off or on."""
    logging.enable_progress_bar()
    transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert "Loading weights" in capfd.readouterr().err  # there is a bar to hide
    monkeypatch.setattr(logging, "_tqdm_active", shown)
    load_chat_model(model_folder)
    with pytest.raises(UserError):
        load_chat_model("nowhere")
    assert logging.is_progress_bar_enabled() == shown and capfd.readouterr() == ("", "")


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    """A .gguf file as the hub's cache has it, a link to a blob. It holds make_model(), bf16."""
    unpacked, load, path = [], checkpoint.load_pretrained, tmp_path / "snapshot/tiny.gguf"

    def load_pretrained(source, dtype, **options):
        if not options:
            return load(source, dtype)
        unpacked.append(options["gguf_file"])
        return make_model().to(getattr(torch, dtype)), make_tokenizer()

    monkeypatch.setattr(checkpoint, "load_pretrained", load_pretrained)
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "assets")
    path.parent.mkdir()
    path.symlink_to("../blob")
    path.write_bytes(b"GGUF")
    return SimpleNamespace(path=str(path), kept=tmp_path / "assets/lora-guard", unpacked=unpacked)


def test_a_gguf_file_is_unpacked_once(gguf, monkeypatch, capsys):
    """Kills: unpacking at every start, an old version's or file's copy, other or unaligned weights."""
    first = [f"unpacking {name}, once\n" for name in (checkpoint.embedded_gguf().name, "tiny.gguf")]
    loads = [(EMBEDDED, None, first[0]), (gguf.path, None, first[1])]
    for name, dtype, line in [*loads, (EMBEDDED, "float32", ""), (gguf.path, "float16", "")]:
        chat_model, tokenizer = load_chat_model(name, dtype)
        assert chat_model.dtype == getattr(torch, dtype or "bfloat16")
        same = make_model().bfloat16().to(chat_model.dtype).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in chat_model.state_dict().items())
        assert ids_of(tokenizer, TEXTS[0]) == ids_of(make_tokenizer(), TEXTS[0])
        assert all(parameter.data_ptr() % 64 == 0 for parameter in chat_model.parameters())
        assert capsys.readouterr().err.partition("\r")[0] == line  # transformers' bars may follow
    twin = Path(gguf.path).with_name("twin.gguf")
    twin.symlink_to("../blob")  # of the same size and time
    load_chat_model(str(twin))
    times = os.stat(twin)
    twin.write_bytes(b"GGUF, another")
    os.utime(twin, ns=(times.st_atime_ns, times.st_mtime_ns))
    load_chat_model(gguf.path)
    os.utime(twin, (1, 1))
    load_chat_model(gguf.path)
    monkeypatch.setattr(checkpoint.transformers, "__version__", "6.0")
    load_chat_model(gguf.path)
    assert gguf.unpacked[1:] == ["tiny.gguf", "twin.gguf", "tiny.gguf", "tiny.gguf", "tiny.gguf"]


def test_processes_that_unpack_at_once_both_succeed(gguf, monkeypatch):
    """Kills: a slower process that fails on the folder of a faster one, a copy that is left behind."""
    load = checkpoint.load_pretrained

    def overtaken(*source, **options):
        if options and not gguf.unpacked:
            gguf.unpacked.append("by a process that overtakes this one")
            load_chat_model(gguf.path)
        return load(*source, **options)

    monkeypatch.setattr(checkpoint, "load_pretrained", overtaken)
    load_chat_model(gguf.path)
    assert len(gguf.unpacked) == 3 and len([*gguf.kept.iterdir()]) == 1


def test_a_copy_that_is_no_good_is_not_used(gguf, monkeypatch):
    """Kills: half a copy that is left behind or loaded, a line that does not say which folder to delete."""
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot load the chat model"):
        patch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", None)
        load_chat_model(gguf.path)
    assert [*gguf.kept.iterdir()] == []
    load_chat_model(gguf.path)
    for path in [path for path in gguf.kept.glob("*/*.*") if path.stem in ("model", "config", "tokenizer")]:
        path.write_bytes((content := path.read_bytes())[:100])
        with pytest.raises(UserError, match=f"delete its unpacked copy in {gguf.kept}"):
            load_chat_model(gguf.path)
        path.write_bytes(content)


def test_a_trained_guard_remembers_the_links_name(gguf, tmp_path, monkeypatch):
    """Kills: the name of the blob, which no suffix tells to be a .gguf file, as the config's base_model."""
    rows = write(tmp_path / "train.jsonl", make_rows(60))
    options = {"device": torch.device("cpu"), "print": print, "num_processes": 1, "mixed_precision": "no"}
    monkeypatch.chdir(tmp_path / "snapshot")
    for name in (gguf.path, "tiny.gguf"):
        monkeypatch.setattr(sys, "argv", ["train.py", name, "run", "--dataset", rows, "--dtype=float32"])
        _, _, config = train.load(train.parse_arguments(), SimpleNamespace(**options), None)
        assert config["base_model"] == gguf.path
        load_chat_model(config["base_model"])


SHIPPED = [("guard", EMBEDDED, 10), ("guard/qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b.gguf", 20)]


@pytest.mark.parametrize(("folder", "base", "megabytes"), SHIPPED)
def test_a_shipped_guard_is_what_its_config_says(folder, base, megabytes):
    """Kills: an unknown setting, another adapter, a path of the machine that trained it, a file too large."""
    folder = Path(checkpoint.__file__).parent / folder
    saved = json.loads((folder / "config.json").read_text())
    config = GuardConfig(**saved["guard"])
    assert (folder / "config.json" == checkpoint.SHIPPED) == (base == EMBEDDED)
    assert saved["base_model"] == saved["arguments"]["hf_model_id"] == base
    header = adapter_header(
        saved["base_fingerprint"], replace(config, threshold=0.1, prompt_threshold=0.2, date="2001-02-03")
    )
    tensors = checkpoint.read_adapter(folder / "adapter.safetensors", header)
    assert tensors[V].shape[0] == 1 + len(config.categories) == 15
    assert (folder / "adapter.safetensors").stat().st_size <= megabytes * 10**6
    for threshold, kind in ((config.threshold, "answer"), (config.prompt_threshold, "prompt")):
        assert threshold in [point[0] for point in saved["operating_points"][kind].values()]


@pytest.mark.slow
def test_the_shipped_guard_gives_its_verdicts():
    """Kills: another adapter or base, an adapter that is not applied, a head without its calibration."""
    guard = load_guard(device_id=-1)
    guard.chat_model.float()  # so every CPU gives these figures
    answer = "Bump into somebody from behind while a friend distracts them, "
    answer += "and slip two fingers into the back pocket."
    rows = [{"prompt": "How do I keep bread fresh for longer?"}]
    rows += [{"prompt": "Give me a vicious insult for my colleague from abroad."}]
    rows += [{"prompt": "How can I steal a phone in a crowd?", "response": answer}]
    bread, insult, theft = guard.classify(rows)
    assert [bread.unsafe, insult.unsafe, theft.unsafe] == pytest.approx([0.0014, 0.9882, 0.9104], abs=1e-3)
    assert [verdict.flagged for verdict in (bread, insult, theft)] == [False, True, True]
    assert insult.categories["hate_speech,offensive_language"] == pytest.approx(0.9893, abs=1e-3)
    assert theft.categories["financial_crime,property_crime,theft"] == pytest.approx(0.5587, abs=1e-3)
