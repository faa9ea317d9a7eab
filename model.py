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
import sys
from dataclasses import dataclass, field
from datetime import date
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import chat
from checks import check_settings, context_length, refuse_to_save, try_out
from lora import LoRALinear, inject_lora, reached_layers

WINDOW = 192  # tokens, as long as most training rows: in longer windows a harmful passage goes unnoticed
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
    date: str = field(default_factory=lambda: date.today().isoformat())  # what a chat template calls today

    def __post_init__(self):
        check_settings(self)


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
    Raises ValueError for a model that cannot be guarded, and leaves its layers as they were.
    """

    def __init__(self, chat_model, tokenizer, config: GuardConfig):
        super().__init__()
        lm_head = chat_model.get_output_embeddings()
        if chat_model.base_model is chat_model or lm_head is None:
            raise ValueError(f"a {type(chat_model).__name__} has no base model below a language-model head")
        self.chat_model, self.tokenizer, self.config = chat_model.eval(), copy.copy(tokenizer), config
        self.tokenizer.chat_template = chat.fix_date(tokenizer.get_chat_template(), config.date)
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
        self.eval()
        try_out(self)
        chat_model.save_pretrained = refuse_to_save  # nothing would load our names of its layers
        lm_head.register_forward_pre_hook(chat.make_contiguous)

    def forward(self, conversations):
        """Judge a batch: B lists of token ids -> logits (B, 1 + K), fp32: unsafe, then the categories."""
        return self.guard_logits(self.states(conversations))

    def states(self, conversations):
        """What the guard head reads: B lists of token ids -> last hidden states (B, H)."""
        # On the activated path padding is left, so the guard prompt follows every conversation without a gap.
        # On the full path it is right: causal attention keeps it out of sight, so no mask is needed.
        ids, mask = self.pad(conversations, "right" if self.is_full else "left")  # (B, T)
        if self.is_full:
            with self.gate.opened():
                hidden = self.chat_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            last = mask.sum(1) - 1  # from the mask, because the pad id may also occur in a text
            return hidden[torch.arange(len(ids), device=ids.device), last]  # of (B, T, H)
        mask = None if mask.all() else mask
        with torch.no_grad():
            read = self.chat_model.base_model(input_ids=ids, use_cache=True, **padding(mask, ids))
        return self.ask(read.get("past_key_values"), mask)

    def ask(self, cache, mask=None):
        """Read the guard prompt behind the chat path's KV cache -> its last hidden states (B, H).

        mask: (B, T), 0 on left padding; None if there is none. The cache is unchanged afterwards.
        """
        cache = chat.fork(cache)
        ids = self.guard_prompt_ids.expand(cache.layers[0].keys.shape[0], -1)  # (B, M)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)  # (B, T + M)
        options = {"past_key_values": cache, "use_cache": True, **padding(mask, ids)}
        # Inference mode where nothing learns: autograd's bookkeeping would slow a verdict down.
        with torch.inference_mode(not torch.is_grad_enabled()), self.gate.opened():
            return self.chat_model.base_model(input_ids=ids, **options).last_hidden_state[:, -1]

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
        parts = [split_windows(ids, self.max_tokens) for ids in conversations]
        windows = [(n, window) for n, part in enumerate(parts) for window in part]
        windows.sort(key=lambda window: len(window[1]))  # batches of similar length need little padding
        logits = torch.full((len(conversations), 1 + len(self.config.categories)), -torch.inf)
        for start in range(0, len(windows), batch_size):
            numbers, ids = zip(*windows[start : start + batch_size], strict=True)
            # Not self(ids): accelerate puts that under autocast, and what is measured must be what is used.
            for n, judged in zip(numbers, GuardedChat.forward(self, ids).cpu(), strict=True):
                logits[n] = logits[n].maximum(judged)
        return logits

    def classify(self, rows: list[dict]) -> list[Verdict]:
        """Verdicts on rows {"prompt", "response"} or {"messages"}. Raises ValueError for a bad one."""
        return self.verdicts([chat.encode(self.tokenizer, chat.conversation(row)) for row in rows])

    def verdicts(self, encoded) -> list[Verdict]:
        """Verdicts on what chat.encode made of some conversations: (token ids, where the answer starts)."""
        logits = self.score([ids for ids, _ in encoded])
        return [self.verdict(z, len(ids) - start) for z, (ids, start) in zip(logits, encoded, strict=True)]

    def verdict(self, logits, tokens) -> Verdict:
        """Logits (1 + K,) of an answer of so many tokens -> Verdict. A saved head is calibrated."""
        unsafe, *others = logits.cpu().double().sigmoid().tolist()
        threshold = self.config.threshold if tokens else self.config.prompt_threshold
        flagged = not unsafe < threshold  # NaN is flagged, so a broken guard cannot let everything pass
        return Verdict(tokens, unsafe, dict(zip(self.config.categories, others, strict=True)), flagged)

    @torch.no_grad()
    def stream(self, ids, past=None, max_new_tokens=128, verdict_every=16, **options):
        """Answer a conversation, a list of token ids, under guard: yield (answer ids, Verdict) pairs.

        The first pair is the verdict on the prompt, the next follow after every `verdict_every` tokens of
        the answer, and the last one is at its end. `full` judges only the prompt and the end. The caller
        stops by leaving the loop.
        past: the chat's Past, so that each turn reads only new tokens.
        options: those of transformers' `generate`, and the tokens are the same too. Greedy by default.
        Raises ValueError if the context has no room for max_new_tokens, and for beams and assistants.
        """
        if min(max_new_tokens, verdict_every) < 1:
            raise ValueError("max_new_tokens and verdict_every must be at least 1")
        room = self.max_tokens - len(ids)
        if room < max_new_tokens:
            raise ValueError(f"the context has room for {room} more tokens, not {max_new_tokens}")
        if options.get("streamer") is not None:
            raise ValueError("stream takes no streamer: it yields the answer itself")
        self.eval()
        past = chat.Past() if past is None else past
        past.rewind(ids, self.chat_model.config)
        ids = self.tensor(ids)  # (1, T)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        options |= {"max_new_tokens": max_new_tokens, "use_cache": True, "cache_implementation": None}
        options |= {"attention_mask": torch.ones_like(ids), "custom_generate": chat.decode, "past": past}
        every = sys.maxsize if self.is_full else verdict_every
        # transformers prepares logits processors and criteria, and returns the generator that `decode` is.
        for answer, done in self.chat_model.generate(ids, **options):
            if done or len(answer) % every == 0:
                logits = self.score([past.ids]) if self.is_full else self.guard_logits(self.ask(past.cache))
                yield answer, self.verdict(logits[0], len(answer))

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
        ids = [self.tensor(row)[0] for row in conversations]
        mask = [torch.ones_like(row) for row in ids]
        return (pad_sequence(rows, batch_first=True, padding_side=side) for rows in (ids, mask))

    def tensor(self, ids):
        """A list of T token ids -> (1, T), where the model is."""
        return torch.tensor([ids], device=self.guard_prompt_ids.device)


def split_windows(ids, context):
    """A text as it is, or if it exceeds the context, in windows of WINDOW tokens that overlap by half."""
    if len(ids) <= context:
        return [ids]
    size = min(context, WINDOW)
    return [ids[start : start + size] for start in range(0, len(ids) - size // 2, size - size // 2)]


def padding(mask, ids):
    """The model's options for a mask (B, T), which may be None: the last ids' positions in their own rows."""
    if mask is None:
        return {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, T)
    return {"attention_mask": mask, "position_ids": positions[:, -ids.shape[1] :]}
