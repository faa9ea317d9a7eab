"""Train a guard: the chat model stays frozen, the LoRA layers and the guard head learn from labelled rows.

    loss = 1/2 BCE(z_0, unsafe; w_0) + 1/(2K) sum_k BCE(z_k, y_k; w_k),    w = negatives / positives among the rows

One plain loop with accelerate, from top to bottom; `accelerate launch train.py ...` runs the same loop on many devices.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, set_seed
from torch.nn import functional as F
from tqdm.auto import tqdm

from checkpoint import EMBEDDED, load_chat_model
from common import UserError, first_line, run, write_whole
from data import (
    BEAVERTAILS,
    SPLITS,
    answer_start_of,
    conversation,
    encode,
    encode_row,
    epoch_batches,
    is_answer,
    labels,
    load_splits,
)
from lora import trainable
from metrics import best_threshold, fit_temperature, metrics, threshold_at_fpr
from model import GUARD, NEVER, GuardedChat, Thresholds, probabilities

PROMPT_FPR = 0.02  # to refuse a harmless question is worse than to answer a harmful one, for answers are judged too


def parse_arguments():
    usage = "%(prog)s [hf_model_id] [output_dir] [options]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    add = parser.add_argument
    add("hf_model_id", nargs="?", default=EMBEDDED, help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct")
    add("output_dir", nargs="?", help="default: the next free runs/N")
    add("--dataset", nargs="+", help=f"hub id, or files; default {BEAVERTAILS}, or samples/sample.jsonl")
    add(
        "--answers-alone",
        action="store_true",
        help="learn each answer once more as a text by itself, without its prompt",
    )
    add("--guard-path", choices=("activated", "full"), help="full is the paper's")
    add("--guard-prompt", help="the question behind the conversation, on the activated path")
    names = "all-linear, names as q_proj,v_proj (the paper's), or none: the head alone learns"
    add("--lora-targets", type=lambda names: [] if names == "none" else names.split(","), help=names)
    add("--lora-r", type=int)
    add("--lora-alpha", type=float)
    add("--lora-dropout", type=float)
    add("--no-unsafe-head", dest="unsafe_head", action="store_false", help="the largest category logit stands for it")
    add("--no-clf-head-bias", dest="clf_head_bias", action="store_false")
    parser.set_defaults(**{name: value for name, value in GUARD.items() if name != "categories"})
    add("--epochs", type=int, default=3)
    add("--per-device-batch-size", type=int, default=16)
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--eval-batch-size", type=int, default=32)
    add("--learning-rate", type=float, default=1e-3)
    add("--max-fpr", type=float, help="of validation, which the threshold must keep to; default: F1 decides")
    add("--seed", type=int, default=0)
    cache = "keep the chat path's caches here, for later epochs and runs; 23 KB a token for the embedded model"
    add("--cache-dir", type=Path, help=cache)
    add("--save-steps", type=int, default=100, help="updates after which a state to go on from is saved, in an epoch")
    add("--resume", action="store_true", help="go on with the run in output_dir where its last saved state was")
    add("--report-to", choices=[tracker.value for tracker in LoggerType], help="one of accelerate's trackers")
    args = parser.parse_args()
    counts = ("epochs", "per_device_batch_size", "gradient_accumulation_steps", "eval_batch_size", "save_steps")
    for name in (*counts, "learning_rate"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    if args.max_fpr is not None and not 0 <= args.max_fpr < 1:
        raise UserError("--max-fpr must be from 0 to below 1")
    if not 0 <= args.seed < 2**31:
        raise UserError("--seed must be from 0 to 2147483647")
    if args.resume and not args.output_dir:
        raise UserError("--resume needs the run to go on with: train.py MODEL OUTPUT_DIR --resume")
    if args.dataset is None:
        args.dataset = [
            str(Path(__file__).parent / "samples/sample.jsonl") if args.hf_model_id == EMBEDDED else BEAVERTAILS
        ]
    return args


def guard_loss(logits, labels, pos_weight, unsafe_head):
    """The loss above, averaged over a batch. logits, labels (NaN where unknown): (B, 1 + K); pos_weight: (1 + K,)."""
    bce = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), pos_weight=pos_weight, reduction="none")
    bce = bce.masked_fill(labels.isnan(), 0)  # (B, 1 + K)
    categories = bce[:, 1:].sum() / max(bce[:, 1:].numel(), 1)
    return (bce[:, 0].mean() + categories) / 2 if unsafe_head else categories


def main():
    args = parse_arguments()
    output = Path(args.output_dir or next(f"runs/{n}" for n in range(1, 10**6) if not Path(f"runs/{n}").exists()))
    steps = args.gradient_accumulation_steps
    accelerator = Accelerator(gradient_accumulation_steps=steps, log_with=args.report_to, project_dir=output)
    set_seed(args.seed)

    rows, categories = load_splits(args.dataset)
    if args.answers_alone:
        answers = [row for row in rows["train"] if is_answer(row["response"])]
        rows["train"] += [row | {"prompt": row["response"], "response": None, "messages": None} for row in answers]
    chat_model, tokenizer = load_chat_model(args.hf_model_id)
    settings = {name: value for name, value in vars(args).items() if name in GUARD}
    guard = GuardedChat(chat_model, tokenizer, categories=categories, **settings)
    dtype = str(chat_model.dtype).removeprefix("torch.")
    guard.to(accelerator.device).use_fast_dtype()
    guard.score([encode(tokenizer, "Hello")])  # what cannot be guarded is refused before the folder is taken
    config = {"base_model": args.hf_model_id, "dtype": dtype, **guard.settings}
    config |= {"threshold": 0.5, "prompt_threshold": NEVER.prompt, "calibration": guard.calibration}
    config["rows"] = {split: digest(rows[split]) for split in SPLITS}
    places = ("output_dir", "cache_dir", "resume", "save_steps")
    config["arguments"] = {name: value for name, value in vars(args).items() if name not in places}
    # Not arguments of this command, but as much a part of what it computes.
    config["arguments"]["caches_kept"] = args.cache_dir is not None  # they are made alone, and round otherwise
    config["arguments"] |= {"num_processes": accelerator.num_processes, "mixed_precision": accelerator.mixed_precision}
    config["arguments"]["compute_dtype"] = str(chat_model.dtype).removeprefix("torch.")
    state = open_output(output, config, args.resume)
    accelerator.wait_for_everyone()  # or a slower process would find the files of this run in its way

    if args.cache_dir:
        guard.keep_caches(args.cache_dir)

    # Every text is tokenised once; what does not fit the context is left out here, and judged in windows in use.
    texts = {split: [encode_row(tokenizer, row) for row in rows[split]] for split in SPLITS}
    fits = [len(ids) <= guard.max_tokens for ids in texts["train"]]
    if not all(fits):
        accelerator.print(f"left out {fits.count(False)} training rows of more than {guard.max_tokens} tokens")
        for part in (rows, texts):
            part["train"] = list(itertools.compress(part["train"], fits))
        if len({row["is_safe"] for row in rows["train"]}) < 2:
            raise UserError("the training rows that fit the context are not both safe and unsafe")
    targets = {split: labels(rows[split], categories) for split in SPLITS}  # (rows, 1 + K)
    answered = {split: np.array([is_answer(row["response"]) for row in rows[split]], bool) for split in SPLITS}
    lengths = torch.tensor([len(ids) for ids in texts["train"]])
    starts = lengths  # of `full`, which judges no answer before its end, no answer is cut
    if not guard.is_full:
        pairs = zip(rows["train"], texts["train"], strict=True)
        starts = torch.tensor([answer_start_of(tokenizer, row, ids) for row, ids in pairs])
    positives, known = targets["train"].nansum(0), (~targets["train"].isnan()).sum(0)
    # Without positives the weight would be infinite; as no term then carries it, any finite one serves.
    pos_weight = ((known - positives) / positives.clamp(min=1)).to(accelerator.device)

    parameters = list(trainable(guard).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate)
    sums = torch.zeros(len(lengths), targets["train"].shape[1] + 1)  # of an epoch's logits for each row, and how many
    if state["update"]:
        learnt = state.pop("adapter")
        with torch.no_grad():
            for name, parameter in guard.adapter().items():
                parameter.copy_(learnt[name])
        optimizer.load_state_dict(state.pop("optimizer"))
        sums += state.pop("sums") * accelerator.is_main_process
    model, optimizer = accelerator.prepare(guard, optimizer)
    if accelerator.is_main_process:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(output / "config.json", config)
        write_json(output / "parameter_counts.json", parameter_counts(guard))
    if args.report_to:
        accelerator.init_trackers("lora-guard", {name: str(value) for name, value in config.items()})

    batches_per_update = accelerator.num_processes * steps
    updates = -(-len(lengths) // (args.per_device_batch_size * batches_per_update))  # in an epoch
    stops = stop_signals()
    for epoch in range(len(state["metrics"]) + 1, args.epochs + 1):
        # An epoch's order follows from the seed and its number alone, and an update's dropout from the seed and the
        # update's, so that any of them can be run again.
        generator = torch.Generator().manual_seed(args.seed + epoch)
        # About half of the answers are cut at a random token, and every eleventh before its first: a running verdict
        # is about an answer that is not finished, and the first one about a prompt alone.
        shares = (2.2 * torch.rand(len(lengths), generator=generator) - 0.2).clamp(0, 1)  # that is left of each answer
        ends = (starts + ((lengths - starts) * shares).ceil()).long().tolist()
        batches = epoch_batches(ends, args.per_device_batch_size, batches_per_update, generator)
        batches = batches[accelerator.process_index :: accelerator.num_processes]
        update = state["update"]
        there = (update - (epoch - 1) * updates) * steps  # batches that were learnt before this process began
        quiet = not accelerator.is_main_process
        bar = tqdm(batches[there:], f"epoch {epoch}/{args.epochs}", len(batches), initial=there, disable=quiet)
        if not there:
            sums.zero_()
        loss_sum, tokens, started = 0.0, 0, time.perf_counter()
        model.train()
        for number, batch in enumerate(bar):
            if number % steps == 0:
                set_seed(args.seed + update, device_specific=True)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, args.epochs * updates, args.learning_rate)
            with accelerator.accumulate(model):
                logits = model([texts["train"][row] for row in batch], [ends[row] for row in batch])  # (B, 1 + K)
                target = targets["train"][batch].to(accelerator.device)
                loss = guard_loss(logits, target, pos_weight, guard.unsafe_head)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            judged = F.pad(logits.detach().float().cpu(), (0, 1), value=1)
            sums.index_add_(0, torch.tensor(batch), judged)
            tokens += sum(ends[row] for row in batch) * accelerator.num_processes
            loss_sum += loss.detach() / steps
            if accelerator.sync_gradients:
                # Whether to stop is asked of all processes, for they have to stop at the same update.
                found = torch.stack([loss_sum, torch.full_like(loss_sum, max(stops, default=0))])
                (loss, stop), loss_sum = accelerator.reduce(found, "mean").tolist(), 0.0
                state["update"] = update = update + 1
                state["losses"].append({"update": update, "epoch": epoch, "loss": loss})
                accelerator.log({"loss": loss}, step=update)
                bar.set_postfix_str(f"loss {loss:.3f}, {tokens / (time.perf_counter() - started):.0f} tokens/s")
                if stop or update % args.save_steps == 0:
                    save_state(accelerator, output, guard, optimizer, state, sums)
                if stop:
                    accelerator.print(f"stopped after update {update}, which is saved: go on with --resume")
                    accelerator.wait_for_everyone()  # or a process that leaves first takes down the one that writes
                    model, optimizer = accelerator.free_memory(model, optimizer)
                    accelerator.end_training()
                    sys.exit(128 + max(stops, default=signal.SIGTERM))

        # The train split is scored by the passes that it was learnt in: passes of their own would double the time.
        total = add_up(accelerator, sums)
        logits = {"train": total[:, :-1] / total[:, -1:]}
        for split in SPLITS[1:]:
            logits[split] = torch.zeros_like(targets[split])
            mine = range(accelerator.process_index, len(logits[split]), accelerator.num_processes)
            logits[split][mine] = guard.score([texts[split][row] for row in mine], args.eval_batch_size)
            logits[split] = add_up(accelerator, logits[split])
        calibration = calibrate(logits["validation"], targets["validation"], pos_weight.cpu(), guard.unsafe_head)
        row = {"epoch": epoch} | epoch_metrics(logits, targets, answered, categories, calibration, args.max_fpr)
        state["metrics"].append(row)
        accelerator.log(row, step=update)
        if is_best := row["validation/auprc"] > state["best_auprc"]:
            state["best_auprc"] = row["validation/auprc"]
            config |= {name: row[name] for name in ("threshold", "prompt_threshold")} | {"calibration": calibration}
        if accelerator.is_main_process:
            save_epoch(output, guard, state, config, is_best)
        save_state(accelerator, output, guard, optimizer, state, sums)  # last, when the other files are there
        figures = (f"{s} AUPRC {row[f'{s}/auprc']:.3f} F1 {row[f'{s}/f1']:.3f}" for s in SPLITS)
        accelerator.print(f"epoch {epoch}: {', '.join(figures)}")
    # Left to the end of the process, torch's reducer may wait for a thread that waits for Python's lock.
    model, optimizer = accelerator.free_memory(model, optimizer)
    accelerator.end_training()
    if config["prompt_threshold"] == NEVER.prompt:
        accelerator.print(
            "the guard refuses no prompt: that takes validation rows without a response, safe and unsafe ones"
        )
    accelerator.print(f"the guard of the best epoch by validation AUPRC is {output / 'adapter.safetensors'}")


def learning_rate(update, updates, peak):
    """Linear warm-up over the first twentieth of the updates, then linear decay to zero."""
    return peak * min((update + 1) / (updates / 20 + 1), 1) * (1 - update / updates)


def add_up(accelerator, tensor):
    """The sum over processes, each of which has filled in the rows that it scored, on the CPU."""
    return accelerator.reduce(tensor.to(accelerator.device), "sum").cpu()


def calibrate(logits, targets, pos_weight, unsafe_head):
    """What makes probabilities of logits (N, 1 + K), for model.probabilities; targets: (N, 1 + K), NaN where unknown.

    The loss counts a positive pos_weight times, which adds its log to the logit that is best; this is undone. What is
    left is over-confidence: a temperature for unsafe, and one for all categories, fits it on these rows.
    """
    shift = pos_weight.clamp(min=1e-3).log()
    if not unsafe_head:  # the largest of several logits is shifted by no weight that is known
        shift[0] = 0
    temperature = [1.0] * len(shift)
    for columns in (slice(0, 1), slice(1, None)):
        known = ~targets[:, columns].isnan()
        if known.any():
            some = targets[:, columns][known], (logits - shift)[:, columns][known]
            temperature[columns] = [fit_temperature(*(values.numpy() for values in some))] * known.shape[1]
    return {"shift": shift.tolist(), "temperature": temperature}


def choose_thresholds(labels, scores, answered, max_fpr):
    """Thresholds from validation rows: for answers the best F1, for prompts the highest recall that refuses few safe
    ones, or for both the highest recall at `max_fpr`. No prompt is refused where none was there to learn it from.

    labels, scores, answered: (N,); the scores are probabilities.
    """

    def chosen(rows, limit):
        if limit is None:
            label, score = labels[rows], scores[rows]
            measured, expected = best_threshold(label, score), best_threshold(score, score)
            f1, other = (metrics(label, score, threshold)["f1"] for threshold in (measured, expected))
            # Which few rows near it are harmful moves the threshold of the measured F1, and not that of the F1 which is
            # expected if the probabilities are right (Lipton et al., arXiv 1402.1892). Beyond a standard error, they
            # are not.
            return expected if other >= f1 - math.sqrt(f1 * (1 - f1) / label.sum()) else measured
        return threshold_at_fpr(labels[rows], scores[rows], limit)[0]

    both = [len(np.unique(labels[rows])) == 2 for rows in (~answered, answered)]
    prompt = chosen(~answered, PROMPT_FPR if max_fpr is None else max_fpr) if both[0] else NEVER.prompt
    return Thresholds(prompt, chosen(answered if both[1] else slice(None), max_fpr))


def epoch_metrics(logits, targets, answered, categories, calibration, max_fpr):
    """A row of metrics.csv: "split/metric" at the thresholds chosen on validation, "split/category/metric" where the
    category's logit turns positive, which in the loss weighs what is missed as much as what is flagged in vain."""
    scores = {split: probabilities(values, calibration)[:, 0].numpy() for split, values in logits.items()}
    labels = {split: values.numpy() for split, values in targets.items()}
    thresholds = choose_thresholds(labels["validation"][:, 0], scores["validation"], answered["validation"], max_fpr)
    row = {"threshold": thresholds.response, "prompt_threshold": thresholds.prompt}
    for split in SPLITS:
        flagged_from = np.where(answered[split], thresholds.response, thresholds.prompt)
        found = {split: metrics(labels[split][:, 0], scores[split], flagged_from)}
        for k, category in enumerate(categories, 1):
            known = ~np.isnan(labels[split][:, k])
            found[f"{split}/{category}"] = metrics(labels[split][known, k], logits[split][:, k].numpy()[known], 0.0)
        row |= {f"{name}/{metric}": value for name, values in found.items() for metric, value in values.items()}
    return row


def parameter_counts(guard):
    """How large the guard is, and its share of the chat model that it guards."""
    sizes = {name: parameter.numel() for name, parameter in guard.adapter().items()}
    trained, head = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith("guard_head."))
    chat_model = sum(parameter.numel() for parameter in guard.parameters()) - trained
    counts = {"chat_model": chat_model, "lora": trained - head, "guard_head": head, "trained": trained}
    return counts | {"trained_share_of_chat_model": trained / chat_model, "adapter_bytes": 4 * trained}


def open_output(output, config, resume):
    """The state of the run that is to go on, or that of a new run. Raises UserError where neither can be had."""
    state, path = {"update": 0, "best_auprc": -1.0, "losses": [], "metrics": []}, output / "checkpoints/state.pt"
    if not resume:
        if (output / "config.json").exists():
            raise UserError(f"{output} holds another run: name another folder, or go on with that run by --resume")
        return state
    try:
        saved = json.loads((output / "config.json").read_text())
        if path.exists():  # or the run was killed before it had learnt anything worth keeping
            saved_state = torch.load(path, map_location="cpu", weights_only=True)
            state = {name: saved_state[name] for name in (*state, "adapter", "optimizer", "sums")}
        parts = [(part, saved[part], config[part]) for part in ("base_fingerprint", "rows", "arguments")]
        differing = [f"{part}.{name}" for part, old, new in parts for name in new if old.get(name) != new[name]]
        differing = [name for name in differing if name != "arguments.dataset"]  # the rows are compared themselves
        config |= {name: saved[name] for name in ("threshold", "prompt_threshold", "calibration")}
    except Exception as error:  # missing and damaged files raise classes of three libraries
        raise UserError(f"{output} holds no run to go on with: {first_line(error)}") from error
    if differing:
        raise UserError(f"the run in {output} was started otherwise; what differs: {', '.join(differing)}")
    for left in output.rglob("*.[0-9]*.tmp"):  # of writes that were killed
        left.unlink(missing_ok=True)
    return state


