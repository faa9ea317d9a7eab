"""Train a guard: the chat model stays frozen; the LoRA layers and the guard head learn from labelled rows.

    loss = 1/2 BCE(z_0, u; w_0) + 1/(2K) sum_k BCE(z_k, y_k; w_k)      w = negatives / positives
    loss = 1/K sum_k BCE(z_k, y_k; w_k)                                with --no-unsafe-head

`accelerate launch train.py ...` runs the same loop on several devices.
"""

import argparse
import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import LoggerType, set_seed
from torch.nn import functional as F
from tqdm.auto import tqdm

from chat import checkpoint_gradients
from checkpoint import EMBEDDED, build_guard, fingerprint, load_chat_model, start_accelerator, use_fast_dtype
from common import DTYPES, refuse, run
from data import BEAVERTAILS, SPLITS, encode_row, labels, load_splits
from metrics import DEFAULT_RATE, calibrate, metrics, operating_points, unsafe_score
from model import GuardConfig
from runs import best_epoch, cut_answers, epoch_updates, open_run, read_config, save_epoch, save_state

TRAIN_SAMPLE = 48  # training rows at most that are scored after each epoch
NOT_KEPT = ("output_dir", "cache_dir", "resume", "save_steps", "categories", "threshold", "prompt_threshold")
NOT_KEPT += ("date", "dtype")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("hf_model_id", nargs="?", default=EMBEDDED, help="hub id, folder or .gguf file")
    add("output_dir", nargs="?", type=Path, help="default: the next free runs/N")
    add("--dataset", nargs="+", help=f"hub id or files; default: {BEAVERTAILS}, or our sample for {EMBEDDED}")
    add("--guard-path", choices=("activated", "full"), help="full is the paper's")
    add("--guard-prompt", help="text that the activated path reads last; default: the end token alone")
    targets = "all-linear, names such as q_proj,v_proj (the paper's), or none: only the head learns"
    add("--lora-targets", type=lambda names: names.split(",") if names != "none" else [], help=targets)
    add("--lora-r", type=int)
    add("--lora-alpha", type=float)
    add("--lora-dropout", type=float)
    add("--no-unsafe-head", dest="unsafe_head", action="store_false", help="unsafe is the largest category")
    bias = "learn no bias; the saved head still has one, from calibration"
    add("--no-clf-head-bias", dest="clf_head_bias", action="store_false", help=bias)
    parser.set_defaults(**asdict(GuardConfig()))
    add("--epochs", type=int, default=3)
    add("--per-device-batch-size", type=int, default=16)
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--eval-batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--dtype", choices=DTYPES, help="compute in this; default: the faster of the stored one and float32")
    add("--gradient-checkpointing", action="store_true", help="on the full path: less memory, more time")
    add("--cache-dir", type=Path, help="keep the chat path's caches here, for later epochs and runs")
    add("--save-steps", type=int, default=20, help="updates from one saved state to the next")
    add("--resume", action="store_true", help="go on with the run in output_dir")
    add("--report-to", choices=[tracker.value for tracker in LoggerType], help="one of accelerate's trackers")
    args = parser.parse_args()
    sizes = (args.per_device_batch_size, args.gradient_accumulation_steps, args.eval_batch_size)
    if min(args.epochs, *sizes, args.save_steps) < 1 or not 0 < args.learning_rate < math.inf:
        parser.error("epochs, batch sizes, steps and the learning rate must be above 0 and finite")
    if not 0 <= args.seed < 2**31:
        parser.error("--seed must be from 0 to 2147483647")
    if args.gradient_checkpointing and args.guard_path != "full":
        parser.error("--gradient-checkpointing needs --guard-path full")
    if args.resume and not args.output_dir:
        parser.error("--resume needs the run to go on with: train.py MODEL OUTPUT_DIR --resume")
    return args


def guard_loss(logits, labels, pos_weight, unsafe_head):
    """The loss above. logits, labels: (B, 1 + K), NaN labels are unknown and add 0; pos_weight: (1 + K,)."""
    options = {"pos_weight": pos_weight, "reduction": "none"}
    bce = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), **options)
    bce = bce.masked_fill(labels.isnan(), 0)  # (B, 1 + K)
    categories = bce[:, 1:].sum() / max(bce[:, 1:].numel(), 1)
    return (bce[:, 0].mean() + categories) / 2 if unsafe_head else categories


