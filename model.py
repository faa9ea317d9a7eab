"""One frozen chat model, two paths: it chats with the LoRA gate shut, and judges with the gate open.

    chat path    g_lm( f(x) )         the model as it was, bit for bit
    guard path   g_guard( f'(x) )     f' is f with the low-rank updates, g_guard one linear head

LoRA-Guard (Elesedy et al., arXiv 2407.02987) runs f' over the whole conversation: `full`. Here the guard can also be
`activated` (after Greenewald et al., arXiv 2504.12397): the conversation is read by the chat path alone, and f' reads
only a short question behind it, the guard prompt, which attends to the chat path's key/value cache.
"""

import contextlib
import copy
import hashlib
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from common import UserError, first_line, write_whole
from lora import LoRALinear, inject_lora, trainable

# What a guard is apart from its weights: saved with every adapter, for one decides what the other means.
GUARD = {
    "categories": [],  # names of the K kinds of harm, in the order of the head's outputs
    "guard_path": "activated",  # or "full", the paper's
    "guard_prompt": "\n\nIs the conversation above harmful? Answer:",  # plain text, so that it suits any model
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_targets": ["all-linear"],
    "unsafe_head": True,  # False: the largest category logit stands for unsafe, as in the paper's first version
    "clf_head_bias": True,
}


class Thresholds(NamedTuple):
    """From which unsafe probability something is flagged; from none, where that is above 1."""

    prompt: float  # a prompt that has no answer yet
    response: float


NEVER = Thresholds(2.0, 2.0)  # judge, never stop
WINDOW = 192  # tokens; about as long as the rows that guards learn from, for in a longer one a passage is lost on them


class Answer(NamedTuple):
    """One conversation's part of what GuardedChat.generate returns."""

    ids: list  # token ids of the answer as far as it was judged, without the end-of-turn token
    verdicts: list  # [(tokens, [1 + K probabilities])]: at 0 tokens on the prompt, then on the answer's first tokens
    stopped: str | None  # "prompt" or "response" where the last verdict is flagged


class Processor:
    """A function as a logits processor. transformers reads a processor's signature at every token, which takes half a
    millisecond for the __call__ of a bare function, and hardly any time for a method."""

    def __init__(self, function):
        self.function = function

    def __call__(self, ids, scores):
        return self.function(ids, scores)


class GuardedChat(nn.Module):
    """A chat model with LoRA layers inside and a guard head on top; everything but those two is frozen.

    chat_model, tokenizer: a transformers causal language model and its tokenizer, which has a chat template.
    settings: fields of GUARD that are not at their default.
    Raises UserError for settings that make no sense, and for a model that cannot be guarded.
    """

    def __init__(self, chat_model, tokenizer, **settings):
        super().__init__()
        if unknown := settings.keys() - GUARD.keys():
            raise TypeError(f"no such setting of a guard: {', '.join(unknown)}")
        settings = GUARD | settings
        if settings["guard_path"] not in ("activated", "full"):
            raise UserError(f"the guard path must be activated or full, not {settings['guard_path']!r}")
        if not (
            settings["lora_r"] >= 1 and 0 < settings["lora_alpha"] < math.inf and 0 <= settings["lora_dropout"] < 1
        ):
            raise UserError("LoRA needs a rank of at least 1, a finite alpha above 0 and a dropout from 0 to below 1")
        if not (settings["unsafe_head"] or settings["categories"]):
            raise UserError("a guard without the unsafe output needs rows with categories to learn from")
        if not (isinstance(settings["guard_prompt"], str) and _are_names(settings["categories"])):
            raise UserError("the guard prompt must be text, and the categories a list of different names")
        if chat_model.base_model is chat_model:
            raise UserError(f"a {type(chat_model).__name__} does not say what of it is below the language-model head")
        # A guard fits one base model, so that is part of what is saved with it.
        self.settings = {"base_fingerprint": fingerprint(chat_model, tokenizer), **settings}
        self.categories, self.unsafe_head = settings["categories"], settings["unsafe_head"]
        self.chat_model, self.tokenizer = chat_model, tokenizer
        lora = (settings[f"lora_{name}"] for name in ("targets", "r", "alpha", "dropout"))
        self.gate = inject_lora(chat_model, *lora, within=chat_model.base_model_prefix)
        # g_guard reads what g_lm reads, so it is as wide as the language-model head; some models make that narrower.
        lm_head = chat_model.get_output_embeddings()
        width = lm_head.weight.shape[-1]
        outputs = self.unsafe_head + len(self.categories)
        self.head = nn.Linear(width, outputs, bias=settings["clf_head_bias"], dtype=torch.float32)
        verdicts = 1 + len(self.categories)
        self.calibration = {"shift": [0.0] * verdicts, "temperature": [1.0] * verdicts}  # see `probabilities`

        # Or torch would copy the frozen weight to multiply it by a slice of the hidden states, as a prompt's last token
        # is, which takes half as long again as reading a short prompt.
        lm_head.register_forward_pre_hook(_contiguous)

        self.is_full = settings["guard_path"] == "full"
        self.cache_dir = None
        ids = [] if self.is_full else tokenizer(settings["guard_prompt"], add_special_tokens=False).input_ids
        self.register_buffer("guard_prompt_ids", torch.tensor([ids], dtype=torch.long), persistent=False)  # (1, M)
        config = chat_model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or sys.maxsize
        rope = getattr(config, "rope_parameters", None) or {}
        for part in (rope, *rope.values()):
            if isinstance(part, dict) and part.get("rope_type") == "longrope":
                # Beyond that it turns all tokens of a batch otherwise, and a verdict would depend on its neighbours.
                context = min(context, part["original_max_position_embeddings"])
        self.max_tokens = context - len(ids)
        if not (self.is_full or ids) or self.max_tokens < 1:
            raise UserError(f"a guard prompt of {len(ids)} tokens does not fit a context of {context}")
        self.train(False)

    def train(self, mode=True):
        """Training mode for the LoRA dropout alone: the frozen model computes in training what it computes in use."""
        super().train(mode)
        self.chat_model.eval()
        for module in self.modules():
            if isinstance(module, LoRALinear):
                module.training = mode  # its base stays in evaluation
        return self

    def keep_caches(self, folder):
        """Have `activated` keep in `folder` what the chat path makes of each conversation, and read it from there.

        Raises UserError for a model whose cache does not hold a whole conversation in one shape.
        """
        ids = self.guard_prompt_ids[:, :1]
        read = {} if self.is_full else self.chat_model.base_model(input_ids=ids, use_cache=True)
        layers = getattr(read.get("past_key_values"), "layers", [])
        whole = [layer for layer in layers if type(layer) is DynamicLayer]
        shapes = {tensor.shape for layer in whole for tensor in (layer.keys, layer.values)}
        if len(shapes) != 1 or len(whole) < len(layers):
            raise UserError("the caches of this guard and chat model cannot be kept: leave out the folder for them")
        frozen = [p for p in self.chat_model.parameters() if not p.requires_grad]
        frozen = [p if type(p) is nn.Parameter else p.dequantize() for p in frozen]
        some = torch.cat([parameter.detach().flatten()[:64].float().cpu() for parameter in frozen]).numpy().tobytes()
        digest = hashlib.sha256(some + self.chat_model.config.to_json_string().encode()).hexdigest()[:16]
        self.cache_dir = Path(folder) / digest
        self.cache_dir.mkdir(parents=True, exist_ok=True)

    def forward(self, conversations, ends=None):
        """Judge a batch: B lists of token ids. Returns logits (B, 1 + K) fp32: unsafe, then the K categories.

        ends: how many tokens of each to judge, all by default.
        """
        ends = ends or [len(ids) for ids in conversations]
        if self.cache_dir:
            return self.judge(*self._kept(conversations, ends))
        conversations = [ids[:end] for ids, end in zip(conversations, ends, strict=True)]
        if self.is_full:
            # Padding comes after the text, where causal attention cannot see it, so no mask is needed.
            ids, mask = self._pad(conversations, "right")  # (B, T)
            with self.gate.opened():
                hidden = self.chat_model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
            # The last real token is counted from the mask: the pad id can also occur in the text.
            return self._head(hidden[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1])
        # Padding comes before the text, so that the guard prompt follows each conversation without a gap.
        ids, mask = self._pad(conversations, "left")  # (B, T)
        padding = {} if mask.all() else {"attention_mask": mask, "position_ids": _positions(mask)}
        with torch.no_grad():
            read = self.chat_model.base_model(input_ids=ids, use_cache=True, **padding)
        return self.judge(read.get("past_key_values"), padding.get("attention_mask"))

    def judge(self, cache, attention_mask=None):
        """The activated verdict on the conversations in a key/value cache that the chat path made.

        cache: of B conversations of T tokens, padded on the left; it is the same afterwards, bit for bit.
        attention_mask: (B, T), 0 on padding; None where there is none. Returns logits (B, 1 + K) fp32.
        """
        cache = lend(cache)
        ids = self.guard_prompt_ids.expand(cache.layers[0].keys.shape[0], -1)  # (B, M)
        padding = {}  # without any, a faster attention kernel serves
        if attention_mask is not None:
            mask = torch.cat([attention_mask, torch.ones_like(ids)], dim=1)  # (B, T + M)
            padding = {"attention_mask": mask, "position_ids": _positions(mask)[:, -ids.shape[1] :]}
        # What autograd keeps even of what learns nothing would be a twentieth of a verdict's time.
        without_autograd = torch.inference_mode(not torch.is_grad_enabled())
        with without_autograd, self.gate.opened(), self._kernel_to_learn_by():
            output = self.chat_model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, **padding)
            hidden = output.last_hidden_state  # (B, M, H)
        return self._head(hidden[:, -1])

    @torch.no_grad()
    def _kept(self, conversations, ends):
        """(cache, attention_mask) of the first `ends` tokens of each conversation, from the files in cache_dir.

        What is not there is read whole and alone, so that a file is the same whatever batch it was first needed in.
        """
        device, rows = self.guard_prompt_ids.device, []  # (layers, 2, heads, T, width): keys and values
        for ids, end in zip(conversations, ends, strict=True):
            key = json.dumps([ids, str(self.chat_model.dtype), torch.is_autocast_enabled(device.type)]).encode()
            path = self.cache_dir / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
            if not path.exists():
                read = self.chat_model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=True)
                layers = read.past_key_values.layers
                row = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
                write_whole(path, safetensors.torch.save({"cache": row.cpu()}))
            try:
                rows.append(safetensors.torch.load_file(path)["cache"][:, :, :, :end])
            except (safetensors.SafetensorError, KeyError) as error:
                raise UserError(f"{path} is damaged, delete it: {first_line(error)}") from error
        longest = max(ends)
        mask = torch.tensor([[0] * (longest - end) + [1] * end for end in ends], device=device)
        cache = DynamicCache()
        rows = torch.stack([F.pad(row, (0, 0, longest - row.shape[3], 0)) for row in rows], dim=2).to(device)
        for layer, (keys, values) in enumerate(rows):  # (B, heads, T, width)
            cache.update(keys, values, layer)
        return cache, None if mask.all() else mask

    @torch.no_grad()
    def generate(self, conversations, thresholds, max_new_tokens=128, verdict_every=16, streamer=None, **options):
        """Answer B conversations, lists of token ids; each ends at the first verdict that is flagged.

        `activated` judges the prompt, then the answer every `verdict_every` tokens and at its end, always on the cache
        that the chat path fills anyway. `full`, as in the paper, judges the prompt and the end, in passes of their own.
        streamer, options: as for transformers' generate, which chooses the tokens; greedy by default. If the streamer
        has a method put_verdict(tokens, probabilities), that is called with each verdict. What is left out of them are
        beams and assistants, and ends that no verdict could be given at.
        Returns B Answers. Raises UserError where a conversation leaves no room for max_new_tokens in the context.
        """
        self.eval()
        if (longest := max(map(len, conversations))) + max_new_tokens > self.max_tokens:
            raise UserError(f"a prompt of {longest} tokens leaves no room for {max_new_tokens} more in the context")
        if min(max_new_tokens, verdict_every) < 1:
            raise UserError("an answer needs at least 1 token, and so does the step from verdict to verdict")
        unjudged = {"generation_config", "stop_strings", "max_time", "forced_eos_token_id"}
        own = {name for name in unjudged if getattr(self.chat_model.generation_config, name, None) is not None}
        if taken := (options.keys() & unjudged) | own:
            advice = (
                "its ends are stopping_criteria; take them out of the model's generation_config.json, if they are there"
            )
            raise UserError(f"a moderated answer cannot have {', '.join(taken)}: {advice}")
        ids, mask = self._pad(conversations, "left")  # (B, T)
        (rows, width), device = ids.shape, ids.device
        cache = DynamicCache(config=self.chat_model.config.get_text_config(decoder=True))
        every = sys.maxsize if self.is_full else verdict_every
        ends = options.get("eos_token_id", self.chat_model.generation_config.eos_token_id)
        ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=device).view(-1)
        end = int(ends[0]) if len(ends) else 0
        stopping_criteria = options.pop("stopping_criteria", None) or []
        limit = torch.full((rows,), max_new_tokens, device=device)  # tokens after which an answer has to end
        done = torch.zeros(rows, dtype=torch.bool, device=device)
        verdicts = [[] for _ in conversations]

        def judge(ids, due):  # the cache holds `ids`, (B, T + n), no more and no less; due: (B,)
            if len(ids) != rows or cache.get_seq_length() != ids.shape[1]:
                raise UserError("a moderated answer is generated token by token, without beams or an assistant")
            tokens, which = ids.shape[1] - width, due.nonzero()[:, 0].tolist()
            if self.is_full:
                logits = self([conversations[row] + ids[row, width:].tolist() for row in which])
            else:
                padding = None if mask.all() else F.pad(mask, (0, tokens), value=1)
                logits = self.judge(cache, padding)[due]
            for row, verdict in zip(which, probabilities(logits, self.calibration).tolist(), strict=True):
                done[row] = is_flagged(verdict[0], thresholds[tokens > 0])
                verdicts[row].append((tokens, verdict))
                if hasattr(streamer, "put_verdict"):
                    streamer.put_verdict(*verdicts[row][-1])

        def before_token(ids, scores):  # a logits processor: what was generated so far is in the cache
            tokens = ids.shape[1] - width
            due = ~done & ((limit <= tokens) | (tokens % every == 0))
            if due.any():
                judge(ids, due)
            done.logical_or_(limit <= tokens)
            if done.any():
                scores = scores.masked_fill(done[:, None], -torch.inf)
                scores[done, end] = 0
            return scores

        def after_token(ids, scores):  # a stopping criterion: the last of `ids` is not in the cache yet
            tokens = ids.shape[1] - width
            for criterion in stopping_criteria:
                limit.masked_fill_(criterion(ids, scores), tokens)
            ended = ~done & torch.isin(ids[:, -1], ends)
            if ended.any() and (tokens - 1) % every:  # or else they have been judged at this token
                judge(ids[:, :-1], ended)
            return done.logical_or_(ended).clone()

        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **options}
        options["logits_processor"] = [*(options.get("logits_processor") or []), Processor(before_token)]
        options |= {"return_dict_in_generate": False, "cache_implementation": None}
        # One token more than asked for, which is always an end: the last token has to be read before its verdict.
        output = self.chat_model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens + 1,
            stopping_criteria=[after_token],
            streamer=streamer,
            **options,
        )
        answers = []
        for row, found in zip(output[:, width:].tolist(), verdicts, strict=True):
            tokens, (unsafe, *_) = found[-1]
            stopped = ("response" if tokens else "prompt") if is_flagged(unsafe, thresholds[tokens > 0]) else None
            answers.append(Answer(row[:tokens], found, stopped))
        return answers

    @torch.no_grad()
    def score(self, conversations, batch_size=32):
        """Judge N conversations of any length. Returns logits (N, 1 + K) fp32 on the CPU, in the given order.

        Of one longer than the context, windows of at most WINDOW tokens that overlap by half are judged, and the
        highest logits count.
        """
        self.eval()
        windows = [(row, window) for row, ids in enumerate(conversations) for window in _windows(ids, self.max_tokens)]
        windows.sort(key=lambda window: len(window[1]))
        logits = torch.full((len(conversations), 1 + len(self.categories)), -torch.inf)
        for start in range(0, len(windows), batch_size):
            rows, ids = zip(*windows[start : start + batch_size], strict=True)
            for row, judged in zip(rows, self(ids).cpu(), strict=True):
                logits[row] = logits[row].maximum(judged)
        return logits

    @contextlib.contextmanager
    def _kernel_to_learn_by(self):
        """Attention by its plain formula, in training on a CPU in 16 bits.

        With a dozen queries the flash kernel's backward would take a third of the guard prompt's time there; in fp32 it
        is the faster one. The switches hold for all threads, so a guard that is in use leaves them alone.
        """
        if not self.training or self.guard_prompt_ids.device.type != "cpu" or self.chat_model.dtype == torch.float32:
            yield
            return
        allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # meant for CUDA by its name alone
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)

    def _pad(self, conversations, side):
        device = self.guard_prompt_ids.device
        ids = [torch.tensor(conversation, device=device) for conversation in conversations]
        mask = [torch.ones_like(row) for row in ids]
        return (pad_sequence(rows, batch_first=True, padding_side=side) for rows in (ids, mask))

    def _head(self, hidden):
        # In fp32 even under autocast: logits rounded to bf16 would tie scores that differ.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(hidden.float())
        return logits if self.unsafe_head else torch.cat([logits.amax(1, keepdim=True), logits], dim=1)

    def adapter(self):
        """{name: parameter} of all that is trained, under the names that PEFT gives to LoRA weights."""
        lora = {f"base_model.model.{name}.weight": p for name, p in trainable(self.chat_model).items()}
        return lora | {f"guard_head.{name}": p for name, p in self.head.named_parameters()}

    def cast_for_use(self):
        """Cast the adapters to the model's dtype, once and not in every pass; Adam, in training, needs them in fp32."""
        for parameter in trainable(self.chat_model).values():
            parameter.data = parameter.data.to(self.chat_model.dtype)

    def use_fast_dtype(self):
        """Compute in fp32 what a CPU without instructions for 16-bit products would take several times as long for.

        For training and scoring, which read many tokens at once; writing an answer, a token at a time, is bound by
        memory, and there 16 bits are faster on any CPU. The weights keep their values.
        """
        kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.chat_model.dtype)
        able = any(able and kind in name for name, able in torch.cpu.get_capabilities().items()) if kind else True
        quantised = getattr(self.chat_model, "is_quantized", False)
        if not (able or quantised) and self.guard_prompt_ids.device.type == "cpu":
            self.chat_model.float()

    def save_adapter(self, path):
        """Write the adapters and the head, nothing else, as safetensors; their settings are in its header."""
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.adapter().items()}
        # One metadata field, for safetensors keeps several in no fixed order and equal guards must be equal files.
        metadata = {"lora_guard": json.dumps(self.settings)}
        write_whole(path, safetensors.torch.save(tensors, metadata))

    def load_adapter(self, path):
        """Read what save_adapter wrote. Raises UserError, and changes nothing, unless every field and tensor fits."""
        tensors = read_adapter(path, self.settings)
        found, wanted = ({name: t.shape for name, t in some.items()} for some in (tensors, self.adapter()))
        if wrong := [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]:
            raise UserError(f"{path} belongs to another guard or chat model; what differs: {_some(wrong)}")
        with torch.no_grad():
            for name, parameter in self.adapter().items():
                parameter.copy_(tensors[name])


def read_adapter(path, settings):
    """{name: tensor} of an adapter file. Raises UserError unless its header has these settings, and it finite numbers.

    That takes no chat model, so a wrong file is refused before one is read.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("lora_guard", "{}"))
            wrong = [name for name, value in settings.items() if header.get(name) != value]
            tensors = {} if wrong else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"cannot read the adapter {path}: {first_line(error)}") from error
    if wrong:
        raise UserError(f"{path} belongs to another guard or chat model; what differs: {_some(wrong)}")
    if wrong := [name for name, t in tensors.items() if t.dtype != torch.float32 or not t.isfinite().all()]:
        raise UserError(f"{path} holds values that are no finite numbers in fp32: {_some(wrong)}")
    return tensors


def _contiguous(_, inputs):  # not by .contiguous(), which takes any strides for dimensions of size 1
    return tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs)


def _are_names(names):
    return isinstance(names, list) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def _some(names, shown=3):
    return ", ".join(name[:80] for name in names[:shown]) + (
        f" and {len(names) - shown} more" if len(names) > shown else ""
    )


def _positions(mask):
    """Position of each token in its own row, (B, T)."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _windows(ids, context):
    if len(ids) <= context:
        return [ids]
    size = min(context, WINDOW)
    return [ids[start : start + size] for start in range(0, len(ids) - size // 2, size - size // 2)]


def lend(cache):
    """A cache that begins with the same tensors and grows by itself: appending makes new ones, so `cache` stays whole.

    Cropping the guard's tokens off again would not do: a sliding-window layer has dropped old tokens to make room.
    """
    lent = copy.copy(cache)
    lent.layers = [copy.copy(layer) for layer in cache.layers] if cache is not None else [None]
    for layer in lent.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(f"the activated path cannot borrow a {type(layer).__name__}; train with --guard-path full")
    return lent


def probabilities(logits, calibration):
    """What logits (N, 1 + K) mean: sigmoid((z - shift) / temperature), in double precision on the CPU; the same shape.

    calibration: {"shift": 1 + K numbers, "temperature": 1 + K numbers}, as train.py fits it.
    """
    shift, temperature = (torch.tensor(calibration[name], dtype=torch.double) for name in ("shift", "temperature"))
    return ((logits.cpu().double() - shift) / temperature).sigmoid()


def is_flagged(unsafe, threshold):
    """Whether an unsafe probability reaches the threshold; what is no number does, lest a broken guard pass all."""
    return not unsafe < threshold


def verdict_fields(guard, threshold, unsafe, *others):
    """The fields of a judged row, from the probabilities of its outputs."""
    categories = dict(zip(guard.categories, others, strict=True))
    return {"unsafe_probability": unsafe, "flagged": is_flagged(unsafe, threshold), "categories": categories}


def fingerprint(chat_model, tokenizer):
    """Digests that tell one base model from another of the same shapes: {"config", "tokenizer", "norms": hex}.

    Only what neither a file format nor a version of transformers changes. Of the weights the vectors, which formats
    keep whole, so a model fine-tuned in its matrices alone passes for its parent.
    """
    fields = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act")
    fields += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "sliding_window")
    config = chat_model.config.get_text_config()
    facts = {
        "config": {field: getattr(config, field, None) for field in fields},
        "tokenizer": [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template],
    }
    facts = {name: json.dumps(fact).encode() for name, fact in facts.items()}
    vectors = [p.detach().to("cpu", torch.bfloat16).view(torch.int16) for p in chat_model.parameters() if p.ndim == 1]
    facts["norms"] = b"".join(vector.numpy().tobytes() for vector in vectors)
    return {name: hashlib.sha256(fact).hexdigest()[:16] for name, fact in facts.items()}
