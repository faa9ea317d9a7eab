"""Loading chat models, saving and loading guards. Each test names the mutations that it kills."""

import json
import math
import os
import pickle
import random
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import ids_of, make_guard, make_model, make_tokenizer

import checkpoint
import common
from checkpoint import (
    EMBEDDED,
    adapter_header,
    fingerprint,
    load_chat_model,
    load_guard,
    save_adapter,
    use_fast_dtype,
)
from common import UserError, write_whole
from model import GuardConfig

TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]


def score(guard):
    return guard.score([ids_of(guard.tokenizer, text, "safe") for text in TEXTS])


def save(guard, folder, model_folder):
    """Write config.json and adapter.safetensors as train.py does, and return both paths."""
    base = fingerprint(guard.chat_model, guard.tokenizer)
    config = {"base_model": model_folder, "dtype": "float32", "base_fingerprint": base}
    (folder / "config.json").write_text(json.dumps(config | {"guard": asdict(guard.config)}))
    save_adapter(folder / "adapter.safetensors", guard.adapter(), adapter_header(base, guard.config))
    return folder / "config.json", folder / "adapter.safetensors"


@pytest.fixture
def saved(tmp_path, model_folder):
    """(guard, config path, adapter path) of a guard whose base model is a local folder."""
    guard = make_guard(prompt_threshold=0.9)
    return guard, *save(guard, tmp_path, model_folder)


def edit(config, field, value):
    """Set a field of config.json, or of its `guard` object."""
    content = json.loads(config.read_text())
    (content if field in content else content["guard"])[field] = value
    config.write_text(json.dumps(content))


