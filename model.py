"""One frozen chat model with two paths: it chats with the LoRA gate shut and judges with it open.

    chat path    g_lm( f(x) )        the model as it was, bit for bit
    guard path   g_guard( f'(x) )    f' is f with the low-rank updates, g_guard one linear head

There are two guard paths:
    full         f' reads the whole conversation again (LoRA-Guard, arXiv 2407.02987)
    activated    the chat path reads the conversation; f' reads only the guard prompt, one or a few
                 tokens after it that attend to the chat path's KV cache (arXiv 2504.12397)

Shapes: B conversations, T tokens, M guard-prompt tokens, H hidden width, K categories, and C cuts, which are
places in a text where the guard judges what stands before.
"""

import copy
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise, starmap
from operator import attrgetter
from typing import NamedTuple

import torch
from accelerate.utils import tqdm
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

import chat
import checks
from lora import LoRALinear, inject_lora, reached_layers

NEVER = 2.0  # a threshold that no probability reaches
BATCH_TOKENS = 2**14  # at most in a batch to judge; more may not fit in memory
HARM = attrgetter("flagged", "unsafe")  # sorts verdicts: flagged ones (NaN too) above others
CUTS = 256  # at most in one pass; the mask of more may not fit in memory


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
    verdict_every: int = 32  # tokens between verdicts on a text; its end always has one; 0: the end alone
    date: str = field(default_factory=lambda: date.today().isoformat())  # what a chat template calls today

    def __post_init__(self):
        checks.check_settings(self)


