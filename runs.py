"""The files of a training run, and the signals that stop it. A stopped or killed run goes on from its files
and ends with the same bytes."""

import csv
import io
import json
import signal
from dataclasses import asdict, replace

import torch

from checkpoint import adapter_header, save_adapter
from common import explain, refuse, write_json, write_whole
from data import SPLITS


def open_run(accelerator, output, guard, optimizer, config, resume):
    """A new state, or with `resume` the saved one, whose adapter and moments go into guard and optimizer."""
    state = {"update": 0, "losses": [], "metrics": []}
    if resume:
        state |= read_state(output, guard, optimizer, config)
    taken = not resume and (output / "config.json").exists()
    refuse(taken, f"{output} holds another run: name another folder, or go on with that run by --resume")
    accelerator.wait_for_everyone()  # a slower process would find the files of this run in its way
    if accelerator.is_main_process and not resume:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(output / "parameter_counts.json", parameter_counts(guard))
        write_json(output / "config.json", config)  # last, because --resume goes on from it
    if accelerator.log_with:
        accelerator.init_trackers("lora-guard", {name: str(value) for name, value in config.items()})
    return state


def read_state(output, guard, optimizer, config):
    """What save_state wrote. Raises UserError unless the run was started with the same config."""
    path, state = output / "checkpoints/state.pt", {}
    with explain(f"{output} holds no run to go on with"):
        saved = json.loads((output / "config.json").read_text())
        parts = [(part, saved[part], config[part]) for part in ("base_fingerprint", "rows", "arguments")]
        differing = [
            f"{part}.{name}" for part, old, new in parts for name in new if old.get(name) != new[name]
        ]
        if path.exists():  # if not, the run was killed before its first state
            state = torch.load(path, map_location="cpu", weights_only=True)
            learnt, moments = state.pop("adapter"), state.pop("optimizer")
    differing = [name for name in differing if name != "arguments.dataset"]  # the rows themselves count
    refuse(differing, f"the run in {output} was started with other values of: {', '.join(differing)}")
    if state:
        with torch.no_grad():
            for name, parameter in guard.adapter().items():
                parameter.copy_(learnt[name])
        optimizer.load_state_dict(moments)
    for left in output.rglob("*.[0-9]*.tmp"):  # of writes that were killed
        left.unlink(missing_ok=True)
    return state


def parameter_counts(guard):
    """How large the guard is, and its share of the chat model."""
    sizes = {name: parameter.numel() for name, parameter in guard.adapter().items()}
    trained, head = sum(sizes.values()), sum(n for name, n in sizes.items() if name.startswith("guard_head."))
    chat_model = sum(parameter.numel() for parameter in guard.parameters()) - trained
    counts = {"chat_model": chat_model, "lora": trained - head, "guard_head": head, "trained": trained}
    return counts | {"trained_share_of_chat_model": trained / chat_model, "adapter_bytes": 4 * trained}


def save_state(accelerator, output, guard, optimizer, state):
    """Write all that --resume needs in one file, so all parts belong to the same update."""
    if accelerator.is_main_process:
        adapter = {name: parameter.detach().cpu() for name, parameter in guard.adapter().items()}
        buffer = io.BytesIO()
        torch.save(state | {"adapter": adapter, "optimizer": optimizer.optimizer.state_dict()}, buffer)
        write_whole(output / "checkpoints/state.pt", buffer.getbuffer())


def best_epoch(state):
    """The metrics of the best epoch by validation AUPRC; of equal ones the first."""
    return max(state["metrics"], key=lambda row: row["validation/auprc"])


def save_epoch(accelerator, output, guard, calibration, row, state, config):
    """Write the epoch's adapter, the best one so far with its config, and the two tables."""
    state["metrics"].append({"epoch": len(state["metrics"]) + 1, **row})
    figures = (f"{s} AUPRC {row[f'{s}/auprc']:.3f} F1 {row[f'{s}/f1']:.3f}" for s in SPLITS)
    accelerator.print(f"epoch {len(state['metrics'])}: {', '.join(figures)}")
    accelerator.log(row, step=state["update"])
    if not accelerator.is_main_process:
        return
    saved = replace(guard.config, clf_head_bias=True)
    header = adapter_header(config["base_fingerprint"], saved)
    tensors = calibrated(guard, *calibration)
    save_adapter(output / f"checkpoints/epoch_{len(state['metrics'])}.safetensors", tensors, header)
    if best_epoch(state) is state["metrics"][-1]:
        save_adapter(output / "adapter.safetensors", tensors, header)
        write_json(output / "config.json", config | {"guard": asdict(saved)})
    for name, rows in (("metrics.csv", state["metrics"]), ("train_losses.csv", state["losses"])):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_whole(output / name, text.getvalue().encode())


def calibrated(guard, shift, temperature):
    """The adapter's tensors with a head whose logits are calibrated: V' = V / T, b' = (b - shift) / T."""
    weight, bias = guard.head.weight.detach(), guard.head.bias
    shift, temperature = (torch.tensor(values[-len(weight) :]).to(weight) for values in (shift, temperature))
    bias = (0 if bias is None else bias.detach()) - shift
    head = {"guard_head.weight": weight / temperature[:, None], "guard_head.bias": bias / temperature}
    return guard.adapter() | head


def catch_signals():
    """A list that Ctrl-C and SIGTERM add their numbers to. A second Ctrl-C ends the process at once."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, interrupt)

    interrupt = signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught
