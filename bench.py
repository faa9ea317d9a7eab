"""The measurements behind the README's figures of speed.

What is compared takes turns in one process, and a ratio is the median of those of the rounds: a shared machine can be a
quarter slower a minute later, but hardly from one turn to the next. The peer is peft, in the way that LoRA-Guard's
authors use it: LoRA on q and v, every row padded to the longest, with an attention mask.

Operations are counted as those of the matrix products that the guard's formulas need, two for each multiplication: no
padding, no language-model head, the causal half of the attention, no gradient where none is needed. The limit is what
the fastest of a few square products of the same type does in a second, as another contestant of the same rounds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from torch import nn

from checkpoint import EMBEDDED, load_chat_model
from common import UserError, run
from data import conversation, encode, evaluation_rows, labels
from lora import LoRALinear, linear_sizes, trainable
from model import NEVER, GuardedChat, lend
from train import guard_loss

PROMPT = (
    "Write a long story about a lighthouse keeper who teaches the children of the village to read the stars."
)
LENGTHS = (128, 512, 2048, 8192)  # tokens of a conversation
STEPS = (16, 8, 32)  # tokens from verdict to verdict, the default first
BATCH = 16  # rows, the default of train.py
SCORED = 32  # and that of GuardedChat.score
PRODUCTS = (1024, 2048, 3072)  # sizes of the square matrices
GROWTH = {"rows": (4, 8, 16, 32), "length": (64, 128, 256, 512), "rank": (4, 16, 64)}  # around 16, 128 and 16


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=EMBEDDED, help="chat model, as for train.py")
    parser.add_argument(
        "--dataset", nargs="+", default=[str(Path(__file__).with_name("samples") / "sample.jsonl")]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the time of a verdict over the length")
    parser.add_argument(
        "--plot-growth", metavar="FILE.png", help="draw time and memory over rows, length and rank"
    )
    parser.add_argument(
        "--peak-of", nargs=4, help=argparse.SUPPRESS
    )  # what a process of its own is asked for
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    return args


def turns(contestants, rounds):
    """{name: seconds in each round} of functions that take turns of half a second or one call, whichever is longer."""
    found = {name: [] for name in contestants}
    for contestant in contestants.values():  # warms up
        contestant()
    for _ in range(rounds):
        for name, contestant in contestants.items():
            turn = []
            while sum(turn) < 0.5:
                started = time.perf_counter()
                contestant()
                turn.append(time.perf_counter() - started)
            found[name].append(statistics.median(turn))
    return found


def ratio(found, one, other):
    """How many times as long as `other` it is that `one` takes: the median over the rounds."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def load(args, **settings):
    """A guard with random adapters, which take the time that trained ones would, of BeaverTails' 14 categories."""
    torch.manual_seed(0)
    settings = {"categories": [f"category {number}" for number in range(14)]} | settings
    return GuardedChat(*load_chat_model(args.model), **settings)


def dtype_of(guard):
    return str(guard.chat_model.dtype).removeprefix("torch.")


def sample(texts, size):
    """Batches of texts of similar length, as row numbers: from the middle of each quarter, in the order of length."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    return batches[len(batches) // 8 :: max(1, len(batches) // 4)]


# Generation.


def share_weights(guard, untouched):
    """Give another copy of a guard's chat model the same tensors: where they lie can make a token 2 % slower."""
    weights = {name.replace(".base.", "."): tensor for name, tensor in guard.chat_model.state_dict().items()}
    untouched.load_state_dict({name: weights[name] for name in untouched.state_dict()}, assign=True)


def time_stream(guard, untouched, rounds, tokens=128):
    """Turns of writing an answer: without a guard, with the gate shut, with a verdict every N tokens."""
    share_weights(guard, untouched)
    prompt = encode(guard.tokenizer, PROMPT)
    ids = torch.tensor([prompt])

    def plain(model):
        def generate():
            options = {"attention_mask": torch.ones_like(ids), "pad_token_id": guard.tokenizer.pad_token_id}
            output = model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
            assert output.shape[1] == len(prompt) + tokens, "the answer ended early"

        return generate

    def moderated(every):
        return lambda: guard.generate([prompt], NEVER, max_new_tokens=tokens, verdict_every=every)

    contestants = {"plain": plain(untouched), "off": plain(guard.chat_model)}
    return turns(contestants | {every: moderated(every) for every in STEPS}, rounds)


@torch.no_grad()
def time_verdicts(activated, full, length, rounds):
    """Turns of a verdict on a conversation of `length` tokens, and of one decode step of the chat behind it."""
    ids = (encode(activated.tokenizer, PROMPT) * length)[:length]
    token = torch.tensor([ids[:1]])
    cache = activated.chat_model.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    contestants = {
        "decode step": lambda: activated.chat_model(input_ids=token, past_key_values=lend(cache)),
        "activated": lambda: activated.judge(cache),
        "full": lambda: full([ids]),
    }
    return turns(contestants, rounds)


# Training and scoring.


def training_step(model, parameters, judge, targets):
    """A function that learns from one batch: judge(batch) gives logits; batch: row numbers."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    weight = torch.ones(targets.shape[1])

    def step(batch):
        guard_loss(judge(batch), targets[batch], weight, True).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    return step


def our_step(guard, texts, targets):
    parameters = list(trainable(guard).values())
    return training_step(guard, parameters, lambda batch: guard([texts[row] for row in batch]), targets)


def their_step(args, dtype, texts, targets):
    """The reference's way of training, by peft: LoRA on q and v, every row padded to the longest, with a mask."""
    chat_model, tokenizer = load_chat_model(args.model, dtype)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(chat_model.base_model, config)
    head = nn.Linear(chat_model.get_output_embeddings().weight.shape[-1], targets.shape[1])
    longest = max(map(len, texts))
    pad = tokenizer.pad_token_id or 0

    def judge(batch):
        ids = torch.tensor([texts[row] + [pad] * (longest - len(texts[row])) for row in batch])
        mask = torch.tensor([[1] * len(texts[row]) + [0] * (longest - len(texts[row])) for row in batch])
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return head(hidden[torch.arange(len(batch)), mask.sum(1) - 1].float())

    parameters = [p for p in [*model.parameters(), *head.parameters()] if p.requires_grad]
    return training_step(model, parameters, judge, targets)


def operations(guard, lengths, training):
    """Operations that conversations of so many tokens need on the activated path, judged or learnt from."""
    layers = [module for module in guard.modules() if isinstance(module, LoRALinear)]
    config = guard.chat_model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * width * config.num_hidden_layers
    frozen = sum(inside * outside for inside, outside in (linear_sizes(layer.base) for layer in layers))
    low_rank = sum(parameter.numel() for layer in layers for parameter in (layer.lora_A, layer.lora_B))
    question, total = guard.guard_prompt_ids.shape[1], 0
    for length in lengths:
        total += (
            2 * frozen * length + 2 * attention * length**2
        )  # the chat path's pass, half of a square of attention
        seen = 4 * attention * question * (length + question / 2)
        judged = 2 * frozen * question + seen
        # Backward there is one more product for each: by x alone where W is frozen, by x and by the factor in LoRA.
        total += judged * (2 if training else 1) + 2 * low_rank * question * (3 if training else 1)
    return total


def products(dtype):
    """The contestants that the limit is made of."""
    pairs = {size: torch.randn(2, size, size).to(dtype) for size in PRODUCTS}
    return {size: lambda pair=pair: pair[0] @ pair[1] for size, pair in pairs.items()}


def limits(found):
    """Operations in a second of the fastest product of each round."""
    rounds = zip(*(found[size] for size in PRODUCTS), strict=True)
    return [max(2 * size**3 / seconds for size, seconds in zip(PRODUCTS, one, strict=True)) for one in rounds]


def fraction_of_limit(found, name, needed):
    """The share of the limit at which `name` does the operations that it needs: the median over the rounds."""
    rounds = zip(found[name], limits(found), strict=True)
    return statistics.median(needed / seconds / limit for seconds, limit in rounds)


def time_training(args, guard, texts, targets, rounds):
    """Turns of our learning a sample of batches, of the products and of the peer; {"ours", "peer"}: row numbers."""
    ours = sample(texts, BATCH)
    learnt = [row for batch in ours for row in batch]
    theirs = learnt[: BATCH // 4 if args.quick else BATCH]
    step, peer = our_step(guard, texts, targets), their_step(args, dtype_of(guard), texts, targets)
    contestants = {"ours": lambda: [step(batch) for batch in ours]} | products(guard.chat_model.dtype)
    return turns(contestants | {"peer": lambda: peer(theirs)}, rounds), {"ours": learnt, "peer": theirs}


def peft_config(guard, **options):
    """The settings of a guard's adapters as peft's."""
    names = sorted(
        {name.rpartition(".")[2] for name, m in guard.named_modules() if isinstance(m, LoRALinear)}
    )
    r, lora_alpha = guard.settings["lora_r"], guard.settings["lora_alpha"]
    return peft.LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=names, **options)


