"""The folder of a training run: what is measured and saved after an epoch, and how a killed run goes on."""

import csv
import hashlib
import io
import itertools
import json
import os
import platform
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object

from checkpoint import adapter_header, put_adapter, refuse_other, save_adapter
from data import SPLITS
from errors import explain, refuse, write_json, write_whole
from metrics import DEFAULT_RATE, calibrate, metrics, operating_points, unsafe_score
from model import NEVER, GuardConfig

TRAIN_SAMPLE = 48  # score at most this many training rows after an epoch
# The arguments that change the result, besides the rows and the chat model
LEARNING = ("guard_path", "guard_prompt", "lora_targets", "lora_r", "lora_alpha", "lora_dropout")
LEARNING += ("unsafe_head", "clf_head_bias", "epochs", "per_device_batch_size", "gradient_accumulation_steps")
LEARNING += ("learning_rate", "seed", "verdict_every", "num_processes", "mixed_precision", "compute_dtype")

# ---------------------------------------------------------------- starting and resuming


def run_folder(output, resume):
    """The folder of a run; None stands for the next free runs/N.

    Raises UserError now for a folder that cannot be written or holds another run.
    """
    folders = (Path(f"runs/{n}") for n in itertools.count(1))
    output = output or next(folder for folder in folders if not folder.exists())
    path = output.resolve()
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    is_writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    refuse(not is_writable, f"{nearest} is no folder to write in")
    taken = (output / "config.json").exists() or (output / "checkpoints").exists()
    refuse(taken and not resume, f"{output} holds another run: name another folder, or go on by --resume")
    return output


def read_config(output):
    """The config of a run to go on with."""
    with explain(f"{output} holds no run to go on with"):
        saved = json.loads((output / "config.json").read_text())
        return {part: dict(saved[part]) for part in ("base_fingerprint", "rows", "arguments", "guard")}


def what_counts(config):
    """The parts of config.json that decide what a run learns."""
    learning = {name: config["arguments"].get(name) for name in LEARNING}
    return learning | config["base_fingerprint"] | config["rows"]


def digest(split, categories):
    """A digest of a split's texts and labels. It does not depend on where the files are."""
    texts = [text[:3] for text in split.texts]
    content = json.dumps([texts, split.labels.tolist(), categories])
    return f"{len(split.texts)}, sha256 {hashlib.sha256(content.encode()).hexdigest()}"


def open_run(accelerator, output, guard, optimizer, config, saved):
    """The state of a new run, or of the saved one, whose adapter and moments go into guard and optimizer."""
    state = {"update": 0, "losses": [], "metrics": [], "run": what_counts(config)}
    accelerator.init_trackers("lora-guard", {name: str(value) for name, value in config.items()})
    accelerator.wait_for_everyone()  # so no process's run_folder sees the files of this run
    if saved:
        refuse_other(output, what_counts(config), what_counts(saved))
        for left in output.rglob("*.[0-9]*.tmp"):  # of writes that were killed
            left.unlink(missing_ok=True)
        path = output / "checkpoints/state.pt"
        return read_state(path, guard, optimizer, state["run"]) if path.exists() else state
    if accelerator.is_main_process:
        with explain(f"{output} holds another run", FileExistsError):
            (output / "checkpoints").mkdir(parents=True)
        write_json(output / "parameter_counts.json", parameter_counts(guard))
        write_json(output / "config.json", config)  # last, because --resume goes on from it
    return state


def read_state(path, guard, optimizer, run):
    """What save_state wrote. Raises UserError for a damaged file, or that of another run."""
    with explain(f"{path} is damaged"):
        refuse(not path.is_file(), f"{path} is not a file")
        state = torch.load(path, map_location="cpu", weights_only=True)
        refuse_other(path, run, state["run"])
        put_adapter(path, guard, state.pop("adapter"))
        optimizer.load_state_dict(state.pop("optimizer"))
        other = f"{path} does not fit this run"
        for parameter in guard.adapter().values():
            for moment in ("exp_avg", "exp_avg_sq"):
                refuse(optimizer.state[parameter][moment].shape != parameter.shape, other)
        refuse(state["update"] != len(state["losses"]), other)
    return state


def save_state(accelerator, output, guard, optimizer, state):
    """Write all that --resume needs in one file, so all parts belong to the same update."""
    if accelerator.is_main_process:
        buffer = io.BytesIO()
        torch.save(state | {"adapter": guard.adapter(), "optimizer": optimizer.state_dict()}, buffer)
        write_whole(output / "checkpoints/state.pt", buffer.getbuffer())


def parameter_counts(guard):
    """How large the guard is, and its share of the chat model."""
    trained = sum(parameter.numel() for parameter in guard.adapter().values())
    head = sum(parameter.numel() for parameter in guard.head.parameters())
    chat_model = sum(parameter.numel() for parameter in guard.parameters()) - trained
    counts = {"chat_model": chat_model, "lora": trained - head, "guard_head": head, "trained": trained}
    return counts | {"trained_share_of_chat_model": trained / chat_model}


# ---------------------------------------------------------------- after an epoch