def digest(rows):
    """What tells the rows of a split, in their order, from others."""
    known = []
    for row in rows:
        prompt, response, history = conversation(row)
        known.append([prompt, response, row["category"], row["is_safe"], *history])
    return f"{len(rows)}, sha256 {hashlib.sha256(json.dumps(known).encode()).hexdigest()}"


def stop_signals():
    """A list to which Ctrl-C and SIGTERM add their numbers from now on; a second Ctrl-C ends the process at once."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(signal.SIGINT, interrupt)

    interrupt = signal.signal(signal.SIGINT, catch)
    signal.signal(signal.SIGTERM, catch)
    return caught


def save_state(accelerator, output, guard, optimizer, state, sums):
    """Write all that --resume needs, in one file, so that it is of one update."""
    sums = add_up(accelerator, sums)
    if accelerator.is_main_process:
        adapter = {name: parameter.detach().cpu() for name, parameter in guard.adapter().items()}
        buffer = io.BytesIO()
        torch.save(state | {"adapter": adapter, "optimizer": optimizer.optimizer.state_dict(), "sums": sums}, buffer)
        write_whole(output / "checkpoints/state.pt", buffer.getbuffer())


def save_epoch(output, guard, state, config, is_best):
    """Write the files of an epoch for those who use them."""
    guard.save_adapter(output / f"checkpoints/epoch_{len(state['metrics'])}.safetensors")
    if is_best:
        guard.save_adapter(output / "adapter.safetensors")
        write_json(output / "config.json", config)
    for name, rows in (("metrics.csv", state["metrics"]), ("train_losses.csv", state["losses"])):
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        write_whole(output / name, text.getvalue().encode())


def write_json(path, content):
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


if __name__ == "__main__":
    run(main)