class Verdict(NamedTuple):
    """What the guard thinks of a conversation so far."""

    tokens: int  # how many tokens of the answer were judged; 0: the prompt alone
    unsafe: float  # probability
    categories: dict[str, float]  # probability of each kind of harm
    flagged: bool
    highest: int  # the cut with the highest verdict, in tokens of the judged part

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
        lm_head = checks.lm_head_of(chat_model)
        self.chat_model, self.tokenizer, self.config = chat_model.eval(), copy.copy(tokenizer), config
        self.tokenizer.chat_template = checks.fix_date(tokenizer.get_chat_template(), config.date)
        self.is_full = config.guard_path == "full"
        question = config.guard_prompt or tokenizer.eos_token or ""
        question = [] if self.is_full else tokenizer(question, add_special_tokens=False).input_ids
        self.max_tokens = checks.context_length(chat_model.config.get_text_config()) - len(question)
        checks.check_guard_prompt(question, self.max_tokens, self.is_full)
        ids = torch.tensor([question], dtype=torch.long, device=chat_model.device)  # (1, M)
        self.register_buffer("guard_prompt_ids", ids, persistent=False)
        width = lm_head.weight.shape[-1]  # H; the guard head reads what the language-model head reads
        reached = reached_layers(chat_model, self.tensor(tokenizer("Hello").input_ids))
        lora = (config.lora_targets, config.lora_r, config.lora_alpha, config.lora_dropout)
        self.gate = inject_lora(chat_model, *lora, reached, in_fp32=not self.is_full)
        outputs = config.unsafe_head + len(config.categories)
        self.head = nn.Linear(width, outputs, config.clf_head_bias, lm_head.weight.device, torch.float32)
        checks.try_out(self.eval())
        chat_model.save_pretrained = checks.refuse_to_save  # nothing would load our names of its layers
        lm_head.register_forward_pre_hook(checks.make_contiguous)

    def forward(self, conversations, cuts):
        """Judge B lists of token ids, each after `cuts` of its tokens, B lists -> logits (B, C, 1 + K)."""
        return self.guard_logits(self.states(conversations, cuts))

    def states(self, conversations, cuts, cache=None):
        """What the guard head reads (B, C, H). cache: the chat path's of these texts, if it has read them."""
        # Padding is on the right: causal attention does not see it, and `ask` masks it.
        ids = pad_sequence([self.tensor(row)[0] for row in conversations], batch_first=True)  # (B, T)
        most = max(map(len, cuts))  # a shorter list of cuts repeats its last one
        cuts = self.tensor([row + row[-1:] * (most - len(row)) for row in cuts])[0]  # (B, C)
        if self.is_full:
            with self.gate.opened():
                hidden = self.chat_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return hidden[torch.arange(len(ids))[:, None], cuts - 1]  # (B, T, H) -> (B, C, H)
        tokens, slots = ids.shape[1], cuts.shape[1] * self.guard_prompt_ids.shape[1]
        if tokens + slots > self.window and cuts.tolist() != [[tokens]]:
            return torch.stack([self.states_in_turn(*row) for row in zip(conversations, cuts, strict=True)])
        cache = self.read(ids) if cache is None else cache
        return torch.cat([self.ask(cache, some) for some in cuts.split(CUTS, dim=1)], dim=1)

    @torch.no_grad()
    def read(self, ids, cache=None):
        """Let the chat path read ids (B, T) -> its KV cache. cache: what it has read before."""
        read = self.chat_model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return read.get("past_key_values")

    def states_in_turn(self, ids, cuts):
        """`states` for one conversation, read piece by piece: cuts (C,) -> (C, H)."""
        cache = DynamicCache(config=self.chat_model.config)
        found = {}
        for start, cut in pairwise([0, *cuts.unique().tolist()]):
            self.read(self.tensor(ids[start:cut]), cache)
            found[cut] = self.ask(cache, self.tensor([cut]))[0, 0]
        return torch.stack([found[cut] for cut in cuts.tolist()])

    def ask(self, cache, cuts):
        """Read guard prompts behind the chat path's KV cache: cuts (B, C) -> last hidden states (B, C, H).

        Each prompt sees the cache up to its cut, and itself. The cache is unchanged afterwards.
            T = 4, cuts 2 and 4, M = 1       t t t t g g
                               first prompt  x x . . x .
                               second        x x x x . x
        """
        cache = chat.fork(cache)
        tokens, size = cache.get_seq_length(), self.guard_prompt_ids.shape[1]
        options = {"past_key_values": cache, "use_cache": True}
        if cuts.tolist() != [[tokens]] * len(cuts):  # else one prompt follows each whole text: no mask
            ends = cuts.repeat_interleave(size, dim=1)  # (B, C * M), the cut of each slot
            slots = torch.arange(ends.shape[1], device=cuts.device)
            before = torch.arange(tokens, device=cuts.device) < ends[..., None]  # (B, C * M, T)
            itself = (slots[:, None] // size == slots // size) & (slots[:, None] >= slots)
            sees = torch.cat([before, itself.expand(len(cuts), -1, -1)], dim=2)  # (B, C * M, T + C * M)
            mask = torch.where(sees, 0.0, -torch.inf).to(self.chat_model.dtype)  # added to the scores
            options |= {"attention_mask": mask[:, None], "position_ids": ends + slots % size}
        # Inference mode where nothing learns: autograd's bookkeeping would slow a verdict down.
        with torch.inference_mode(not torch.is_grad_enabled()), self.gate.opened():
            ids = self.guard_prompt_ids.repeat(cuts.shape)  # (B, C * M)
            hidden = self.chat_model.base_model(input_ids=ids, **options).last_hidden_state
        return hidden[:, size - 1 :: size]  # (B, C * M, H) -> (B, C, H), the last token of each prompt

    def guard_logits(self, hidden):
        """g_guard: hidden states (..., H) -> logits (..., 1 + K), fp32: unsafe, then the categories."""
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 logits would tie scores that differ
            logits = self.head(hidden.float())
        return logits if self.config.unsafe_head else torch.cat([logits.amax(-1, True), logits], dim=-1)

    @torch.no_grad()
    def judge(self, texts: list[chat.Text], progress=None, batch_size=32):
        """Judge N texts of any length -> for each its cuts (C,) and the logits there (C, 1 + K)."""
        self.eval()
        parts = [(n, *part) for n, text in enumerate(texts) for part in self.parts(text)]
        parts.sort(key=lambda part: -len(part[2]))  # little padding; a text's parts stay in order
        found = [[] for _ in texts]
        bar = tqdm(total=len(parts), desc=progress, leave=False, disable=progress is None)
        while parts:
            count = max(1, min(batch_size, BATCH_TOKENS // len(parts[0][2])))
            numbers, starts, ids, cuts = zip(*parts[:count], strict=True)
            del parts[:count]
            bar.update(len(ids))
            # Not self(...): accelerate puts that under autocast, and what is measured must be what is used.
            logits = GuardedChat.forward(self, ids, cuts).cpu()  # (B, C, 1 + K)
            for n, start, row, judged in zip(numbers, starts, cuts, logits, strict=True):
                found[n].append((torch.tensor(row) + start, judged[: len(row)]))
        return [tuple(map(torch.cat, zip(*pairs, strict=True))) for pairs in found]

    def parts(self, text):
        """Yield (start, ids, cuts): the text, or overlapping parts of one that exceeds the context."""
        cuts, size, judged = text.cuts(self.config.verdict_every), self.max_tokens, 0
        for start in range(0, max(len(text.ids) - size // 2, 1), size - size // 2):
            ids = text.ids[start : start + size]
            yield start, ids, [cut - start for cut in cuts if judged < cut <= start + len(ids)] or [len(ids)]
            judged = start + len(ids)

    def classify(self, rows: list[dict]) -> list[Verdict]:
        """Verdicts on rows {"prompt", "response"} or {"messages"}. Raises ValueError for a bad one."""
        return self.verdicts([chat.encode(self.tokenizer, chat.conversation(row)) for row in rows])

    def verdicts(self, texts: list[chat.Text], progress=None) -> list[Verdict]:
        """Verdicts on what chat.encode made of some conversations: the higher one, if there are two forms."""
        return [max(starmap(self.verdict, forms), key=HARM) for forms in self.judge_forms(texts, progress)]

    def judge_forms(self, texts, progress=None, **options):
        """Judge N texts in all their forms -> for each [(form, cuts, logits), ...]."""
        groups = [(text, *text.undisguised) for text in texts]
        judged = iter(self.judge([form for group in groups for form in group], progress, **options))
        return [[(form, *next(judged)) for form in group] for group in groups]

    def verdict(self, text: chat.Text, cuts, logits) -> Verdict:
        """The Verdict on a text: the highest of its logits (C, 1 + K) at cuts (C,)."""
        unsafe, *others = logits.amax(0).cpu().double().sigmoid().tolist()
        threshold = self.config.threshold if text.is_answer else self.config.prompt_threshold
        flagged = not unsafe < threshold  # NaN is flagged, so a broken guard cannot let everything pass
        tokens = len(text.ids) - text.start if text.is_answer else 0
        kinds = dict(zip(self.config.categories, others, strict=True))
        return Verdict(tokens, unsafe, kinds, flagged, cuts[logits[:, 0].argmax()].item() - text.start)

    @torch.no_grad()
    def stream(self, prompt: chat.Text, past=None, max_new_tokens=128, verdict_every=16, **options):
        """Answer a prompt under guard: yield (answer ids, Verdict) pairs.

        The first pair is the verdict on the prompt, the next follow after every `verdict_every` tokens of
        the answer (not on `full`, nor with 0), and the last one is at its end. Leave the loop to stop.
        past: the chat's Past, so that each turn reads only new tokens.
        options: those of transformers' `generate`, and the tokens are the same too. Greedy by default.
        Raises ValueError if the context has no room for max_new_tokens, and for beams and assistants.
        """
        checks.check_request(self.max_tokens - len(prompt.ids), max_new_tokens, verdict_every, options)
        self.eval()
        past = past or chat.Past()
        past.rewind(prompt.ids, self.chat_model.config)
        ids = self.tensor(prompt.ids)  # (1, T)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        options |= {"max_new_tokens": max_new_tokens, "use_cache": True, "cache_implementation": None}
        options |= {"attention_mask": torch.ones_like(ids), "custom_generate": chat.decode, "past": past}
        every = 0 if self.is_full else verdict_every
        for answer, done in self.chat_model.generate(ids, **options):
            if done or not answer or (every and len(answer) % every == 0):
                text = chat.Text(past.ids, len(prompt.ids), True) if answer else prompt
                cuts = text.cuts(0 if answer and not self.is_full else self.config.verdict_every)
                logits = self.guard_logits(self.states([text.ids], [cuts], past.cache)[0])  # (C, 1 + K)
                verdicts = [] if answer else self.verdicts(prompt.undisguised)
                yield answer, max([self.verdict(text, torch.tensor(cuts), logits), *verdicts], key=HARM)

    def train(self, mode=True):
        """Training mode switches on LoRA's dropout only; the frozen model stays in evaluation mode."""
        for module in self.modules():
            module.training = mode and isinstance(module, LoRALinear | GuardedChat)
        return self

    def adapter(self):
        """{name: parameter} of all that is trained. LoRA tensors have PEFT's names."""
        named = self.chat_model.named_parameters()
        lora = {f"base_model.model.{n}.weight": p for n, p in named if n.endswith((".lora_A", ".lora_B"))}
        return lora | {f"guard_head.{name}": p for name, p in self.head.named_parameters()}

    def tensor(self, ids):
        """A list of T token ids -> (1, T), where the model is."""
        return torch.tensor([ids], device=self.guard_prompt_ids.device)