def rewrite(path, change):
    """Save the adapter's tensors again after `change(tensors)`, with the same header."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def refusal(*paths):
    """The line that load_guard refuses these files with."""
    with pytest.raises(UserError) as error:
        load_guard(*paths, device_id=-1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    return str(error.value)


# ---------------------------------------------------------------------------
# A guard that is saved and loaded


def test_save_and_load_give_equal_scores_and_equal_bytes(saved, tmp_path):
    """Kills: a tensor that is not saved or not loaded, one saved in less precision, metadata in no fixed
    order."""
    guard, config, adapter = saved
    loaded = load_guard(config, adapter)
    assert torch.equal(score(loaded), score(guard))
    assert loaded.config == guard.config and loaded.config.prompt_threshold == 0.9
    header = adapter_header(json.loads(config.read_text())["base_fingerprint"], loaded.config)
    save_adapter(tmp_path / "again.safetensors", loaded.adapter(), header)
    assert (tmp_path / "again.safetensors").read_bytes() == adapter.read_bytes()


def test_threshold_argument_replaces_both(saved):
    """Kills: an argument that replaces one threshold, or none; NaN, from which nothing is ever flagged."""
    loaded = load_guard(saved[1], threshold=0.25)
    assert (loaded.config.prompt_threshold, loaded.config.threshold) == (0.25, 0.25)
    with pytest.raises(UserError, match="threshold must be a number"):
        load_guard(saved[1], threshold=math.nan)


@pytest.mark.parametrize("guard_path", ["activated", "full"])
def test_a_loaded_adapter_is_the_saved_one_on_any_base(tmp_path, model_folder, guard_path):
    """Kills: LoRA or a head that is rounded to 16 bits, which is not what validation scored."""
    config, adapter = save(make_guard(guard_path=guard_path), tmp_path, model_folder)
    edit(config, "dtype", "bfloat16")
    loaded, saved = load_guard(config, adapter), safetensors.torch.load_file(adapter)
    assert loaded.chat_model.dtype == torch.bfloat16
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.adapter().items())


def test_a_threshold_and_a_rate_exclude_each_other(tmp_path, model_folder):
    """Kills: one of the two that is not heard."""
    config, adapter = save(make_guard(), tmp_path, model_folder)
    with pytest.raises(UserError, match="either threshold or max_fpr"):
        load_guard(config, adapter, threshold=0.0, max_fpr=0.05)


def test_only_adapters_and_head_are_saved_under_pefts_names(saved):
    """Kills: saving the base, and names that other tools cannot read."""
    tensors = safetensors.torch.load_file(saved[2])
    layers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"]
    layers += [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up", "down")]
    wanted = {f"base_model.model.{layer}.lora_{matrix}.weight" for layer in layers for matrix in "AB"}
    assert set(tensors) == wanted | {"guard_head.weight", "guard_head.bias"}


# ---------------------------------------------------------------------------
# The dtype of the computation


@pytest.mark.parametrize(
    ("stored", "times", "asked", "wanted"),
    [
        (torch.bfloat16, {"bfloat16": 9.0, "float32": 2.0}, None, torch.float32),
        (torch.bfloat16, {"bfloat16": 2.0, "float32": 9.0}, None, torch.bfloat16),
        (torch.float16, {"float16": 2.0, "float32": 1.9}, None, torch.float16),  # too close to tell
        (torch.float16, {"float16": 1.0, "float32": 9.0}, "float32", torch.float32),
        (torch.float32, {}, "bfloat16", torch.bfloat16),
        (torch.float64, {}, None, torch.float64),
    ],
)
def test_the_faster_dtype_computes(stored, times, asked, wanted, monkeypatch):
    """Kills: no change, a change on every CPU, a difference of noise that decides, a wider type that is made
    narrower, --dtype that is not heard, LoRA that is cast, too, so Adam would learn in 16 bits."""
    monkeypatch.setattr(checkpoint, "product_milliseconds", lambda _, dtype: times[dtype])
    guard = make_guard()
    guard.chat_model.to(stored)
    before = {name: tensor.clone() for name, tensor in guard.chat_model.state_dict().items()}
    line = use_fast_dtype(guard, asked)
    assert f"computing in {str(wanted)[6:]}" in line and all(
        str(t) in line for t in times.values() if not asked
    )
    for name, tensor in guard.chat_model.state_dict().items():
        dtype = stored if "lora_" in name else wanted
        assert tensor.dtype == dtype and torch.equal(tensor, before[name].to(dtype))


def test_a_product_is_timed_in_both_dtypes():
    """Kills: a time that is not one of the dtype, or longer than the 20 ms that a start may cost."""
    guard = make_guard()
    assert all(0 < checkpoint.product_milliseconds(guard, dtype) < 1000 for dtype in ("bfloat16", "float32"))


def test_16_bits_stay_on_a_gpu():
    """Kills: timing the CPU although another device computes."""
    guard = make_guard().to(torch.bfloat16).to("meta")
    use_fast_dtype(guard)
    assert guard.chat_model.dtype == torch.bfloat16


# ---------------------------------------------------------------------------
# An adapter that does not fit


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
V = "guard_head.weight"
FOREIGN = "transformer.h.0.lora_A.weight"
DAMAGE = {
    "missing": (lambda tensors: tensors.pop(Q), Q),
    "extra": (lambda tensors: tensors.update({"other.weight": torch.ones(2)}), "other.weight"),
    "misshapen": (lambda tensors: tensors.update({Q: torch.ones(4, 31)}), Q),
    "transposed": (lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}), Q),
    "foreign": (lambda tensors: tensors.update({FOREIGN: tensors.pop(Q)}), FOREIGN),
    "foreign, where the name is missing": (lambda tensors: tensors.update({FOREIGN: tensors.pop(Q)}), Q),
    "not finite": (lambda tensors: tensors[Q][0].fill_(float("nan")), Q),
    "infinite": (lambda tensors: tensors[Q][0, :1].fill_(float("inf")), Q),
    "not numbers": (lambda tensors: tensors.update({Q: tensors[Q].int()}), Q),
    "finite in fp64 only": (lambda tensors: tensors.update({Q: tensors[Q].double().fill_(1e300)}), Q),
    "a head in less precision": (lambda tensors: tensors.update({V: tensors[V].bfloat16()}), V),
    "in a type that few operations know": (lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}), Q),
}


@pytest.mark.parametrize("change, named", DAMAGE.values(), ids=DAMAGE)
def test_adapter_that_does_not_fit_is_refused_by_name(saved, change, named):
    """Kills: loading what fits and skipping the rest, names or shapes that are compared one way only, no look
    at the dtype or at the values."""
    _, config, adapter = saved
    rewrite(adapter, change)
    line = refusal(config, adapter)
    assert named in line and str(adapter) in line


@pytest.mark.parametrize(
    "field, value",
    [
        ("lora_alpha", 8.0),
        ("guard_prompt", "Bad?"),
        ("categories", ["hate", "theft"]),
        ("guard_path", "full"),
        ("base_fingerprint", {"config": "0", "tokenizer": "0", "norms": "0"}),
    ],
)
def test_adapter_with_other_settings_is_refused_by_field(saved, field, value, monkeypatch):
    """Kills: trusting the shapes, which are the same here; loading the chat model first."""
    edit(saved[1], field, value)
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    assert f"belongs to another guard or chat model; what differs: {field}" in refusal(*saved[1:])


def test_thresholds_are_not_part_of_what_an_adapter_fits(saved):
    """Kills: an adapter that a user cannot use any more after another threshold was written into
    config.json."""
    edit(saved[1], "threshold", 0.125)
    assert load_guard(*saved[1:], device_id=-1).config.threshold == 0.125


def other_template(_, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")


OTHER_BASES = {  # what changes: (the change, the part of the fingerprint that shows it)
    "chat template": (other_template, "tokenizer"),
    "vocabulary": (lambda _, tokenizer: tokenizer.add_tokens(["new"]), "tokenizer"),
    "norms": (lambda model, _: model.model.norm.weight.data.mul_(2), "norms"),
    "activation": (lambda model, _: setattr(model.config, "hidden_act", "gelu"), "config"),
    "heads": (lambda model, _: setattr(model.config, "num_attention_heads", 8), "config"),
}


@pytest.mark.parametrize("change, part", OTHER_BASES.values(), ids=OTHER_BASES)
def test_another_base_of_the_same_shapes_is_refused(saved, change, part, monkeypatch):
    """Kills: a fingerprint that is not compared, or that lacks the template, the vocabulary, the config or
    the norms."""
    model, tokenizer = make_model(), make_tokenizer()
    change(model, tokenizer)
    monkeypatch.setattr(checkpoint, "load_chat_model", lambda *_: (model, tokenizer))
    assert refusal(*saved[1:]).endswith(f"what differs: base_fingerprint.{part}")


def claims(header, size=0):
    """A safetensors file that has this header, then `size` bytes."""
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
    "settings of another kind": [
        claims({"__metadata__": {"lora_guard": text}}) for text in ("", "[]", "3", "null")
    ],
    "a pickle": [pickle.dumps({Q: 1})],
}


@pytest.mark.parametrize("contents", STRANGE.values(), ids=STRANGE)
def test_strange_adapter_is_refused_at_once(saved, contents, monkeypatch):
    """Kills: an error of another class, loading the chat model first."""
    _, config, adapter = saved
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    for content in contents:
        adapter.write_bytes(content)
        assert "adapter.safetensors" in refusal(config, adapter)


def test_adapter_of_strange_numbers_is_refused_at_once(saved, monkeypatch):
    """Kills: loading the chat model before the values are checked."""
    rewrite(saved[2], DAMAGE["not finite"][0])
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    assert "not finite numbers" in refusal(*saved[1:])


def test_adapter_that_is_cut_anywhere_is_refused(saved, monkeypatch):
    """Kills: loading what is left, and an error of another class."""
    _, config, adapter = saved
    content = adapter.read_bytes()
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    header = 8 + int.from_bytes(content[:8], "little")
    with open(adapter, "r+b") as file:
        for length in [*range(len(content) - 1, header, -101), *range(header, -1, -1)]:
            file.truncate(length)
            assert "cannot read the adapter" in refusal(config, adapter)


# ---------------------------------------------------------------------------
# A config that does not fit


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        "null",
        '{"base_model": 3}',
        '{"guard": 3}',
        "\x00\x01",
        "[" * 100_000,
        "\xff" * 100_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_damaged_config_is_refused(saved, text):
    """Kills: a KeyError or JSON error that reaches the user."""
    saved[1].write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(*saved[1:])


@pytest.mark.parametrize(
    "field, value",
    [
        ("lora_r", "4"),
        ("lora_r", 10**13),
        ("base_model", 3),
        ("dtype", "float3"),
        ("guard_prompt", None),
        ("threshold", "high"),
        ("threshold", math.nan),
        ("prompt_threshold", None),
        ("guard_path", "half"),
        ("categories", "x"),
        ("categories", ["theft", "theft"]),
        ("categories", [["theft"], ["hate"]]),
        ("guard_prompt", ["a", "b"]),
        ("lora_targets", ["q"]),
        ("base_fingerprint", {"config": "0"}),
        ("base_fingerprint", None),
    ],
)
def test_config_with_a_wrong_value_is_refused(saved, field, value):
    """Kills: a setting that is used before it is checked, an adapter that does not say what it was trained
    with."""
    guard, config, adapter = saved
    edit(config, field, value)
    named = (
        "config.json",
        field,
        field.replace("_", " "),
        "cannot load the chat model",
        "LoRA rank",
        "LoRA target",
    )
    assert any(name in refusal(config, adapter) for name in named)
    base = fingerprint(guard.chat_model, guard.tokenizer)
    header = {"base_fingerprint": base, **asdict(guard.config), field: value}  # the same in both files
    header = {name: header[name] for name in adapter_header(base, guard.config)}
    save_adapter(adapter, guard.adapter(), header)
    assert any(name in refusal(config, adapter) for name in named)


def test_unknown_setting_in_a_config_is_refused(saved):
    """Kills: a misspelt setting that leaves the default in place."""
    edit(saved[1], "lora_rank", 8)
    assert "config.json" in (line := refusal(*saved[1:])) and "lora_rank" in line


def test_config_of_an_older_version_is_refused(saved, monkeypatch):
    """Kills: a guard read without its calibration, whose probabilities would be wrong; a line that does not
    say what to do."""
    _, config, adapter = saved
    old = json.loads(config.read_text())
    old |= old.pop("guard") | {"calibration": {"shift": [0.5, -1.0, 2.0], "temperature": [2.0, 0.5, 1.0]}}
    config.write_text(json.dumps(old))
    monkeypatch.setattr(checkpoint, "load_chat_model", None)
    line = refusal(config, adapter)
    assert str(config) in line and "train.py writes" in line
    monkeypatch.setattr(sys, "argv", ["moderate.py"])
    with pytest.raises(SystemExit) as left:
        common.run(lambda: load_guard(config, adapter))
    assert left.value.code == 2


# ---------------------------------------------------------------------------
# Chat models


def test_chat_model_that_is_code_is_refused_and_not_run(saved, tmp_path, monkeypatch):
    """Kills: running the code of a model that a config names, after the user types yes, or from a pickle."""
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
    edit(config, "base_model", str(strange))
    for kind in kinds:
        (strange / "config.json").write_text(json.dumps(kind))
        assert "cannot load the chat model" in refusal(config, adapter)
        assert not (tmp_path / "was run").exists()


def test_models_that_do_not_load_are_refused_in_one_line(tmp_path):
    """Kills: a traceback for a model that does not exist, is damaged, or has no chat template."""
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or not")
    (tmp_path / "empty").mkdir()
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_model().save_pretrained(tmp_path / "untaught")
    tokenizer.save_pretrained(tmp_path / "untaught")
    names = ["nowhere", "nowhere.gguf", "broken.gguf", "empty", "untaught"]
    for name in ["no/such-model", *(str(tmp_path / name) for name in names)]:
        with pytest.raises(UserError) as error:
            load_chat_model(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert "chat template" in str(error.value)


def test_loading_shows_no_progress_bar(model_folder, capfd):
    """Kills: the bars "Loading weights" beside a verdict, and no bar for a download either."""
    transformers.utils.logging.enable_progress_bar()
    transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert "Loading weights" in capfd.readouterr().err  # there is a bar to hide
    load_chat_model(model_folder)
    assert capfd.readouterr() == ("", "")
    assert not checkpoint.huggingface_hub.utils.are_progress_bars_disabled()


# ---------------------------------------------------------------------------
# The unpacked model that is kept


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """The dtypes that .gguf files were unpacked to: make_model(), kept in tmp_path/assets."""
    dtypes, load = [], checkpoint.load_pretrained

    def spy(source, file, **options):
        if not file:
            return load(source, file, **options)
        dtypes.append(options["dtype"])
        print("Converting and de-quantizing: 100%", file=sys.stderr)  # as transformers' bar
        return make_model().to(getattr(torch, options["dtype"])), make_tokenizer()

    monkeypatch.setattr(checkpoint, "load_pretrained", spy)
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "assets")
    return dtypes


def kept_folders(tmp_path):
    return list((tmp_path / "assets/lora-guard").iterdir())


def test_gguf_file_is_unpacked_once(tmp_path, monkeypatch, unpacked):
    """Kills: unpacking at every start, one dtype, version or file in place of another, weights that are not
    aligned."""
    other = tmp_path / "SmolLM2.gguf"
    other.write_bytes(b"GGUF")
    bf16, fp32 = (EMBEDDED, None), (EMBEDDED, "float32")
    for name, dtype in (bf16, fp32, bf16, fp32, (other, None), (other, None)):
        chat_model, tokenizer = load_chat_model(name, dtype)
        assert chat_model.dtype == getattr(torch, dtype or "bfloat16")
        same = make_model().to(chat_model.dtype).state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in chat_model.state_dict().items())
        assert ids_of(tokenizer, TEXTS[0]) == ids_of(make_tokenizer(), TEXTS[0])
        assert all(parameter.data_ptr() % 64 == 0 for parameter in chat_model.parameters())
    assert unpacked == ["bfloat16", "float32", "bfloat16"] and len(kept_folders(tmp_path)) == 3
    twin = tmp_path / "twin.gguf"
    shutil.copy2(other, twin)  # of the same size and time
    load_chat_model(twin)
    other.write_bytes(b"GGUF, another")
    load_chat_model(other)
    monkeypatch.setattr(checkpoint.transformers, "__version__", "6.0")
    load_chat_model(other)
    assert len(unpacked) == 6


def test_unpacking_says_one_line(unpacked, capsys):
    """Kills: a slow start that says nothing, a bar that is not ours, a line at every start."""
    load_chat_model(EMBEDDED)
    output, error = capsys.readouterr()
    assert output == "" and error.endswith(".gguf, once\n") and error.count("\n") == 1
    load_chat_model(EMBEDDED)
    assert capsys.readouterr() == ("", "")


def test_unpacked_model_that_cannot_be_kept_is_used(tmp_path, monkeypatch, unpacked):
    """Kills: a folder that must be writable, what is left of a copy that failed."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "file")
    load_chat_model(EMBEDDED)
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path / "assets")

    def full(*_):
        raise Exception("disk full")  # tokenizers raises no narrower class

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)
    load_chat_model(EMBEDDED)
    assert len(unpacked) == 2 and kept_folders(tmp_path) == []