@torch.no_grad()
def time_forward(args, full, texts, rounds):
    """Turns of the `full` path's pass over a batch and of peft's with the same tensors; how far the logits differ."""
    chat_model, _ = load_chat_model(args.model, dtype_of(full))
    theirs = peft.get_peft_model(chat_model, peft_config(full), autocast_adapter_dtype=False).eval()
    tensors = {name: tensor for name, tensor in full.adapter().items() if "lora_" in name}
    peft.set_peft_model_state_dict(theirs, tensors)
    ids, mask = full._pad(texts, "right")
    last = torch.arange(len(ids)), mask.sum(1) - 1

    def peer():
        hidden = theirs.base_model.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return full.head(hidden[last].float())

    difference = (peer() - full(texts)).abs().max().item()
    return turns({"ours": lambda: full(texts), "peer": peer}, rounds), difference


def load_in_peft(args, guard):
    """How far the logits of a saved adapter, loaded by peft from its folder, are from the guard's own."""
    ids, question = encode(guard.tokenizer, PROMPT), guard.guard_prompt_ids[0].tolist()
    invocation = {} if guard.is_full else {"alora_invocation_tokens": question}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        peft_config(guard, task_type="CAUSAL_LM", **invocation).save_pretrained(folder)
        guard.save_adapter(Path(folder) / "adapter_model.safetensors")
        chat_model, _ = load_chat_model(args.model, dtype_of(guard))
        theirs = peft.PeftModel.from_pretrained(chat_model, folder).eval()
        hidden = theirs(torch.tensor([ids + question]), output_hidden_states=True).hidden_states[-1]
        return (guard.head(hidden[:, -1].float()) - guard.eval()([ids])).abs().max().item()


# Growth.


def peak_of(args, what, rows, length, rank):
    """(seconds of the second step, peak resident bytes) of a process that trains or scores and does nothing else."""
    guard = load(args, lora_r=int(rank))
    guard.use_fast_dtype()
    ids = (encode(guard.tokenizer, PROMPT) * int(length))[: int(length)]
    texts = [ids] * int(rows)
    targets = torch.zeros(len(texts), 1 + len(guard.categories))
    step = (
        our_step(guard, texts, targets) if what == "train" else lambda batch: guard.score(texts, len(texts))
    )
    for _ in range(2):
        started = time.perf_counter()
        step(range(len(texts)))
    # Not getrusage's, which begins with what the process that started this one had. VmHWM is in kB.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return time.perf_counter() - started, 1024 * int(status["VmHWM"].split()[0])


def measure_growth(args):
    """{name: {"train" or "score": [(value, seconds, bytes), ...]}}, each of them in a process of its own."""
    found = {}
    for name, values in GROWTH.items():
        for what in ("train", "score"):
            for value in values:
                shape = {"rows": 16, "length": 128, "rank": 16} | {name: value}
                command = [sys.executable, __file__, args.model, "--peak-of", what, *map(str, shape.values())]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found.setdefault(name, {}).setdefault(what, []).append((value, *json.loads(output)))
    return found


def draw_growth(found, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(found), figsize=(10, 5), layout="constrained", sharey="row", squeeze=False
    )
    for column, (name, measured) in enumerate(found.items()):
        for what, points in measured.items():
            values, seconds, peaks = zip(*points, strict=True)
            axes[0, column].plot(values, seconds, marker="o", label=what)
            axes[1, column].plot(values, [peak / 1e9 for peak in peaks], marker="o", label=what)
        axes[0, column].set(ylim=0)
        axes[1, column].set(ylim=0, xlabel={"rows": "rows", "length": "tokens a row", "rank": "rank"}[name])
    axes[0, 0].set(ylabel="seconds")
    axes[1, 0].set(ylabel="peak memory, GB")
    axes[0, 0].legend()
    figure.savefig(path, dpi=90)


