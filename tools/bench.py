"""Measure how fast the guard is. docs/RESULTS.md has the figures.

Contestants take turns in one process: a shared machine's speed drifts. A ratio is the median over the rounds.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import peft
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))

from chat import Text, encode, fork
from checkpoint import EMBEDDED, build_guard, load_chat_model, save_adapter, use_fast_dtype
from data import encode_row, labels, read_rows
from errors import UserError, run
from lora import LoRALinear, linear_size
from train import guard_loss, over_cuts
from training_run import processor

PROMPT = "Write a long story about a lighthouse keeper who teaches the village's children to read the stars."
MESSAGES = [{"role": "user", "content": PROMPT}]
LENGTHS = (128, 512, 2048, 8192)  # tokens of a conversation
VERDICT_EVERY = (16, 8, 32)  # tokens from verdict to verdict, the default first
BATCH = 16  # rows of a training batch, as in train.py
SCORED = 32  # rows of a scoring batch, as in GuardedChat.judge
SECONDS = 60  # after which no more rounds of the same contestants start
PRODUCTS = (1024, 2048, 3072)  # sizes of the square matrices
GROWTH = {"rows": (4, 8, 16, 32), "length": (64, 128, 256, 512), "rank": (4, 16, 64)}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", default=EMBEDDED, help="chat model, as for train.py")
    add("--dataset", nargs="+", default=[str(Path(__file__).parents[1] / "samples/sample.jsonl")])
    add("--rounds", type=int, default=5)
    add("--quick", action="store_true", help="less of everything, for a first look")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE.png", help="draw the time of a verdict over the length")
    add("--plot-growth", metavar="FILE.png", help="draw time and memory over rows, length and rank")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def main():
    args = parse_arguments()
    rounds, lengths = (1, LENGTHS[:3]) if args.quick else (args.rounds, LENGTHS)
    guard, full = load(args.model, "train"), load(args.model, "score", guard_path="full")
    rows = [row | {"category": {}} for _, _, part in read_rows(args.dataset) for row in part][:512]
    if len(rows) < SCORED:
        raise UserError(f"there must be at least {SCORED} rows to measure with")
    texts = [encode_row(guard.tokenizer, row) for row in rows]
    result = {"processor": processor(torch.device("cpu")), "threads": torch.get_num_threads()}
    result["dtype"] = str(guard.chat_model.dtype)[6:]  # without "torch."
    result["versions"] = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    result |= {"rows": len(rows), "longest_row": max(len(text.ids) for text in texts)}
    result |= shown(measure_rows(args.model, guard, texts, labels(rows, guard.config.categories), rounds))
    last = [texts[row].ids for row in sample(texts, BATCH)[-1]]
    result |= shown(measure_peft(args.model, guard, full, last, rounds))
    guard = load(args.model, "chat")
    result |= {"chat_dtype": str(guard.chat_model.dtype)[6:], "full_dtype": str(full.chat_model.dtype)[6:]}
    result |= shown(measure_answers(args.model, guard, rounds if args.quick else 5 * rounds))
    for length in lengths:
        result |= shown(measure_verdict(guard, full, length, rounds))
    result["verdict_over_decode_step"] = max(result[f"verdict_over_decode_step_{n}"] for n in lengths)
    if args.plot_growth:
        result["growth"] = measure_growth(args.model)
    lines = (f"{name:32} {f'{x:.3f}' if isinstance(x, float) else x}" for name, x in result.items())
    print(json.dumps(result) if args.json else "\n".join(lines), flush=True)
    if args.plot or args.plot_growth:
        from tools.plots import plot_growth, plot_verdicts
    if args.plot_growth:
        plot_growth(args.plot_growth, result["growth"])
    if args.plot:
        name, dtype = Path(args.model).name, result["chat_dtype"]
        caption = f"One verdict, {name} in {dtype}, {result['threads']} CPU threads"
        plot_verdicts(args.plot, {length: result[f"milliseconds_{length}"] for length in lengths}, caption)


def shown(fields):
    """The fields, printed on standard error as they come: a run that is stopped leaves what it measured."""
    print(json.dumps(fields), file=sys.stderr, flush=True)
    return fields


def load(model, use, **settings):
    """A guard with random adapters. It trains and scores in the fast dtype, and chats in the model's own."""
    torch.manual_seed(0)
    names = [f"category {n}" for n in range(14)]  # as many as BeaverTails has
    guard = build_guard(*load_chat_model(model), {"categories": names, **settings}, "cpu")
    if use != "chat":
        use_fast_dtype(guard)
    for parameter in guard.adapter().values():
        torch.nn.init.normal_(parameter, std=0.02)  # with B at zero, peft would agree whatever the scale is
    return guard