def main():
    args = parse_arguments()
    steps = args.gradient_accumulation_steps
    output = args.output_dir or next(p for n in range(1, 10**6) if not (p := Path(f"runs/{n}")).exists())
    options = {"gradient_accumulation_steps": steps, "log_with": args.report_to, "project_dir": output}
    accelerator = start_accelerator(**options)
    refuse(args.report_to and not accelerator.log_with, f"{args.report_to} is not installed")
    set_seed(args.seed)

    # ---------------------------------------------------------------- the guard and its rows
    guard, splits, config = load(args, accelerator)
    train, unsafe_head = splits["train"], guard.config.unsafe_head
    pos_weight = train.pos_weight.to(accelerator.device)
    # With a second beta of 0.999 the training of a larger model can collapse (docs/LOG.md).
    optimizer = torch.optim.AdamW(guard.adapter().values(), lr=args.learning_rate, betas=(0.9, 0.95))
    state, _lock = open_run(accelerator, output, guard, optimizer, config, args.resume)
    model, optimizer = accelerator.prepare(guard, optimizer)

    # ---------------------------------------------------------------- one loop over updates
    rows_per_update = args.per_device_batch_size * steps * accelerator.num_processes
    per_epoch = math.ceil(len(train.ids) / rows_per_update)
    total = args.epochs * per_epoch
    quiet = not accelerator.is_main_process
    bar = tqdm(range(state["update"], total), initial=state["update"], total=total, disable=quiet)
    for update in bar:
        # Order, cuts and dropout follow from the seed and the update's number, so a resumed run repeats them.
        epoch, number = divmod(update, per_epoch)
        generator = torch.Generator().manual_seed(args.seed + epoch + 1)
        ends = train.lengths if guard.is_full else cut_answers(train.starts, train.lengths, generator)
        rows = epoch_updates(ends, rows_per_update, generator)[number]
        set_seed(args.seed + update, device_specific=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, total, args.learning_rate)
        mean_loss = 0.0
        model.train()
        for batch in rows.view(steps, accelerator.num_processes, -1)[:, accelerator.process_index]:  # (B,)
            with accelerator.accumulate(model):
                logits = model([train.ids[row] for row in batch], ends[batch].tolist())  # (B, 1 + K)
                loss = guard_loss(logits, train.labels[batch].to(logits.device), pos_weight, unsafe_head)
                accelerator.backward(loss)  # divides by the accumulation steps
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(guard.adapter().values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            mean_loss += loss.detach() / steps
        mean_loss = accelerator.reduce(mean_loss, "mean").item()
        refuse(
            not math.isfinite(mean_loss), f"update {update + 1} has no finite loss: lower the learning rate"
        )
        state["update"] = update + 1
        state["losses"].append({"update": update + 1, "epoch": epoch + 1, "loss": mean_loss})
        accelerator.log({"loss": mean_loss}, step=update + 1)
        bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {mean_loss:.3f}")
        if number + 1 == per_epoch:
            measured = measure(accelerator, guard, splits, pos_weight, args)
            save_epoch(accelerator, output, guard, *measured, state, config)
        if number + 1 == per_epoch or (update + 1) % args.save_steps == 0:
            save_state(accelerator, output, guard, optimizer, state)
    accelerator.wait_for_everyone()  # a process that leaves first takes down the one that writes
    model, optimizer = accelerator.free_memory(model, optimizer)  # at interpreter exit, DDP can deadlock
    accelerator.end_training()
    best = f"the guard of the best epoch by validation AUPRC is {output / 'adapter.safetensors'}"
    never = "; it refuses no prompt: validation needs safe and unsafe rows without a response"
    accelerator.print(best + never * (best_epoch(state)["prompt_threshold"] == 2))


class Split:
    """The rows of one split, tokenised once. Rows of more than `longest` tokens are left out."""

    def __init__(self, rows, tokenizer, categories, longest=math.inf):
        encoded = [(*encode_row(tokenizer, row), row) for row in rows]
        kept = [part for part in encoded if len(part[0]) <= longest]
        self.left_out = len(encoded) - len(kept)
        self.ids = [ids for ids, _, _ in kept]
        self.starts = torch.tensor([start for _, start, _ in kept])  # where each answer starts
        self.lengths = torch.tensor([len(ids) for ids in self.ids])
        self.answered = (self.starts < self.lengths).numpy()
        self.labels = labels([row for _, _, row in kept], categories)  # (N, 1 + K)
        positives, known = self.labels.nansum(0), (~self.labels.isnan()).sum(0)
        # No positive label uses the weight of a category without positives, so any finite value will do.
        self.pos_weight = (known - positives) / positives.clamp(min=1)  # (1 + K,)


def load(args, accelerator):
    """The new guard, its splits, and the fields of config.json."""
    sample = str(Path(__file__).parent / "samples/sample.jsonl")
    args.dataset = args.dataset or [sample if args.hf_model_id == EMBEDDED else BEAVERTAILS]
    rows, categories = load_splits(args.dataset)
    chat_model, tokenizer = load_chat_model(args.hf_model_id)
    is_local = args.hf_model_id != EMBEDDED and Path(args.hf_model_id).exists()
    base_model = str(Path(args.hf_model_id).resolve()) if is_local else args.hf_model_id
    config = {"base_model": base_model, "dtype": str(chat_model.dtype).removeprefix("torch.")}
    config |= {"base_fingerprint": fingerprint(chat_model, tokenizer), "rows": {}}
    settings = {field.name: getattr(args, field.name) for field in fields(GuardConfig)}
    settings["categories"] = categories
    if args.resume:  # templates may show the date
        settings["date"] = read_config(args.output_dir)["guard"]["date"]
    guard = build_guard(chat_model, tokenizer, settings, accelerator.device)
    config |= {"guard": asdict(guard.config), "computing": use_fast_dtype(guard, args.dtype)}
    accelerator.print(config["computing"])
    if args.gradient_checkpointing:
        checkpoint_gradients(chat_model, guard.gate)
    if args.cache_dir:
        from tools.train_cached import keep_caches

        keep_caches(guard, args.cache_dir)
    longest = {"train": guard.max_tokens}  # in use, longer texts are judged in windows
    splits = {s: Split(rows[s], tokenizer, categories, longest.get(s, math.inf)) for s in SPLITS}
    if left_out := splits["train"].left_out:
        accelerator.print(f"left out {left_out} training rows of more than {guard.max_tokens} tokens")
    one_kind = len(splits["train"].labels[:, 0].unique()) < 2
    refuse(one_kind, "the training rows that fit the context are not both safe and unsafe")
    for name, split in splits.items():
        content = json.dumps([split.ids, split.labels.tolist()]).encode()
        config["rows"][name] = f"{len(split.ids)}, sha256 {hashlib.sha256(content).hexdigest()}"
    config["arguments"] = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
    config["arguments"] |= {  # what results depend on as well
        "caches_kept": args.cache_dir is not None,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "compute_dtype": str(chat_model.dtype).removeprefix("torch."),
    }
    return guard, splits, config


def learning_rate(update, updates, peak):
    """Linear warm-up over the first twentieth of the updates, then linear decay to zero."""
    return peak * min((update + 1) / (updates / 20 + 1), 1) * (1 - update / updates)


def measure(accelerator, guard, splits, pos_weight, args):
    """Calibrate and choose thresholds on validation -> (shift, temperature), points, row of metrics.csv."""
    logits, targets, answered = {}, {}, {}
    for name, split in splits.items():
        every = math.ceil(len(split.ids) / TRAIN_SAMPLE) if name == "train" else 1  # of all files alike
        logits[name] = score(accelerator, guard, split.ids[::every], args.eval_batch_size).numpy()
        targets[name], answered[name] = split.labels[::every].numpy(), split.answered[::every]
    calibration = calibrate(logits["validation"], targets["validation"], pos_weight.cpu().numpy())
    scores = {name: unsafe_score(z, calibration, guard.config.unsafe_head) for name, z in logits.items()}
    given = (targets["validation"][:, 0], scores["validation"], answered["validation"])
    points = operating_points(*given)
    prompt_threshold, threshold = (points[kind][str(DEFAULT_RATE)][0] for kind in ("prompt", "answer"))
    guard.config.prompt_threshold, guard.config.threshold = prompt_threshold, threshold
    row = {"threshold": threshold, "prompt_threshold": prompt_threshold}
    for name, target in targets.items():
        flag_from = np.where(answered[name], threshold, prompt_threshold)
        found = {name: metrics(target[:, 0], scores[name], flag_from)}
        for k, category in enumerate(guard.config.categories, 1):
            known = ~np.isnan(target[:, k])
            # Where a logit turns positive, the weighted loss is balanced between misses and false alarms.
            found[f"{name}/{category}"] = metrics(target[known, k], logits[name][known, k], 0.0)
        row |= {f"{part}/{metric}": value for part in found for metric, value in found[part].items()}
    return calibration, points, row


def score(accelerator, guard, texts, batch_size):
    """Logits (N, 1 + K) of N lists of token ids, on the CPU. The processes share them."""
    logits = torch.zeros(len(texts), 1 + len(guard.config.categories))
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    logits[mine] = guard.score(texts[mine], batch_size)
    return accelerator.reduce(logits.to(accelerator.device), "sum").cpu()


if __name__ == "__main__":
    run(main)
