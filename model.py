"""One frozen chat model with two paths: it chats with the LoRA gate shut and judges with it open.

    chat path    g_lm( f(x) )        the model as it was, bit for bit
    guard path   g_guard( f'(x) )    f' is f with the low-rank updates, g_guard one linear head

There are two guard paths:

    full         f' reads the whole conversation again (LoRA-Guard, arXiv 2407.02987)
    activated    the chat path reads the conversation; f' reads only the guard prompt, one or a few
                 tokens after it that attend to the chat path's KV cache (arXiv 2504.12397)

Shapes: B conversations, T tokens, M guard-prompt tokens, H hidden width, K categories.
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from datetime import date
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

import chat
from common import explain, refuse
from data import encode_row
from lora import LoRALinear, inject_lora


@dataclass
class GuardConfig:
    """What defines a guard besides its weights. Raises UserError for values that make no sense."""

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
    prompt_threshold: float = 2.0  # a prompt is flagged from this one; above 1 means never
    date: str = field(default_factory=lambda: date.today().isoformat())  # what a chat template calls today

    def __post_init__(self):
        names = self.categories
        different = isinstance(names, list) and all(type(n) is str and names.count(n) == 1 for n in names)
        lora = self.lora_r >= 1 and 0 < self.lora_alpha < math.inf and 0 <= self.lora_dropout < 1
        path = self.guard_path in ("activated", "full") and isinstance(self.guard_prompt, str)
        refuse(not path, "the guard path must be activated or full, and the guard prompt must be text")
        refuse(not lora, "LoRA needs r of at least 1, a finite alpha above 0 and a dropout in [0, 1)")
        refuse(not different, "the categories must be a list of different names")
        refuse(
            not (self.unsafe_head or names), "a guard without the unsafe output needs rows with categories"
        )
        refuse(math.isnan(self.threshold + self.prompt_threshold), "a threshold must be a number")
        with explain("the date must be in the form 2026-11-26", (TypeError, ValueError)):
            date.fromisoformat(self.date)


class Verdict(NamedTuple):
    """What the guard thinks of a conversation so far."""

    tokens: int  # how many tokens of the answer were judged; 0: the prompt alone
    unsafe: float  # probability
    categories: dict[str, float]  # probability of each kind of harm
    flagged: bool

    def fields(self):
        """What a scored row gets."""
        return {"unsafe_probability": self.unsafe, "flagged": self.flagged, "categories": self.categories}


class GuardedChat(nn.Module):
    """A chat model with LoRA layers inside and a guard head on top. Everything else is frozen.

    chat_model, tokenizer: a transformers causal language model and its tokenizer, with a chat template.
    Raises UserError for a model that cannot be guarded.
    """

    def __init__(self, chat_model, tokenizer, config):
        super().__init__()
        headless = chat_model.base_model is chat_model
        refuse(headless, f"a {type(chat_model).__name__} has no base model below a language-model head")
        offloaded = any(parameter.is_meta for parameter in chat_model.parameters())
        refuse(offloaded, "parts of this model are not in memory (device_map offloads them): load it whole")
        self.chat_model, self.tokenizer, self.config = chat_model.eval(), copy.copy(tokenizer), config
        self.tokenizer.chat_template = chat.fix_date(tokenizer.get_chat_template(), config.date)
        lora = (config.lora_targets, config.lora_r, config.lora_alpha, config.lora_dropout)
        reached = chat.reached_layers(chat_model, tokenizer("Hello").input_ids)
        self.is_full = config.guard_path == "full"
        self.gate = inject_lora(chat_model, *lora, reached, in_fp32=not self.is_full)
        chat_model.save_pretrained = chat.refuse_to_save  # nothing would load our names of its layers
        lm_head = chat_model.get_output_embeddings()
        lm_head.register_forward_pre_hook(chat.make_contiguous)  # saves a copy of its weight
        width = lm_head.weight.shape[-1]  # H; the guard head reads what the language-model head reads
        outputs = config.unsafe_head + len(config.categories)
        place = {"dtype": torch.float32, "device": lm_head.weight.device}
        self.head = nn.Linear(width, outputs, bias=config.clf_head_bias, **place)
        question = config.guard_prompt or tokenizer.eos_token or ""
        question = [] if self.is_full else tokenizer(question, add_special_tokens=False).input_ids
        ids = torch.tensor([question], dtype=torch.long, device=chat_model.device)  # (1, M)
        self.register_buffer("guard_prompt_ids", ids, persistent=False)
        self.max_tokens = chat.context_length(chat_model.config.get_text_config()) - len(question)
        misfit = self.max_tokens < 1 or not (self.is_full or question)
        refuse(misfit, f"a guard prompt of {len(question)} tokens does not fit this model's context")
        self.eval()

    def forward(self, conversations, ends=None):
        """Judge a batch: B lists of token ids -> logits (B, 1 + K), fp32: unsafe, then the categories.

        ends: how many tokens of each conversation to judge; by default all.
        """
        if ends is not None:
            conversations = [ids[:end] for ids, end in zip(conversations, ends, strict=True)]
        if self.is_full:
            # Right padding: causal attention keeps it out of sight, so no mask is needed.
            ids, mask = self.pad(conversations, "right")  # (B, T)
            with self.gate.opened():
                output = self.chat_model.base_model(input_ids=ids, use_cache=False)
            last = mask.sum(1) - 1  # from the mask, because the pad id may also occur in a text
            hidden = output.last_hidden_state  # (B, T, H)
            return self.guard_logits(hidden[torch.arange(len(ids), device=ids.device), last])
        # Left padding: the guard prompt follows every conversation without a gap.
        past, shared = chat.read_shared(self.chat_model, conversations)  # P tokens
        ids, mask = self.pad([row[shared:] for row in conversations], "left")  # (B, T - P)
        mask = F.pad(mask, (shared, 0), value=1)  # (B, T)
        padding = {} if mask.all() else {"attention_mask": mask, "position_ids": positions(mask)[:, shared:]}
        with torch.no_grad():
            read = self.chat_model.base_model(input_ids=ids, past_key_values=past, use_cache=True, **padding)
        return self.judge(read.get("past_key_values"), padding.get("attention_mask"))

    def judge(self, cache, mask=None):
        """The activated verdict on what the chat path's KV cache holds -> logits (B, 1 + K).

        mask: (B, T), 0 on left padding; None if there is none. The cache is unchanged afterwards.
        """
        cache = chat.fork(cache)
        ids = self.guard_prompt_ids.expand(cache.layers[0].keys.shape[0], -1)  # (B, M)
        padding = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)  # (B, T + M)
            padding = {"attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
        # Inference mode where nothing learns: autograd's bookkeeping would slow a verdict down.
        with torch.inference_mode(not torch.is_grad_enabled()), self.gate.opened():
            output = self.chat_model.base_model(
                input_ids=ids, past_key_values=cache, use_cache=True, **padding
            )
            hidden = output.last_hidden_state  # (B, M, H)
        return self.guard_logits(hidden[:, -1])

    def guard_logits(self, hidden):
        """g_guard: hidden states (B, H) -> logits (B, 1 + K)."""
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 logits would tie scores that differ
            logits = self.head(hidden.float())
        return logits if self.config.unsafe_head else torch.cat([logits.amax(1, keepdim=True), logits], dim=1)

    @torch.no_grad()
    def score(self, conversations, batch_size=32):
        """Judge N conversations of any length, lists of token ids -> logits (N, 1 + K) on the CPU.

        A text longer than the context is judged in overlapping windows, and its highest logits count.
        """
        self.eval()
        parts = [chat.split_windows(ids, self.max_tokens) for ids in conversations]
        windows = [(n, window) for n, part in enumerate(parts) for window in part]
        windows.sort(key=lambda window: len(window[1]))  # batches of similar length need little padding
        logits = torch.full((len(conversations), 1 + len(self.config.categories)), -torch.inf)
        for start in range(0, len(windows), batch_size):
            numbers, ids = zip(*windows[start : start + batch_size], strict=True)
            for n, judged in zip(numbers, self(ids).cpu(), strict=True):
                logits[n] = logits[n].maximum(judged)
        return logits

    def verdict(self, logits, tokens):
        """Logits (1 + K,) of an answer of so many tokens -> Verdict. A saved head is calibrated (runs.py)."""
        unsafe, *others = logits.cpu().double().sigmoid().tolist()
        threshold = self.config.threshold if tokens else self.config.prompt_threshold
        flagged = not unsafe < threshold  # NaN is flagged, so a broken guard cannot let everything pass
        return Verdict(tokens, unsafe, dict(zip(self.config.categories, others, strict=True)), flagged)

    def classify(self, rows):
        """Verdicts on rows {"prompt", "response"} or {"messages"} in order. Raises UserError for bad ones."""
        encoded = [encode_row(self.tokenizer, row) for row in rows]
        logits = self.score([ids for ids, _ in encoded])
        return [self.verdict(z, len(ids) - start) for z, (ids, start) in zip(logits, encoded, strict=True)]

    @torch.no_grad()
    def stream(self, ids, past=None, max_new_tokens=128, verdict_every=16, **options):
        """Answer a conversation, a list of token ids, under guard: yield (answer ids, Verdict) pairs.

        The first pair is the verdict on the prompt, the next follow after every `verdict_every` tokens of
        the answer, and the last one is at its end. `full` judges only the prompt and the end. The caller
        stops by leaving the loop.
        past: the chat's Past, so that each turn reads only new tokens.
        options: those of transformers' `generate`, and the tokens are the same too. Greedy by default.
        Raises UserError if the context has no room for max_new_tokens, and for beams and assistants.
        """
        refuse(min(max_new_tokens, verdict_every) < 1, "max_new_tokens and verdict_every must be at least 1")
        room = self.max_tokens - len(ids)
        refuse(room < max_new_tokens, f"the context has room for {room} more tokens, not {max_new_tokens}")
        given = self.chat_model.generation_config.to_dict() | options
        odd = [
            name for name in ("assistant_model", "stop_strings", "streamer") if given.get(name) is not None
        ]
        refuse(odd, f"stream takes no {', '.join(odd)}: leave the loop, or give stopping_criteria")
        self.eval()
        past = chat.Past() if past is None else past
        past.rewind(ids, self.chat_model.config)
        ids = torch.tensor([ids], device=self.guard_prompt_ids.device)  # (1, T)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        options |= {"max_new_tokens": max_new_tokens, "use_cache": True, "cache_implementation": None}
        every = sys.maxsize if self.is_full else verdict_every
        options |= {"attention_mask": torch.ones_like(ids), "custom_generate": chat.decode, "past": past}
        # transformers prepares logits processors and criteria, and returns the generator that `decode` is.
        for answer, done in self.chat_model.generate(ids, **options):
            if done or len(answer) % every == 0:
                judged = self.score([past.ids]) if self.is_full else self.judge(past.cache)
                yield answer, self.verdict(judged[0], len(answer))

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

    def pad(self, conversations, side):
        """B lists of token ids -> ids, mask, both (B, T)."""
        ids = [torch.tensor(row, device=self.guard_prompt_ids.device) for row in conversations]
        mask = [torch.ones_like(row) for row in ids]
        return (pad_sequence(rows, batch_first=True, padding_side=side) for rows in (ids, mask))


def positions(mask):
    """Position of each token in its own row, not counting padding: (B, T) -> (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)
