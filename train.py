"""Train a guard: the chat model stays frozen; the LoRA layers and the guard head learn from labelled rows.

    loss = 1/2 BCE(z_0, u; w_0) + 1/(2K) sum_k BCE(z_k, y_k; w_k)      w = negatives / positives
    loss = 1/K sum_k BCE(z_k, y_k; w_k)                                with --no-unsafe-head

z combines a row's logits at all its cuts (`over_cuts`).
`accelerate launch train.py ...` runs the same loop on several devices.
"""

import argparse
import contextlib
import functools
import math
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import GradientAccumulationPlugin, LoggerType, set_seed, tqdm
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import EMBEDDED, build_guard, fingerprint, load_chat_model, start_accelerator, use_fast_dtype
from data import BEAVERTAILS, SPLITS, encode_row, labels, load_splits
from errors import DTYPES, number, refuse, run
from model import GuardConfig
from training_run import digest, measure, open_run, read_config, run_folder, save_epoch, save_state, summary

NOT_KEPT = ("output_dir", "resume", "save_steps", "categories", "threshold", "prompt_threshold", "date")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    positive = number(int, 0)
    add("hf_model_id", nargs="?", default=EMBEDDED, help="hub id, folder or .gguf file")
    add("output_dir", nargs="?", type=Path, help="default: the next free runs/N")
    add("--dataset", nargs="+", help=f"hub id or files; default: {BEAVERTAILS}, or our sample for {EMBEDDED}")
    add("--guard-path", choices=("activated", "full"), help="full is the paper's")
    add("--guard-prompt", help="text that the activated path reads last; default: the end token alone")
    targets = "all-linear, names such as q_proj,v_proj (the paper's), or none: only the head learns"
    add("--lora-targets", type=lambda names: names.split(",") if names != "none" else [], help=targets)
    add("--lora-r", type=positive)
    add("--lora-alpha", type=number(float, 0))
    add("--lora-dropout", type=float)
    add("--no-unsafe-head", dest="unsafe_head", action="store_false", help="unsafe is the largest category")
    bias = "learn no bias; the saved head still has one, from calibration"
    add("--no-clf-head-bias", dest="clf_head_bias", action="store_false", help=bias)
    add("--verdict-every", type=number(int, -1), help="tokens between verdicts; 0: at the end")
    parser.set_defaults(**asdict(GuardConfig()))
    add("--epochs", type=positive, default=3)
    add("--per-device-batch-size", type=positive, default=16)
    add("--gradient-accumulation-steps", type=positive, default=1)
    add("--eval-batch-size", type=positive, default=32)
    add("--learning-rate", type=number(float, 0), default=1e-3)
    add("--seed", type=number(int, -1, 2**31 - 1), default=0)
    add("--dtype", choices=DTYPES, help="compute in this; default: the faster of the stored one and float32")
    add("--gradient-checkpointing", action="store_true", help="on the full path: less memory, more time")
    add("--save-steps", type=positive, default=20, help="updates from one saved state to the next")
    add("--resume", action="store_true", help="go on with the run in output_dir")
    add("--report-to", choices=LoggerType.list(), help="one of accelerate's trackers")
    args = parser.parse_args()
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
    of_categories = bce[:, 1:]  # (B, K)
    categories = of_categories.sum() / max(of_categories.numel(), 1)
    return (bce[:, 0].mean() + categories) / 2 if unsafe_head else categories


def over_cuts(logits, cuts):
    """Mean of each row's logits over its cuts, weighted by their softmax: (B, C, 1 + K) -> (B, 1 + K)."""
    combined = []
    for row, ends in zip(logits, cuts, strict=True):
        row = row[: len(ends)]  # (C, 1 + K), without padding
        combined.append((row.detach().softmax(0) * row).sum(0))
    return torch.stack(combined)