def sample(texts, size):
    """Row numbers of about four batches: rows sorted by length, a batch from the middle of each quarter."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row].ids))
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    return batches[len(batches) // 8 :: max(1, len(batches) // 4)]


def turns(what, contestants, rounds):
    """{name: seconds, by round}. A turn repeats a call until half a second has passed; its median counts.

    A slow machine gets fewer rounds.
    """
    print(f"measuring {what}", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    found = {name: [] for name in contestants}
    for contestant in contestants.values():  # warms up
        contestant()
    for number in range(rounds):
        if number and time.perf_counter() - begun > SECONDS:
            break
        for name, contestant in contestants.items():
            turn = []
            while sum(turn) < 0.5:
                started = time.perf_counter()
                contestant()
                turn.append(time.perf_counter() - started)
            found[name].append(median(turn))
    return found


def ratio(found, one, other):
    """Time of `one` over time of `other`: the median over the rounds."""
    return median(a / b for a, b in zip(found[one], found[other], strict=True))


def operations(guard, batches, training):
    """Operations of verdicts or training steps on the activated path, for batches of texts.

    Only matrix products count. Padding, the language-model head and unused gradients do not.
    """
    layers = [module for module in guard.modules() if isinstance(module, LoRALinear)]
    config = guard.chat_model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * width * config.num_hidden_layers
    frozen = sum(inside * outside for inside, outside in (linear_size(layer.base) for layer in layers))
    question = guard.guard_prompt_ids.shape[1]
    texts = [text for batch in batches for text in batch]
    lengths = [len(text.ids) for text in texts]
    cuts = [cut for text in texts for cut in text.cuts(guard.config.verdict_every)]
    read = sum(2 * frozen * length + 2 * attention * length**2 for length in lengths)  # causal: half
    judged = sum(2 * frozen + 4 * attention * (cut + question / 2) for cut in cuts) * question
    lora = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers) * 2 * question * len(cuts)
    # Backward needs one more product where W is frozen (dy W), and two in LoRA (its factors learn).
    return read + judged * (2 if training else 1) + lora * (3 if training else 1)


def logits_of(guard, texts):
    """Logits (B, 1 + K) of texts as train.py learns from them."""
    cuts = [text.cuts(guard.config.verdict_every) for text in texts]
    return over_cuts(guard([text.ids for text in texts], cuts), cuts)


def learn(logits, optimizer, targets):
    """One step of training on logits (B, 1 + K)."""
    guard_loss(logits, targets, torch.ones(targets.shape[1]), True).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def padded(conversations):
    """Lists of token ids -> ids, mask, both (B, T)."""
    rows = [torch.tensor(ids) for ids in conversations]
    return [pad_sequence(part, batch_first=True) for part in (rows, [torch.ones_like(row) for row in rows])]


def reference(guard, chat_model):
    """(judge, optimizer) set up as LoRA-Guard's authors do: LoRA on q and v, right padding, a mask."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(chat_model.base_model, config).train()
    head = torch.nn.Linear(guard.head.in_features, guard.head.out_features)

    def judge(texts, longest=0):  # pads to at least so many tokens
        ids, mask = (rows[:-1] for rows in padded([text.ids for text in texts] + [[0] * longest]))  # (B, T)
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # (B, T, H)
        return head(hidden[torch.arange(len(texts)), mask.sum(1) - 1].float())

    return judge, torch.optim.AdamW([*model.parameters(), *head.parameters()])


