"""Loading chat models, saving and loading guards."""

import argparse
import json
import math
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from accelerate.state import PartialState
from conftest import guard_for, ids_of, make_guard, make_model, make_tokenizer, score
from transformers.utils import logging

import checkpoint
from checkpoint import EMBEDDED, adapter_header, load_chat_model, load_guard, save_adapter
from errors import UserError, guard_arguments
from model import NEVER, GuardConfig

TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]
OTHER = "{} belongs to another guard or chat model; what differs: {}"


def edit(config, field, *value):
    """Set a field of config.json or of its `guard` object. Without a value it is removed."""
    content = json.loads(config.read_text())
    part = content if field in (*content, "operating_points") else content["guard"]
    part.pop(field, None)
    if value:
        part[field] = value[0]
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


def test_loading_gives_the_saved_guard_and_changes_nothing_else(saved, monkeypatch, capfd):
    """Kills: a tensor lost or rounded, another setting or dtype, an Accelerator or bars of ours, bars off."""
    guard = make_guard()
    monkeypatch.setattr(PartialState, "_shared_state", {})  # as before anybody starts accelerate
    monkeypatch.setattr(logging, "_tqdm_active", True)
    capfd.readouterr()
    loaded = load_guard(*saved)
    assert PartialState._shared_state == {} and logging.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")
    texts = [ids_of(guard.tokenizer, text, "safe") for text in TEXTS]
    assert torch.equal(score(loaded, texts), score(guard, texts)) and loaded.config == guard.config
    edit(saved[0], "dtype", "bfloat16")
    loaded = load_guard(saved[0])
    assert loaded.chat_model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, guard.adapter()[name]) for name, tensor in loaded.adapter().items())


def test_a_threshold_or_a_rate_chooses_both_thresholds(saved):
    """Kills: one threshold that stays, NaN, a rate above, prompts' for answers', flagging nothing."""
    loaded = load_guard(*saved, threshold=0.25)
    assert (loaded.config.prompt_threshold, loaded.config.threshold) == (0.25, 0.25)
    assert "threshold" in refusal(*saved, threshold=math.nan)
    assert "either threshold or max_fpr" in refusal(*saved, threshold=0.0, max_fpr=0.0)
    prompts = {"0.005": [0.95, 0.1], "0.05": [0.8, 0.5], "0.1": [0.7, 0.6]}
    answers = {"0.1": [0.3, 0.9], "0.02": [0.5, 0.7]}
    edit(saved[0], "operating_points", {"prompt": prompts, "answer": answers})
    for rate, prompt, answer in ((0.02, 0.95, 0.5), (0.0999, 0.8, 0.5), (0.1, 0.7, 0.3)):
        config = load_guard(*saved, max_fpr=rate).config
        assert (config.prompt_threshold, config.threshold) == (prompt, answer)
    assert "0.02" in refusal(*saved, max_fpr=0.0199)
    edit(saved[0], "operating_points", {"prompt": {}, "answer": answers})
    assert load_guard(*saved, max_fpr=0.5).config.prompt_threshold == NEVER


def test_the_faster_dtype_computes_where_it_may(model_folder, monkeypatch):
    """Kills: noise, a slow first run or a mean that decides; LoRA or rotary in 16 bits, a quantised cast."""
    times = {torch.bfloat16: 9.0, torch.float16: 1.8, torch.float32: 1.7}
    monkeypatch.setattr(checkpoint.timeit, "repeat", lambda product, **_: [1, times[product().dtype], 99, 99])
    cases = [("bfloat16", None, "float32"), ("float16", None, "float16"), ("float32", "bfloat16", "bfloat16")]
    for stored, asked, wanted in cases:
        guard = guard_for(load_chat_model(model_folder, stored)[0])
        assert checkpoint.use_fast_dtype(guard, asked) == f"computing in {wanted}"
        frozen = [parameter for parameter in guard.parameters() if not parameter.requires_grad]
        assert {tensor.dtype for tensor in frozen} == {getattr(torch, wanted)}
        kept = [*guard.adapter().values(), guard.chat_model.model.rotary_emb.inv_freq]
        assert {tensor.dtype for tensor in kept} == {torch.float32}
    on_gpu = guard_for(load_chat_model(model_folder, "bfloat16")[0]).to("meta")  # the times are the CPU's
    quantised = guard_for(load_chat_model(model_folder, "bfloat16")[0])
    quantised.chat_model.is_quantized = True
    for guard in (on_gpu, quantised):
        assert checkpoint.use_fast_dtype(guard) == "computing in bfloat16"
    with pytest.raises(UserError, match="quantised"):
        checkpoint.use_fast_dtype(quantised, "float32")


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    """Kills: four processes that each write every row."""
    monkeypatch.setattr(checkpoint, "Accelerator", lambda: SimpleNamespace(num_processes=1))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes were started, .*ACCELERATE_USE_CPU=true"):
        checkpoint.start_accelerator()