def draw(verdicts, path, caption):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, marker in (("full", "s"), ("activated", "o"), ("decode step", "x")):
        axes.plot(list(verdicts), [times[name] for times in verdicts.values()], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the conversation", ylabel="ms", title=caption)
    axes.set_xticks(list(verdicts), map(str, verdicts))
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    args = parse_arguments()
    if args.peak_of:
        return print(json.dumps(peak_of(args, *args.peak_of)))
    if args.plot or args.plot_growth:
        import matplotlib.pyplot  # noqa: F401  before all is measured in vain
    rounds, lengths = (1, LENGTHS[:3]) if args.quick else (args.rounds, LENGTHS)
    guard, full = load(args), load(args, guard_path="full")
    guard.use_fast_dtype()
    full.use_fast_dtype()
    dtype = dtype_of(guard)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    result = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "versions": versions,
    }

    if len(rows := evaluation_rows(args.dataset)[:512]) < SCORED:
        raise UserError(f"there must be at least {SCORED} rows to measure with")
    texts = [encode(guard.tokenizer, *conversation(row)) for row in rows]
    targets = labels([row | {"category": None} for row in rows], guard.categories)
    result |= {"rows": len(rows), "longest_row": max(map(len, texts))}
    training, learnt = time_training(args, guard, texts, targets, rounds)
    needed = operations(guard, [len(texts[row]) for row in learnt["ours"]], training=True)
    result |= {
        "limit_gflops": statistics.median(limits(training)) / 1e9,
        "train_rows_per_second": len(learnt["ours"]) / statistics.median(training["ours"]),
        "train_speedup": ratio(training, "peer", "ours") * len(learnt["ours"]) / len(learnt["peer"]),
        "train_fraction_of_limit": fraction_of_limit(training, "ours", needed),
    }

    guard.eval()
    some = [texts[row] for batch in sample(texts, SCORED) for row in batch]
    scoring = turns({"score": lambda: guard.score(some)} | products(guard.chat_model.dtype), rounds)
    result["score_tokens_per_second"] = sum(map(len, some)) / statistics.median(scoring["score"])
    needed = operations(guard, map(len, some), training=False)
    result["score_fraction_of_limit"] = fraction_of_limit(scoring, "score", needed)

    result |= {f"logits_from_peft_{g.settings['guard_path']}": load_in_peft(args, g) for g in (guard, full)}
    full.cast_for_use()
    forward, difference = time_forward(args, full, some[-BATCH:], rounds)
    result |= {"lora_over_peft": ratio(forward, "ours", "peer"), "logits_apart": difference}

    # A chat is written in the dtype that its model is stored in, whatever training and scoring compute in, to which
    # `full`, a pass over many tokens, keeps.
    guard, (untouched, _) = load(args), load_chat_model(args.model)
    guard.cast_for_use()
    stream = time_stream(guard, untouched, rounds if args.quick else 5 * rounds)  # its ratios are near to 1
    result |= {
        "chat_dtype": dtype_of(guard),
        "full_dtype": dtype_of(full),
        "plain_seconds": statistics.median(stream["plain"]),
        "off_over_plain": ratio(stream, "off", "plain"),
        "stream_over_plain": ratio(stream, STEPS[0], "plain"),
    }
    result |= {f"stream_over_plain_every_{every}": ratio(stream, every, "plain") for every in STEPS[1:]}
    verdicts = {length: time_verdicts(guard, full, length, rounds) for length in lengths}
    for length, found in verdicts.items():
        result[f"milliseconds_{length}"] = {name: 1000 * statistics.median(found[name]) for name in found}
        result[f"verdict_speedup_{length}"] = ratio(found, "full", "activated")
        result[f"verdict_over_decode_step_{length}"] = ratio(found, "activated", "decode step")
    result["verdict_over_decode_step"] = max(
        result[f"verdict_over_decode_step_{length}"] for length in lengths
    )
    if args.plot_growth:
        result["growth"] = measure_growth(args)
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32}", value if isinstance(value, (str, int, dict)) else f"{value:.3f}")
    if args.plot_growth:
        draw_growth(result["growth"], args.plot_growth)
    if args.plot:
        draw(
            {length: result[f"milliseconds_{length}"] for length in lengths},
            args.plot,
            f"One verdict, {args.model} in {dtype_of(guard)}, {torch.get_num_threads()} CPU threads",
        )


def processor():
    info = Path("/proc/cpuinfo")  # where there is none, platform knows more
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