def main():
    args = parse_arguments()
    output = run_folder(args.output_dir, args.resume)
    steps = args.gradient_accumulation_steps
    # A plain number of steps gives way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS; the plugin does not.
    options = {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=steps)}
    accelerator = start_accelerator(log_with=args.report_to, project_dir=output, **options)
    refuse(args.report_to and not accelerator.log_with, f"{args.report_to} is not installed")
    changes = accelerator.mixed_precision == "fp8" or accelerator.state.dynamo_plugin.backend.value != "NO"
    refuse(changes, "accelerate's fp8 and dynamo change the chat model; train without them")

    # ---------------------------------------------------------------- the guard and its rows
    set_seed(args.seed)  # A and the head start at random
    saved = read_config(output) if args.resume else None
    guard, splits, config = load(args, accelerator, saved)
    train, unsafe_head, every = splits["train"], guard.config.unsafe_head, guard.config.verdict_every
    pos_weight = train.pos_weight.to(accelerator.device)
    # With a second beta of 0.999 the training of a larger model can collapse (docs/LOG.md).
    optimizer = torch.optim.AdamW(guard.adapter().values(), lr=args.learning_rate, betas=(0.9, 0.95))
    state = open_run(accelerator, output, guard, optimizer, config, saved)
    model, optimizer = accelerator.prepare(guard, optimizer)

    # ---------------------------------------------------------------- one loop over updates
    rows_per_update = args.per_device_batch_size * steps * accelerator.num_processes
    per_epoch = math.ceil(len(train.texts) / rows_per_update)
    total = args.epochs * per_epoch
    first, started = state["update"], time.monotonic()
    bar = tqdm(total=total, initial=first)
    for update in range(first, total):
        # Order, cuts and dropout follow from the seed and the update's number, so a resumed run repeats them.
        epoch, place = divmod(update, per_epoch)
        generator = torch.Generator().manual_seed(seed_of(args.seed, epoch))
        shifts = torch.randint(every or 1, (len(train.texts),), generator=generator).tolist()
        rows = epoch_updates(train.lengths, rows_per_update, generator)[place]
        set_seed(seed_of(args.seed, update), device_specific=True)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update, total, args.learning_rate)
        mean_loss = 0.0
        model.train()
        for batch in rows.view(steps, accelerator.num_processes, -1)[:, accelerator.process_index]:  # (B,)
            with accelerator.accumulate(model):
                ids = [train.texts[row].ids for row in batch]
                cuts = [train.texts[row].cuts(every, shifts[row]) for row in batch]
                logits = over_cuts(model(ids, cuts), cuts)  # (B, 1 + K)
                loss = guard_loss(logits, train.labels[batch].to(logits.device), pos_weight, unsafe_head)
                accelerator.backward(loss)  # divides by the accumulation steps
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(guard.adapter().values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            mean_loss += loss.detach() / steps
        mean_loss = accelerator.reduce(mean_loss, "mean").item()
        refuse(not math.isfinite(mean_loss), "the loss is no longer finite; lower the learning rate")
        state["update"] = update + 1
        state["losses"].append({"update": update + 1, "epoch": epoch + 1, "loss": mean_loss})
        accelerator.log({"loss": mean_loss}, step=update + 1)
        bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {mean_loss:.3f}")
        bar.update()
        if place + 1 == per_epoch:
            measured = measure(accelerator, guard, splits, args.eval_batch_size)
            save_epoch(accelerator, output, guard, measured, state, config)
        if place + 1 == per_epoch or (update + 1) % args.save_steps == 0:
            save_state(accelerator, output, guard, optimizer, state)

    # ---------------------------------------------------------------- the end
    accelerator.wait_for_everyone()  # a process that leaves first takes down the one that writes
    model, optimizer = accelerator.free_memory(model, optimizer)  # at interpreter exit, DDP can deadlock
    accelerator.end_training()
    accelerator.print(summary(output, state, total - first, time.monotonic() - started, accelerator.device))


class Split:
    """The rows of one split, tokenised once. Training rows that exceed the context are left out."""

    def __init__(self, rows, guard, is_trained):
        self.texts = []
        kept = []
        for row in tqdm(rows, desc="tokenising", leave=False):
            text = encode_row(guard.tokenizer, row)
            if len(text.ids) <= guard.max_tokens or not is_trained:
                self.texts.append(text)
                kept.append(row)
        self.lengths = torch.tensor([len(text.ids) for text in self.texts])
        self.answered = np.array([text.is_answer for text in self.texts])
        self.labels = labels(kept, guard.config.categories)  # (N, 1 + K)
        self.pos_weight = (self.labels == 0).sum(0) / (self.labels == 1).sum(0)  # (1 + K,)


def load(args, accelerator, saved):
    """The new guard, its splits, and the fields of config.json. saved: the config of a run to go on with."""
    sample = str(Path(__file__).parent / "samples/sample.jsonl")
    base_model = args.hf_model_id
    args.dataset = args.dataset or [sample if base_model == EMBEDDED else BEAVERTAILS]
    rows, args.categories, notes = load_splits(args.dataset)
    chat_model, tokenizer = load_chat_model(base_model)
    base_fingerprint = fingerprint(chat_model, tokenizer)
    if base_model != EMBEDDED and Path(base_model).exists():
        # Not resolve(): in the hub's cache a file is a link, and only the link has the name.
        base_model = str(Path(base_model).absolute())
    stored = str(chat_model.dtype).removeprefix("torch.")
    dtype = args.dtype
    if saved:  # go on with that run's date and dtype, because today's could differ
        args.date = saved["guard"].get("date")
        dtype = dtype or saved["arguments"].get("compute_dtype")
    settings = {name: getattr(args, name) for name in asdict(GuardConfig())}
    guard = build_guard(chat_model, tokenizer, settings, accelerator.device)
    notes.append(use_fast_dtype(guard, dtype))
    if args.gradient_checkpointing:
        checkpoint_gradients(guard)
    splits = {name: Split(rows[name], guard, is_trained=name == "train") for name in SPLITS}
    left_out = len(rows["train"]) - len(splits["train"].texts)
    too_long = f"left out {left_out} training rows of more than {guard.max_tokens} tokens"
    learnable = splits["train"].pos_weight.log().isfinite().all()
    refuse(not learnable, f"{too_long}; the others lack an output's true or false labels")
    accelerator.print("\n".join([*notes, too_long] if left_out else notes))
    arguments = {name: value for name, value in vars(args).items() if name not in NOT_KEPT}
    arguments["num_processes"] = accelerator.num_processes
    arguments["mixed_precision"] = accelerator.mixed_precision
    arguments["compute_dtype"] = str(chat_model.dtype).removeprefix("torch.")
    config = {"base_model": base_model, "dtype": stored, "base_fingerprint": base_fingerprint}
    config["rows"] = {name: digest(split, args.categories) for name, split in splits.items()}
    return guard, splits, config | {"guard": asdict(guard.config), "arguments": arguments}


def checkpoint_gradients(guard):
    """Keep only what enters each layer of the full path; the backward pass computes the rest again."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import, and seldom needed

    layers = [m for m in guard.modules() if isinstance(m, GradientCheckpointingLayer)]
    refuse(not layers, f"a {type(guard.chat_model).__name__} has no layers for gradient checkpointing")
    # The backward pass may run in another thread, where the gate is shut.
    options = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), guard.gate.opened())}
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


# ---------------------------------------------------------------- what follows from the seed


def seed_of(seed, n):
    """A seed of its own for each pair, so that no two runs share an epoch's order."""
    return int(np.random.SeedSequence((seed, n)).generate_state(1)[0] >> 1)


def epoch_updates(lengths, rows_per_update, generator):
    """The row numbers of one epoch's updates, (updates, rows_per_update), for rows of these lengths (N,).

    Rows of similar length share an update, so little is padding. Every update is full, topped up with rows
    of the same epoch, so every gradient is a mean over the same number of rows.
    """
    rows = len(lengths)
    count = math.ceil(rows / rows_per_update)
    places = torch.arange(count * rows_per_update) % rows  # after the last row the first ones come again
    order = torch.randperm(rows, generator=generator)[places]
    noise = 1 + 0.2 * torch.rand(len(order), generator=generator)  # so the same rows do not always meet
    updates = order[(lengths[order] * noise).argsort(stable=True)].view(count, rows_per_update)
    return updates[torch.randperm(count, generator=generator)]


def learning_rate(update, updates, peak):
    """Linear warm-up over the first twentieth of the updates, then linear decay to zero."""
    warm_up = (update + 1) / (updates / 20 + 1)
    return peak * min(warm_up, 1) * (1 - update / updates)


if __name__ == "__main__":
    run(main)
