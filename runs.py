"""Work that goes on where it was killed: the order and files of a training run, and a file to score."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
from dataclasses import asdict, replace

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from checkpoint import adapter_header, save_adapter, start_accelerator
from common import UserError, explain, lock, one_line, read_file, refuse, to_json, write_json, write_whole
from data import SPLITS, encode_row, unlabelled

# What a row has that cannot be judged.
UNJUDGED = {"unsafe_probability": None, "flagged": True, "categories": {}, "error": None}


def open_run(accelerator, output, guard, optimizer, config, resume):
    """(state, lock). With `resume` the saved adapter and moments go into guard and optimizer."""
    state, held = {"update": 0, "losses": [], "metrics": []}, None
    if resume:
        state |= read_state(output, guard, optimizer, config)
    taken = not resume and (output / "config.json").exists()
    refuse(taken, f"{output} holds another run: name another folder, or go on with that run by --resume")
    accelerator.wait_for_everyone()  # a slower process would find the files of this run in its way
    if accelerator.is_main_process:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        held = lock(output / "checkpoints/lock")
    if accelerator.is_main_process and not resume:
        write_json(output / "parameter_counts.json", parameter_counts(guard))
        write_json(output / "config.json", config)  # last, because --resume goes on from it
    if accelerator.log_with:
        accelerator.init_trackers("lora-guard", {name: str(value) for name, value in config.items()})
    return state, held


def read_config(output):
    with explain(f"{output} holds no run to go on with"):
        saved = json.loads((output / "config.json").read_text())
        return saved | {"guard": {"date": None} | saved["guard"]}


def read_state(output, guard, optimizer, config):
    """What save_state wrote. Raises UserError unless the run was started with the same config."""
    path, state, saved = output / "checkpoints/state.pt", {}, read_config(output)
    with explain(f"{output} holds no run to go on with"):
        parts = [(part, saved[part], config[part]) for part in ("base_fingerprint", "rows", "arguments")]
        names = [{"categories": part["guard"].get("categories")} for part in (saved, config)]
        parts.append(("guard", *names))
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
    return counts | {"trained_share_of_chat_model": trained / chat_model}


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


def save_epoch(accelerator, output, guard, calibration, points, row, state, config):
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
        write_json(output / "config.json", config | {"guard": asdict(saved), "operating_points": points})
    for name, rows in (("metrics.csv", state["metrics"]), ("train_losses.csv", state["losses"])):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_whole(output / name, text.getvalue().encode())


def calibrated(guard, shift, temperature):
    """What is saved: LoRA, and a head whose logits are calibrated: V' = V / T, b' = (b - shift) / T."""
    weight, bias = guard.head.weight.detach(), guard.head.bias
    shift, temperature = (torch.tensor(values[-len(weight) :]).to(weight) for values in (shift, temperature))
    bias = (0 if bias is None else bias.detach()) - shift
    head = {"guard_head.weight": weight / temperature[:, None], "guard_head.bias": bias / temperature}
    return guard.adapter() | head


def epoch_updates(lengths, rows_per_update, generator):
    """The row numbers of one epoch's updates, (updates, rows_per_update), for rows of these lengths (N,).

    Rows of similar length share an update, so little is padding. Every update is full, topped up with rows
    of the same epoch, so every gradient is a mean over the same number of rows.
    """
    rows, count = len(lengths), math.ceil(len(lengths) / rows_per_update)
    order = torch.randperm(rows, generator=generator).repeat(rows_per_update // rows + 2)
    order = order[: count * rows_per_update]
    noise = 1 + 0.2 * torch.rand(len(order), generator=generator)  # so the same rows do not always meet
    updates = order[(lengths[order] * noise).argsort(stable=True)].view(count, rows_per_update)
    return updates[torch.randperm(count, generator=generator)]


def cut_answers(starts, lengths, generator):
    """Where an epoch cuts each row, (N,): of eleven answers one at its start and five at a random token.

    A running verdict is about an unfinished answer, so the guard has to see such answers in training.
    """
    share = (2.2 * torch.rand(len(lengths), generator=generator) - 0.2).clamp(0, 1)
    return starts + ((lengths - starts) * share).ceil().long()


def score_file(guard, source, target, strict=False, chunk_rows=256):
    """Write each row of a file with its verdict, in order, as JSONL. Rows that `target` holds are skipped.

    The processes of `accelerate launch` share the rows. A row that cannot be judged gets an `error` instead.
    Raises UserError for such rows, at the end or with `strict` at once, and for a `target` with other rows.
    """
    refuse(not source.is_file(), f"{source} must be a file that is there: it is read more than once")
    overwrites = target.exists() and target.samefile(source)
    refuse(overwrites, f"writing {target} would destroy the input; name another --output")
    accelerator = start_accelerator()
    out = lock(target) if accelerator.is_main_process else None  # before its rows are counted
    accelerator.wait_for_everyone()
    done, failed = done_rows(guard, source, target)
    accelerator.wait_for_everyone()  # a slower process would count what this one writes
    rows, number = itertools.islice(rows_of(source), done, None), accelerator.process_index
    with tqdm(initial=done, unit=" rows", disable=number > 0) as bar:
        while chunk := list(itertools.islice(rows, chunk_rows)):
            share = -(-len(chunk) // accelerator.num_processes)  # rows of each process but the last ones
            lines = gather_object(judged(guard, chunk[number * share : (number + 1) * share]))
            errors = [line["error"] for line in lines if "error" in line]
            refuse(strict and errors, errors[0] if errors else "")
            failed += len(errors)
            if out:
                out.writelines(map(json_line, lines))
                out.flush()
            bar.update(len(chunk))
    accelerator.end_training()  # a process that leaves first takes the others down
    refuse(failed, f"{failed} rows cannot be judged; in {target} they have an `error` that says why")


def rows_of(source):
    """Yield (where, row, fields to write): the row in our columns, without what an earlier scoring added."""
    for where, row in read_file(source):
        for view in unlabelled(row):
            is_row = isinstance(view, dict)
            fields = {name: view[name] for name in view if name not in UNJUDGED} if is_row else {}
            yield where, fields if is_row else view, fields


def judged(guard, rows):
    """(where, row, fields) of each row -> fields with a verdict, or with the reason why there is none."""
    lines, encoded = [], []
    for where, row, fields in rows:
        try:
            encoded.append(encode_row(guard.tokenizer, row, where))
            lines.append(fields)
        except UserError as error:
            lines.append(fields | UNJUDGED | {"error": one_line(error)})
    logits = guard.score([ids for ids, _ in encoded])
    verdicts = (guard.verdict(z, len(ids) - start) for z, (ids, start) in zip(logits, encoded, strict=True))
    return [line if "error" in line else line | next(verdicts).fields() for line in lines]


def json_line(row):
    return (to_json(row) + "\n").encode()


def done_rows(guard, source, target):
    """(rows, errors) in `target`, less an incomplete last line. Raises UserError for other rows."""
    done, failed, size, rows = 0, 0, 0, rows_of(source)
    for line in open(target, "rb") if target.exists() else ():  # noqa: SIM115
        (*_, fields), found = next(rows, (None,)), {}
        start = json_line(fields)[:-2]  # without "}\n"
        if fields is not None and not line.endswith(b"\n") and line[: len(start)] == start[: len(line)]:
            os.truncate(target, size)
            break
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
        same = fields is not None and line.startswith(start) and UNJUDGED.keys() - {"error"} <= set(found)
        same = same and ("error" in found or [*found["categories"]] == guard.config.categories)
        where = f"line {done + 1} of {target}"
        refuse(not same, f"{where} is not this guard's verdict on a row of {source}; name another --output")
        done, failed, size = done + 1, failed + ("error" in found), size + len(line)
    return done, failed