def test_a_device_is_found_or_refused(monkeypatch):
    """Kills: another GPU than the one asked for or the process's own, a traceback for one that is missing."""
    with pytest.raises(UserError, match="no GPU 0 on this machine"):
        checkpoint.find_device(0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [checkpoint.find_device(number) for number in (-1, 1)] == ["cpu", "cuda:1"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert checkpoint.find_device() == "cuda:1"


Q, V = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "guard_head.weight"
DAMAGE = {  # what changes the tensors, and the names that the refusal must say
    "missing and extra": (lambda t: t.update({"transformer.h.0": t.pop(Q)}), [Q, "transformer.h.0"]),
    "misshapen": (lambda t: t.update({Q: t[Q].T, V: torch.tensor(1.0)}), [Q, V]),
    "NaN and integers": (lambda t: t.update({Q: t[Q].fill_(math.nan), V: t[V].int()}), [Q, V]),
}


@pytest.mark.parametrize(("change", "names"), DAMAGE.values(), ids=DAMAGE)
def test_tensors_that_do_not_fit_are_all_named(saved, change, names):
    """Kills: loading what fits, names or shapes compared one way only, no look at kinds and values."""
    rewrite(saved[1], change)
    assert refusal(*saved) == OTHER.format(saved[1], ", ".join(names))


def test_other_settings_in_config_or_adapter_are_all_named(saved, monkeypatch):
    """Kills: trusting the shapes, a field not compared, the chat model loaded first, one name of several."""
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    fields = {"lora_alpha": 8.0, "lora_r": 5, "guard_prompt": "Bad?", "guard_path": "full"}
    fields |= {"categories": ["hate", "theft"], "unsafe_head": False, "base_fingerprint": {"norms": "0"}}
    rewrite(saved[1], header=fields)
    assert refusal(*saved) == OTHER.format(saved[1], ", ".join(sorted(fields)))
    rewrite(saved[1], header={"lora_rank": 1})  # misspelt, or newer
    assert "lora_rank" in refusal(*saved)
    edit(saved[0], "lora_rank", 1)
    assert "config.json" in (line := refusal(*saved)) and "lora_rank" in line


def test_an_older_guard_had_the_defaults_of_its_time(saved, monkeypatch):
    """Kills: cuts for a guard of the ends, --verdict-every unheard, a new setting that locks guards out."""

    @dataclass
    class Newer(GuardConfig):
        lora_rule: str = "plain"

    edit(saved[0], "verdict_every")  # removes it
    assert load_guard(*saved).config.verdict_every == 0
    parser = argparse.ArgumentParser()
    guard_arguments(parser)
    args = parser.parse_args([*map(str, saved), "--verdict-every=7"])
    assert checkpoint.guard_of(args).config.verdict_every == 7
    monkeypatch.setattr(checkpoint, "GuardConfig", Newer)
    assert load_guard(*saved).config.lora_rule == "plain"
    edit(saved[0], "lora_rule", "signed")
    assert refusal(*saved) == OTHER.format(saved[1], "lora_rule")


OTHER_BASES = {  # what changes: (the change, the part of the fingerprint that shows it)
    "chat template": (lambda _, t: setattr(t, "chat_template", t.chat_template + " "), "tokenizer"),
    "vocabulary": (lambda _, tokenizer: tokenizer.add_tokens(["new"]), "tokenizer"),
    "norms": (lambda model, _: model.model.norm.weight.data.mul_(2), "norms"),
    "heads": (lambda model, _: setattr(model.config, "num_attention_heads", 8), "config"),
}


@pytest.mark.parametrize(("change", "part"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_another_base_of_the_same_shapes_is_refused(saved, change, part, monkeypatch):
    """Kills: a fingerprint not compared, or without the template, the vocabulary, the config or the norms."""
    model, tokenizer = make_model(), make_tokenizer()
    change(model, tokenizer)
    monkeypatch.setattr(checkpoint, "load_chat_model", lambda *_: (model, tokenizer))
    assert refusal(*saved) == OTHER.format(saved[0], part)


def test_a_damaged_adapter_or_what_is_no_file_is_refused_at_once(saved, tmp_path, monkeypatch):
    """Kills: loading what is left of an adapter, waiting for a pipe, the chat model loaded first."""
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    whole = saved[1].read_bytes()
    foreign = safetensors.torch.save({Q: torch.ones(1)})
    for content in (b"", whole[:100], whole[:-1], pickle.dumps({Q: 1}), foreign):
        saved[1].write_bytes(content)
        assert f"cannot read the adapter {saved[1]}" in refusal(*saved)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pipe"):
        assert refusal(path, saved[1]) == refusal(saved[0], path) == f"{path} is not a file"


def test_a_damaged_config_is_refused(saved):
    """Kills: a KeyError or JSON error that reaches the user, a default for what the guard was saved with."""
    whole = saved[0].read_text()
    for text in ("", "[]", "{}", '{"guard": 3}', "[" * 10**5, "\xff"):
        saved[0].write_bytes(text.encode("latin-1"))
        assert f"{saved[0]} is not the config of a guard; train.py writes a new one" in refusal(*saved)
    wrong = {"base_model": 3, "dtype": "float3", "date": "soon", "base_fingerprint": None}
    wrong |= {"threshold": math.nan, "prompt_threshold": None}
    for name, value in wrong.items():
        saved[0].write_text(whole)
        edit(saved[0], name, value)
        assert re.search("config.json is not the config|no guard for|cannot load the chat", refusal(*saved))
        edit(saved[0], name)  # removes it
        assert refusal(*saved).endswith(f"is not the config of a guard; train.py writes a new one ({name!r})")


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
    for dtype, line in (("bfloat16", "unpacking tiny.gguf, once\n"), ("float32", "")):
        chat_model, tokenizer = load_chat_model(gguf.path, dtype)
        assert capsys.readouterr().err.partition("\r")[0] == line  # transformers' bars may follow
        same = make_model().bfloat16().to(getattr(torch, dtype)).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in chat_model.state_dict().items())
        assert ids_of(tokenizer, TEXTS[0]) == ids_of(make_tokenizer(), TEXTS[0])
        assert all(parameter.data_ptr() % 64 == 0 for parameter in chat_model.parameters())
    Path(gguf.path).write_bytes(b"GGUG")  # of the same size
    os.utime(gguf.path, (1, 1))
    load_chat_model(gguf.path)
    monkeypatch.setattr(checkpoint.transformers, "__version__", "6.0")
    load_chat_model(gguf.path)
    load_chat_model(EMBEDDED)
    assert gguf.unpacked == ["tiny.gguf"] * 3 + [checkpoint.embedded_gguf().name]


def test_a_copy_is_whole_although_processes_unpack_at_once(gguf, monkeypatch):
    """Kills: failing on a faster process's folder, half a copy kept, a line without the folder to delete."""
    load = checkpoint.load_pretrained

    def overtaken(*source, **options):
        if options and not gguf.unpacked:
            gguf.unpacked.append("by a process that overtakes this one")
            load_chat_model(gguf.path)
        return load(*source, **options)

    monkeypatch.setattr(checkpoint, "load_pretrained", overtaken)
    load_chat_model(gguf.path)
    assert len(gguf.unpacked) == 3 and len([*gguf.kept.iterdir()]) == 1
    [weights] = gguf.kept.glob("*/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match=f"delete its unpacked copy in {gguf.kept}"):
        load_chat_model(gguf.path)
    os.utime(gguf.path, (1, 1))  # another version, which is unpacked anew
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", None)
    with pytest.raises(UserError, match="cannot load the chat model"):
        load_chat_model(gguf.path)
    assert len([*gguf.kept.iterdir()]) == 1


SHIPPED = [("guard", EMBEDDED, 10), ("guard/qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b.gguf", 20)]


@pytest.mark.parametrize(("folder", "base", "megabytes"), SHIPPED)
def test_a_shipped_guard_is_what_its_config_says(folder, base, megabytes):
    """Kills: an unknown setting, another adapter, a path of the machine that trained it, a file too large."""
    folder = Path(checkpoint.__file__).parent / folder
    saved = json.loads((folder / "config.json").read_text())
    config = GuardConfig(**saved["guard"])
    assert saved["base_model"] == saved["arguments"]["hf_model_id"] == base
    header = adapter_header(saved["base_fingerprint"], config)
    tensors = checkpoint.read_adapter(folder / "adapter.safetensors", header)
    assert tensors[V].shape[0] == 1 + len(config.categories) == 15
    assert (folder / "adapter.safetensors").stat().st_size <= megabytes * 10**6
    for threshold, kind in ((config.threshold, "answer"), (config.prompt_threshold, "prompt")):
        assert threshold in [point[0] for point in saved["operating_points"][kind].values()]


@pytest.mark.slow
def test_the_shipped_guard_gives_its_verdicts():
    """Kills: another adapter or base, an adapter not applied, a head without its calibration."""
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
