"""One frozen chat model with two paths: it chats with the LoRA gate shut and judges with it open.

    chat path    g_lm( f(x) )        the model as it was, bit for bit
    guard path   g_guard( f'(x) )    f' is f with the low-rank updates, g_guard one linear head

There are two guard paths:

    full         f' reads the whole conversation again (LoRA-Guard, arXiv 2407.02987)
    activated    the chat path reads the conversation; f' reads only the guard prompt, one or a few
                 tokens after it that attend to the chat path's KV cache (arXiv 2504.12397)

Shapes: B conversations, T tokens, C cuts, M guard-prompt tokens, H hidden width, K categories.
A cut is a place in a text where the guard judges what stands before it.
"""

import copy
import sys
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import chat
from checks import check_request, check_settings, context_length, fix_date, refuse_to_save, try_out, window_of
from lora import LoRALinear, inject_lora, reached_layers

NEVER = 2.0  # a threshold that no probability reaches


@dataclass
class GuardConfig:
    """What defines a guard besides its weights. Raises ValueError for values that make no sense."""

    categories: list[str] = field(default_factory=list)  # in the order of the head's outputs
    guard_path: str = "activated"  # or "full"
    guard_prompt: str = ""  # what the activated path reads last; "" is the tokenizer's end token
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=lambda: ["all-linear"])
    unsafe_head: bool = True  # False: the largest category logit stands for unsafe
    clf_head_bias: bool = True
    threshold: float = 0.5  # an answer is flagged from this unsafe probability
    prompt_threshold: float = NEVER  # a prompt is flagged from this one
    verdict_every: int = 32  # a text is judged after every so many tokens and at its end; 0: only at its end
    date: str = field(default_factory=lambda: date.today().isoformat())  # what a chat template calls today

    def __post_init__(self):
        check_settings(self)


class Verdict(NamedTuple):
    """What the guard thinks of a conversation so far."""

    tokens: int  # how many tokens of the answer were judged; 0: the prompt alone
    unsafe: float  # probability
    categories: dict[str, float]  # probability of each kind of harm
    flagged: bool
    highest: int  # after so many tokens of the prompt or answer it looked most unsafe

    def fields(self):
        """What a scored row gets."""
        return {"unsafe_probability": self.unsafe, "flagged": self.flagged, "categories": self.categories}