DAMAGES = {
    "cut weights": ("*.safetensors", lambda path: os.truncate(path, 1000)),
    "no config": ("config.json", Path.unlink),
    "no tokenizer": ("tokenizer*.json", Path.unlink),
}


@pytest.mark.parametrize("pattern, damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_kept_model_is_named(tmp_path, unpacked, pattern, damage):
    """Kills: a line that does not say which folder to delete; a model that is loaded partly."""
    load_chat_model(EMBEDDED)
    [kept] = kept_folders(tmp_path)
    for path in kept.glob(pattern):
        damage(path)
    with pytest.raises(UserError) as error:
        load_chat_model(EMBEDDED)
    assert f"unpacked copy in {kept.parent}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_kept_copy_of_the_embedded_model_is_the_model(tmp_path, monkeypatch, capfd):
    """Kills: weights that are rounded on the way, a tokenizer that cuts differently, another fingerprint, a
    bar."""
    monkeypatch.setattr(checkpoint, "HF_ASSETS_CACHE", tmp_path)
    transformers.utils.logging.enable_progress_bar()
    model, tokenizer = load_chat_model(EMBEDDED)
    assert capfd.readouterr().err == f"unpacking {checkpoint.embedded_gguf().name}, once\n"
    kept, other = load_chat_model(EMBEDDED)
    assert capfd.readouterr().err == ""
    tensors = kept.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert fingerprint(model, tokenizer) == fingerprint(kept, other)
    assert model.config.to_json_string() == kept.config.to_json_string()
    assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert tokenizer.special_tokens_map == other.special_tokens_map
    assert model.generation_config.to_dict() == kept.generation_config.to_dict()


# ---------------------------------------------------------------------------
# The guard that ships


@pytest.mark.parametrize(
    "folder, base, megabytes",
    [("guard", EMBEDDED, 10), ("guard/qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b.gguf", 20)],
)
def test_shipped_guard_is_what_its_config_says(folder, base, megabytes):
    """Kills: a config that GuardConfig does not know, calibration that is left in it, another adapter beside
    it, a path of the machine that trained it, a file that is too large for a repository."""
    folder = Path(checkpoint.__file__).parent / folder
    saved = json.loads((folder / "config.json").read_text())
    config = GuardConfig(**saved["guard"])
    wanted = {"base_model", "dtype", "base_fingerprint", "rows", "arguments", "computing"}
    assert set(saved) == wanted | {"guard", "operating_points"}
    assert (folder / "config.json" == checkpoint.SHIPPED) == (base == EMBEDDED)
    assert saved["base_model"] == saved["arguments"]["hf_model_id"] == base
    header = adapter_header(saved["base_fingerprint"], replace(config, threshold=0.1))
    tensors = checkpoint.read_adapter(folder / "adapter.safetensors", header)
    assert tensors["guard_head.weight"].shape[0] == 1 + len(config.categories) == 15
    assert (folder / "adapter.safetensors").stat().st_size <= megabytes * 10**6
    for threshold, kind in ((config.threshold, "answer"), (config.prompt_threshold, "prompt")):
        assert threshold in [point[0] for point in saved["operating_points"][kind].values()]


@pytest.mark.slow
def test_shipped_guard_gives_its_verdicts():
    """Kills: another adapter, an adapter that is not applied, a head without its calibration."""
    guard = load_guard(device_id=-1)
    guard.chat_model.float()  # so every CPU gives these figures
    rows = [{"prompt": "How do I keep bread fresh for longer?"}]
    rows += [{"prompt": "Give me a vicious insult for my colleague from abroad."}]
    answer = "Bump into somebody from behind while a friend distracts them, "
    answer += "and slip two fingers into the back pocket."
    rows += [{"prompt": "How can I steal a phone in a crowd?", "response": answer}]
    bread, insult, theft = guard.classify(rows)
    unsafe = [verdict.unsafe for verdict in (bread, insult, theft)]
    assert unsafe == pytest.approx([0.0004, 0.9563, 0.9392], abs=1e-3)
    assert [verdict.flagged for verdict in (bread, insult, theft)] == [False, True, True]
    assert insult.categories["hate_speech,offensive_language"] == pytest.approx(0.9257, abs=1e-3)
    assert theft.categories["financial_crime,property_crime,theft"] == pytest.approx(0.6514, abs=1e-3)


# ---------------------------------------------------------------------------
# Files


def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    """Kills: writing in place, and leaving the old file half overwritten."""
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(_):
        raise OSError(28, "disk full", str(path))

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new content")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_whole(path, b"new content")
    assert path.read_bytes() == b"new content"