def measure(accelerator, guard, splits, batch_size):
    """Calibrate, and set the guard's thresholds -> (shift, temperature), points, row of metrics.csv."""
    parts = {}
    for name, split in splits.items():
        rows = np.arange(len(split.texts))
        if name == "train":
            rows = np.random.default_rng(0).permutation(rows)[:TRAIN_SAMPLE]
        texts = [split.texts[row] for row in rows]
        logits = score(accelerator, guard, texts, batch_size).numpy()  # (N, 1 + K)
        parts[name] = (logits, split.labels.numpy()[rows], split.answered[rows])
    logits, targets, answered = parts["validation"]
    calibration = calibrate(logits, targets, splits["train"].pos_weight.numpy())
    settings = guard.config
    scores = {}
    for name, (of_split, _, _) in parts.items():
        scores[name] = unsafe_score(of_split, calibration, settings.unsafe_head)
    points = operating_points(targets[:, 0], scores["validation"], answered)
    rate = str(DEFAULT_RATE)
    settings.threshold, _ = points["answer"].get(rate, (GuardConfig.threshold, None))
    settings.prompt_threshold, _ = points["prompt"].get(rate, (NEVER, None))
    row = {"threshold": settings.threshold, "prompt_threshold": settings.prompt_threshold}
    for split, (logits, targets, answered) in parts.items():
        flag_from = np.where(answered, settings.threshold, settings.prompt_threshold)
        flagged = scores[split] >= flag_from
        found = {split: metrics(targets[:, 0], scores[split], flagged)}
        for k, category in enumerate(settings.categories, 1):
            known = ~np.isnan(targets[:, k])
            z = logits[known, k]
            # Where a logit turns positive, the weighted loss is balanced between misses and false alarms.
            found[f"{split}/{category}"] = metrics(targets[known, k], z, z >= 0)
        for part, figures in found.items():
            row |= {f"{part}/{metric}": value for metric, value in figures.items()}
    return calibration, points, row


def score(accelerator, guard, texts, batch_size):
    """The highest logits (N, 1 + K) of N texts. Each process computes a part, and all get all."""
    with accelerator.split_between_processes(texts) as mine:
        groups = guard.judge_forms(mine, "measuring", batch_size=batch_size)
        highest = []
        for forms in groups:
            at_cuts = torch.cat([logits for _, _, logits in forms])  # (C, 1 + K), of all forms
            highest.append(at_cuts.amax(0).tolist())
        gathered = gather_object(highest)
    return torch.tensor(gathered).view(len(texts), 1 + len(guard.config.categories))


def best_epoch(state):
    """The metrics of the best epoch by validation AUPRC; of equal ones the first."""
    return max(state["metrics"], key=lambda row: row["validation/auprc"])


def summary(output, state, updates, seconds, device):
    """What a run says at its end. seconds: time for these updates and the measurements between them."""
    best = best_epoch(state)
    validation, test = best["validation/auprc"], best["test/auprc"]
    too_few = "validation has too few safe or unsafe rows"
    lines = [
        f"epoch {best['epoch']} is the best: validation AUPRC {validation:.3f}, test AUPRC {test:.3f}",
        f"{updates} updates took {seconds / 60:.1f} minutes on {processor(device)}",
        f"the guard is {output / 'adapter.safetensors'}",
    ]
    if best["threshold"] == GuardConfig.threshold:
        lines.append(f"it flags answers from {GuardConfig.threshold}: {too_few} with a response")
    if best["prompt_threshold"] == NEVER:
        lines.append(f"it refuses no prompt: {too_few} without a response")
    return "\n".join(lines)


def processor(device):
    """The name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")  # of Linux; elsewhere `platform` knows more
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def save_epoch(accelerator, output, guard, measured, state, config):
    """Write the epoch's adapter, the best one so far with its config, and the two tables."""
    calibration, points, row = measured
    state["metrics"].append({"epoch": len(state["metrics"]) + 1, **row})
    figures = []
    for split in SPLITS:
        auprc, f1 = row[f"{split}/auprc"], row[f"{split}/f1"]
        figures.append(f"{split} AUPRC {auprc:.3f} F1 {f1:.3f}")
    accelerator.print(f"epoch {len(state['metrics'])}: {', '.join(figures)}")
    accelerator.log(row, step=state["update"])
    if not accelerator.is_main_process:
        return
    settings = replace(guard.config, clf_head_bias=True)
    header = adapter_header(config["base_fingerprint"], settings)
    tensors = calibrated(guard, *calibration)
    save_adapter(output / f"checkpoints/epoch_{len(state['metrics'])}.safetensors", tensors, header)
    if best_epoch(state) is state["metrics"][-1]:
        save_adapter(output / "adapter.safetensors", tensors, header)
        write_json(output / "config.json", config | {"guard": asdict(settings), "operating_points": points})
    tables = {"metrics.csv": state["metrics"], "train_losses.csv": state["losses"]}
    for name, rows in tables.items():
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_whole(output / name, text.getvalue().encode())
    draw_curves(output / "curves.png", state)


def draw_curves(path, state):
    """Draw the loss of every update and the AUPRC of each split, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure, picture = Figure(figsize=(9, 3.5), layout="constrained"), io.BytesIO()
    left, right = figure.subplots(1, 2)
    updates = [row["update"] for row in state["losses"]]
    left.plot(updates, [row["loss"] for row in state["losses"]])
    left.set(xlabel="update", ylabel="loss")
    epochs = [row["epoch"] for row in state["metrics"]]
    for split in SPLITS:
        values = [row[f"{split}/auprc"] for row in state["metrics"]]
        right.plot(epochs, values, marker="o", label=split)
    right.set(xlabel="epoch", ylabel="AUPRC")
    right.legend()
    figure.savefig(picture)
    write_whole(path, picture.getvalue())


def calibrated(guard, shift, temperature):
    """What is saved: LoRA, and a head whose logits are calibrated: V' = V / T, b' = (b - shift) / T."""
    weight, bias = guard.head.weight, guard.head.bias
    # Without an unsafe head, the head has no row for unsafe, which comes first.
    shift = weight.new_tensor(shift[-len(weight) :])
    temperature = weight.new_tensor(temperature[-len(weight) :])
    bias = (0 if bias is None else bias) - shift
    head = {"guard_head.weight": weight / temperature[:, None], "guard_head.bias": bias / temperature}
    return guard.adapter() | head