class GuardedChat(nn.Module):
    """A chat model with LoRA layers inside and a guard head on top. Everything else is frozen.

    chat_model, tokenizer: a transformers causal language model and its tokenizer, with a chat template.
    Raises ValueError for a model that cannot be guarded, and leaves its layers as they were.
    """

    def __init__(self, chat_model, tokenizer, config: GuardConfig):
        super().__init__()
        lm_head = chat_model.get_output_embeddings()
        if chat_model.base_model is chat_model or lm_head is None:
            raise ValueError(f"a {type(chat_model).__name__} has no base model below a language-model head")
        self.chat_model, self.tokenizer, self.config = chat_model.eval(), copy.copy(tokenizer), config
        self.tokenizer.chat_template = fix_date(tokenizer.get_chat_template(), config.date)
        self.is_full = config.guard_path == "full"
        question = config.guard_prompt or tokenizer.eos_token or ""
        question = [] if self.is_full else tokenizer(question, add_special_tokens=False).input_ids
        self.max_tokens = context_length(chat_model.config.get_text_config()) - len(question)
        if self.max_tokens < 1 or not (self.is_full or question):
            raise ValueError(f"a guard prompt of {len(question)} tokens does not fit this model's context")
        ids = torch.tensor([question], dtype=torch.long, device=chat_model.device)  # (1, M)
        self.register_buffer("guard_prompt_ids", ids, persistent=False)
        width = lm_head.weight.shape[-1]  # H; the guard head reads what the language-model head reads
        reached = reached_layers(chat_model, self.tensor(tokenizer("Hello").input_ids))
        lora = (config.lora_targets, config.lora_r, config.lora_alpha, config.lora_dropout)
        self.gate = inject_lora(chat_model, *lora, reached, in_fp32=not self.is_full)
        outputs = config.unsafe_head + len(config.categories)
        place = {"dtype": torch.float32, "device": lm_head.weight.device}
        self.head = nn.Linear(width, outputs, bias=config.clf_head_bias, **place)
        self.window = window_of(chat_model.config.get_text_config())
        self.eval()
        try_out(self)
        chat_model.save_pretrained = refuse_to_save  # nothing would load our names of its layers
        lm_head.register_forward_pre_hook(chat.make_contiguous)

    def forward(self, conversations, cuts):
        """Judge a batch at several places -> logits (B, C, 1 + K), fp32: unsafe, then the categories.

        conversations: B lists of token ids. cuts (B, C): how many tokens of its conversation a verdict sees.
        """
        return self.guard_logits(self.states(conversations, cuts))

    def states(self, conversations, cuts):
        """What the guard head reads: B lists of token ids, cuts (B, C) -> last hidden states (B, C, H)."""
        # Padding is on the right, where causal attention keeps it out of sight, so no mask is needed.
        ids = pad_sequence([self.tensor(row)[0] for row in conversations], batch_first=True)  # (B, T)
        cuts = cuts.to(ids.device)
        if self.is_full:
            with self.gate.opened():
                hidden = self.chat_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return hidden.take_along_dim(cuts[..., None] - 1, dim=1)  # of (B, T, H)
        if not self.asks_at_once(ids.shape[1]):
            return torch.stack([self.states_in_turn(*row) for row in zip(conversations, cuts, strict=True)])
        return self.ask(self.read(ids), cuts)

    @torch.no_grad()
    def read(self, ids, cache=None):
        """The chat path's KV cache after it has read ids (B, T), behind what a cache holds already."""
        read = self.chat_model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return read.get("past_key_values")

    def states_in_turn(self, ids, cuts):
        """As `states`, for one conversation, read from cut to cut as a chat reads it: cuts (C,) -> (C, H)."""
        cache = DynamicCache(config=self.chat_model.config.get_text_config(decoder=True))
        found = {}
        for start, cut in pairwise([0, *sorted(set(cuts.tolist()))]):
            self.read(self.tensor(ids[start:cut]), cache)
            found[cut] = self.ask(cache, self.tensor([cut]))[0, 0]
        return torch.stack([found[cut] for cut in cuts.tolist()])

    def asks_at_once(self, tokens):
        """Whether one pass can judge a conversation of so many tokens at several cuts."""
        return tokens + self.guard_prompt_ids.shape[1] <= self.window

    def ask(self, cache, cuts):
        """Read guard prompts behind the chat path's KV cache: cuts (B, C) -> last hidden states (B, C, H).

        Each prompt sees the cache up to its cut, and itself. The cache is unchanged afterwards.

            T = 4, cuts 2 and 4, M = 1       t t t t g g
                               first prompt  x x . . x .
                               second        x x x x . x
        """
        cache = chat.fork(cache)
        tokens, (_, size) = cache.get_seq_length(), self.guard_prompt_ids.shape
        options = {"past_key_values": cache, "use_cache": True}
        if cuts.shape[1] > 1 or (cuts < tokens).any():  # or one prompt simply follows
            places = torch.arange(tokens + size, device=cuts.device)
            before = places[:tokens] < cuts.repeat_interleave(size, dim=1)[..., None]  # (B, C * M, T)
            itself = torch.block_diag(*[torch.ones(size, size).tril()] * cuts.shape[1]).to(before)
            sees = torch.cat([before, itself.expand(len(cuts), -1, -1)], dim=2)  # (B, C * M, T + C * M)
            mask = torch.zeros(sees.shape, dtype=self.chat_model.dtype, device=cuts.device)  # added to scores
            options["attention_mask"] = mask.masked_fill(~sees, torch.finfo(mask.dtype).min)[:, None]
            options["position_ids"] = (cuts[..., None] + places[:size]).flatten(1)  # (B, C * M)
        # Inference mode where nothing learns: autograd's bookkeeping would slow a verdict down.
        with torch.inference_mode(not torch.is_grad_enabled()), self.gate.opened():
            ids = self.guard_prompt_ids.repeat(cuts.shape)  # (B, C * M)
            hidden = self.chat_model.base_model(input_ids=ids, **options).last_hidden_state
        return hidden[:, size - 1 :: size]  # of (B, C * M, H)

    def guard_logits(self, hidden):
        """g_guard: hidden states (..., H) -> logits (..., 1 + K)."""
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 logits would tie scores that differ
            logits = self.head(hidden.float())
        return logits if self.config.unsafe_head else torch.cat([logits.amax(-1, True), logits], dim=-1)

    @torch.no_grad()
    def judge(self, texts: list[chat.Text], batch_size=32):
        """Judge N texts of any length -> N pairs on the CPU: their cuts (C,), logits at these (C, 1 + K)."""
        self.eval()
        windows = [(n, *window) for n, text in enumerate(texts) for window in self.windows(text)]
        windows.sort(key=lambda window: len(window[2]))  # batches of similar length need little padding
        found = [([], []) for _ in texts]
        for first in range(0, len(windows), batch_size):
            numbers, starts, ids, cuts = zip(*windows[first : first + batch_size], strict=True)
            # Not self(...): accelerate puts that under autocast, and what is measured must be what is used.
            logits = GuardedChat.forward(self, ids, pad_cuts(cuts)).cpu()  # (B, C, 1 + K)
            for n, start, row, judged in zip(numbers, starts, cuts, logits, strict=True):
                found[n][0].extend(start + cut for cut in row)
                found[n][1].extend(judged[: len(row)])
        return [(torch.tensor(cuts), torch.stack(logits)) for cuts, logits in found]

    def windows(self, text):
        """Yield (start, ids, cuts): the text, or overlapping parts of one that exceeds the context."""
        cuts, size = cuts_of(text, self.config.verdict_every), self.max_tokens
        for start in range(0, max(len(text.ids) - size // 2, 1), size - size // 2):
            ids = text.ids[start : start + size]
            inside = {cut - start for cut in cuts if start < cut <= start + len(ids)}
            yield start, ids, sorted(inside | {len(ids)})

    def classify(self, rows: list[dict]) -> list[Verdict]:
        """Verdicts on rows {"prompt", "response"} or {"messages"}. Raises ValueError for a bad one."""
        return self.verdicts([chat.encode(self.tokenizer, chat.conversation(row)) for row in rows])

    def verdicts(self, texts: list[chat.Text]) -> list[Verdict]:
        """Verdicts on what chat.encode made of some conversations."""
        return [self.verdict(text, *judged) for text, judged in zip(texts, self.judge(texts), strict=True)]

    def verdict(self, text: chat.Text, cuts, logits) -> Verdict:
        """A Verdict from the highest logits (C, 1 + K) at the cuts (C,). A saved head is calibrated."""
        unsafe, *others = logits.amax(0).cpu().double().sigmoid().tolist()
        threshold = self.config.threshold if text.is_answer else self.config.prompt_threshold
        flagged = not unsafe < threshold  # NaN is flagged, so a broken guard cannot let everything pass
        tokens = len(text.ids) - text.start if text.is_answer else 0
        highest = cuts[logits[:, 0].argmax()].item() - text.start
        categories = dict(zip(self.config.categories, others, strict=True))
        return Verdict(tokens, unsafe, categories, flagged, highest)

    @torch.no_grad()
    def stream(self, prompt: chat.Text, past=None, max_new_tokens=128, verdict_every=16, **options):
        """Answer a prompt under guard: yield (answer ids, Verdict) pairs.

        The first pair is the verdict on the prompt, the next follow after every `verdict_every` tokens of
        the answer, and the last one is at its end. `full` or 0: only the prompt and the end are judged.
        The caller stops by leaving the loop.
        past: the chat's Past, so that each turn reads only new tokens.
        options: those of transformers' `generate`, and the tokens are the same too. Greedy by default.
        Raises ValueError if the context has no room for max_new_tokens, and for beams and assistants.
        """
        check_request(self.max_tokens - len(prompt.ids), max_new_tokens, verdict_every, options)
        self.eval()
        past = chat.Past() if past is None else past
        past.rewind(prompt.ids, self.chat_model.config)
        ids = self.tensor(prompt.ids)  # (1, T)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        options |= {"max_new_tokens": max_new_tokens, "use_cache": True, "cache_implementation": None}
        options |= {"attention_mask": torch.ones_like(ids), "custom_generate": chat.decode, "past": past}
        every = sys.maxsize if self.is_full else verdict_every or sys.maxsize
        # transformers prepares logits processors and criteria, and returns the generator that `decode` is.
        for answer, done in self.chat_model.generate(ids, **options):
            if done or len(answer) % every == 0:
                text = chat.Text(past.ids, len(prompt.ids), True) if answer else prompt
                yield answer, self.verdict(text, *self.judge_read(text, past.cache))

    def judge_read(self, text, cache):
        """As `judge`, for a text that the chat path has read: a prompt at its cuts, an answer at its end."""
        cuts = [len(text.ids)] if text.is_answer else cuts_of(text, self.config.verdict_every)
        if self.is_full or (len(cuts) > 1 and not self.asks_at_once(len(text.ids))):
            return self.judge([text])[0]
        cuts = self.tensor(cuts)  # (1, C)
        return cuts[0], self.guard_logits(self.ask(cache, cuts))[0]

    def train(self, mode=True):
        """Training mode switches on LoRA's dropout only; the frozen model stays in evaluation mode."""
        super().train(mode)
        self.chat_model.eval()
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.training = mode
        return self

    def adapter(self):
        """{name: parameter} of all that is trained. LoRA tensors have PEFT's names."""
        parameters = self.chat_model.named_parameters()
        trained = {name: p for name, p in parameters if name.endswith((".lora_A", ".lora_B"))}
        lora = {f"base_model.model.{name}.weight": p for name, p in trained.items()}
        return lora | {f"guard_head.{name}": p for name, p in self.head.named_parameters()}

    def tensor(self, ids):
        """A list of T token ids -> (1, T), where the model is."""
        return torch.tensor([ids], device=self.guard_prompt_ids.device)


def cuts_of(text, every, shift=0):
    """Where a text is judged: after every so many tokens, the first time `shift` earlier, and at its end."""
    end = len(text.ids)
    return [*range(text.start + every - shift, end, every), end] if every else [end]


def pad_cuts(rows):
    """B lists of cuts -> (B, C). A shorter list repeats its last one."""
    most = max(map(len, rows))
    return torch.tensor([row + row[-1:] * (most - len(row)) for row in rows])