def measure_rows(model, guard, texts, targets, rounds):
    """Speed of training and scoring, beside peft and a limit: the fastest of a few square matrix products."""
    ours = [([texts[row] for row in batch], targets[batch]) for batch in sample(texts, BATCH)]
    theirs = [part[: BATCH // 4] for part in ours[0]]  # more would not fit in memory beside a larger model
    scored = [texts[row] for batch in sample(texts, SCORED) for row in batch]
    optimizer = torch.optim.AdamW(guard.parameters())
    chat_model = load_chat_model(model)[0].to(guard.chat_model.dtype)
    peer, longest = reference(guard, chat_model), max(len(text.ids) for text in texts)
    mixed = [scored[n] for n in torch.randperm(len(scored), generator=torch.Generator().manual_seed(0))]
    file = [mixed[start : start + SCORED] for start in range(0, len(mixed), SCORED)]  # in a file's order
    contestants = {
        "ours": lambda: [learn(logits_of(guard.train(), texts), optimizer, y) for texts, y in ours],
        "peer": lambda: learn(peer[0](theirs[0], longest), peer[1], theirs[1]),
        "score": lambda: guard.judge(scored),
        "peer score": lambda: [torch.no_grad()(peer[0])(batch) for batch in file],
    }
    pairs = {size: torch.randn(2, size, size).to(chat_model.dtype) for size in PRODUCTS}
    contestants |= {size: lambda pair=pair: pair[0] @ pair[1] for size, pair in pairs.items()}
    found = turns("training and scoring", contestants, rounds)
    products = zip(*([seconds / (2 * size**3) for seconds in found[size]] for size in PRODUCTS), strict=True)
    found["limit"] = [min(seconds) for seconds in products]  # for one operation, in each round
    learnt = [texts for texts, _ in ours]
    judged = [scored[start : start + SCORED] for start in range(0, len(scored), SCORED)]
    rows = sum(map(len, learnt))
    return {
        "limit_gflops": median(1e-9 / seconds for seconds in found["limit"]),
        "train_rows_per_second": rows / median(found["ours"]),
        "train_speedup": ratio(found, "peer", "ours") * rows / len(theirs[0]),
        "train_fraction_of_limit": operations(guard, learnt, training=True) * ratio(found, "limit", "ours"),
        "score_speedup": ratio(found, "peer score", "score"),
        "score_tokens_per_second": sum(len(text.ids) for text in scored) / median(found["score"]),
        "score_fraction_of_limit": operations(guard, judged, training=False) * ratio(found, "limit", "score"),
    }


def logits_at_end(guard, conversations):
    """Logits (B, 1 + K) of B lists of token ids."""
    return guard(conversations, [[len(ids)] for ids in conversations])[:, 0]


@torch.no_grad()
def measure_peft(model, guard, full, texts, rounds):
    """Saved adapters in peft: how far their logits are from ours, and the time of the full path."""
    prompt = encode(guard.tokenizer, MESSAGES).ids
    fields = {}
    for each in (guard, full):
        question = each.guard_prompt_ids[0].tolist()
        options = {"r": each.config.lora_r, "lora_alpha": each.config.lora_alpha, "task_type": "CAUSAL_LM"}
        options |= {"target_modules": "all-linear", "alora_invocation_tokens": question or None}
        chat_model = load_chat_model(model)[0].to(each.chat_model.dtype)
        with tempfile.TemporaryDirectory() as folder:
            peft.LoraConfig(**options).save_pretrained(folder)
            save_adapter(Path(folder, "adapter_model.safetensors"), each.adapter(), {})
            theirs = peft.PeftModel.from_pretrained(chat_model, folder, autocast_adapter_dtype=False).eval()
        hidden = theirs(torch.tensor([prompt + question]), output_hidden_states=True).hidden_states[-1]
        apart = each.head(hidden[:, -1].float()) - logits_at_end(each.eval(), [prompt])
        fields[f"logits_from_peft_{each.config.guard_path}"] = apart.abs().max().item()
    ids, mask = padded(texts)
    last = torch.arange(len(ids)), mask.sum(1) - 1
    inner = theirs.base_model.model.base_model  # with the adapter of `full`
    contestants = {
        "ours": lambda: logits_at_end(full, texts),
        "peer": lambda: full.head(inner(input_ids=ids, use_cache=False).last_hidden_state[last].float()),
    }
    fields["logits_apart"] = (contestants["peer"]() - contestants["ours"]()).abs().max().item()
    found = turns("the full path and peft's", contestants, rounds)
    return fields | {"lora_over_peft": ratio(found, "ours", "peer")}


def measure_answers(model, guard, rounds, tokens=128):
    """An answer without a guard, with the gate shut, and moderated. Ratios near 1 need more rounds."""
    untouched, _ = load_chat_model(model)  # with the guard's tensors: their place in memory changes the speed
    weights = {name.replace(".base.", "."): tensor for name, tensor in guard.chat_model.state_dict().items()}
    untouched.load_state_dict({name: weights[name] for name in untouched.state_dict()}, assign=True)
    prompt = encode(guard.tokenizer, MESSAGES)
    ids = torch.tensor([prompt.ids])
    options = {"attention_mask": torch.ones_like(ids), "pad_token_id": guard.tokenizer.pad_token_id}
    options |= {"max_new_tokens": tokens, "do_sample": False}
    if untouched.generate(ids, **options).shape[1] < len(prompt.ids) + tokens:
        raise UserError(f"the answer of {model} ends before {tokens} tokens")
    models = {"plain": untouched, "off": guard.chat_model}
    contestants = {name: lambda model=model: model.generate(ids, **options) for name, model in models.items()}
    for n in VERDICT_EVERY:
        contestants[n] = lambda n=n: list(guard.stream(prompt, verdict_every=n, **options))
    found = turns("answers", contestants, rounds)
    fields = {"plain_seconds": median(found["plain"]), "off_over_plain": ratio(found, "off", "plain")}
    fields["stream_over_plain"] = ratio(found, VERDICT_EVERY[0], "plain")
    return fields | {f"stream_over_plain_every_{n}": ratio(found, n, "plain") for n in VERDICT_EVERY[1:]}


@torch.no_grad()
def measure_verdict(guard, full, length, rounds):
    """A verdict on a conversation of so many tokens, and the next decode step of its chat."""
    ids = (encode(guard.tokenizer, MESSAGES).ids * length)[:length]
    token = torch.tensor([ids[:1]])
    cache = guard.read(torch.tensor([ids]))
    contestants = {
        "decode step": lambda: guard.chat_model(input_ids=token, past_key_values=fork(cache)),
        "activated": lambda: guard.guard_logits(guard.ask(cache, torch.tensor([[length]])))[:, 0],
        "full": lambda: logits_at_end(full, [ids]),
    }
    found = turns(f"verdicts on {length} tokens", contestants, rounds)
    return {
        f"milliseconds_{length}": {name: 1000 * median(times) for name, times in found.items()},
        f"verdict_speedup_{length}": ratio(found, "full", "activated"),
        f"verdict_over_decode_step_{length}": ratio(found, "activated", "decode step"),
    }


def measure_growth(model):
    """{name: {"train" or "score": [(value, seconds, bytes), ...]}}, each point in a process of its own."""
    found = {name: {} for name in GROWTH}
    points = [(name, what, value) for name in GROWTH for what in ("train", "score") for value in GROWTH[name]]
    for name, what, value in points:
        print(f"measuring growth: {what} with {name} {value}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as process:  # a fork would start with our memory
            point = process.submit(peak, model, what, **{name: value}).result()
        found[name].setdefault(what, []).append((value, *point))
    return found


def peak(model, what, rows=16, length=128, rank=16):
    """(seconds of the second step, peak resident bytes) of a process that only trains or only scores."""
    guard = load(model, "train", lora_r=rank)
    texts = [Text((encode(guard.tokenizer, MESSAGES).ids * length)[:length], 0, True)] * rows
    targets = torch.zeros(rows, guard.head.out_features)
    optimizer = torch.optim.AdamW(guard.parameters())
    for _ in range(2):
        started = time.perf_counter()
        if what == "train":
            learn(logits_of(guard.train(), texts), optimizer, targets)
        else:
            guard.judge(texts, batch_size=rows)
    # Not from getrusage, which starts at the peak of the process that started this one. VmHWM is in kB.
    peak_kb = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    return time.perf_counter() - started, 1024 * peak_kb


if __name__ == "__main__":
    run(main)
