"""Tiny random models and a tiny tokenizer with a chat template, made here: the tests need no network."""

import json
import os
from dataclasses import asdict

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from chat import Text, encode
from checkpoint import adapter_header, fingerprint, save_adapter
from data import read_rows
from model import GuardConfig, GuardedChat

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTEXT = 256
PATHS = ["activated", "full"]


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["user assistant system the answer is harmful or safe, and how is the bread?"], trainer
    )
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


TOKENS = {"vocab_size": 320, "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
NEO = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
KINDS = {  # a window of 8 tokens where attention slides
    "llama": (transformers.LlamaConfig, GROUPED),
    "llama2": (transformers.LlamaConfig, SHAPE | {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, SHAPE | {"num_key_value_heads": 2}),
    "qwen3": (transformers.Qwen3Config, GROUPED),
    "mistral": (transformers.MistralConfig, GROUPED | {"sliding_window": 8}),
    "gemma2": (transformers.Gemma2Config, GROUPED | SLIDING),
    "gemma3": (transformers.Gemma3TextConfig, GROUPED | SLIDING),
    "phi3": (transformers.Phi3Config, GROUPED),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}),
    "gpt_neox": (transformers.GPTNeoXConfig, SHAPE),
    "opt": (transformers.OPTConfig, SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "falcon": (transformers.FalconConfig, SHAPE),
    "smollm3": (transformers.SmolLM3Config, GROUPED),
    "olmo2": (transformers.Olmo2Config, GROUPED),
    "starcoder2": (transformers.Starcoder2Config, SHAPE | {"num_key_value_heads": 2, "sliding_window": 8}),
    "mixtral": (transformers.MixtralConfig, GROUPED | {"num_local_experts": 4}),
    "mpt": (transformers.MptConfig, {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}),
    "gpt_neo": (transformers.GPTNeoConfig, NEO | {"window_size": 8}),
}


def make_model(kind="llama", seed=0, **options):
    """A random model with two layers. `kind` is a key of KINDS; "gpt2" has Conv1D layers."""
    config, shape = KINDS[kind]
    if kind not in ("gpt2", "mpt"):
        options["max_position_embeddings"] = CONTEXT
    return random_model(config(**TOKENS | shape | options), seed)


def random_model(config, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def make_guard(kind="llama", trained=True, **settings):
    """A guard for make_model(kind). `trained` fills B with noise: with B at zero the gate changes nothing."""
    guard = guard_for(make_model(kind), **settings)
    if trained:
        fill_b(guard)
    return guard


def guard_for(chat_model, **settings):
    defaults = {"categories": ["theft", "hate"], "lora_r": 4, "guard_prompt": " harmful?", "verdict_every": 0}
    return GuardedChat(chat_model, make_tokenizer(), GuardConfig(**defaults | settings))


def fill_b(guard, std=0.3):
    torch.manual_seed(1)
    for name, parameter in guard.adapter().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


RECURRENT = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
LFM2 = {"vocab_size": 320, "layer_types": ["conv", "full_attention"]} | GROUPED
MINIMAX = {"vocab_size": 320, "num_local_experts": 2} | GROUPED
BERT = TOKENS | SHAPE | {"dtype": "bfloat16"}  # whose rounding hides small differences
REFUSED = {  # {name: (config, what the refusal says on `activated` and on `full`; None: no refusal)}
    "lfm2": (transformers.Lfm2Config(**LFM2), "LinearAttentionLayer.*--guard-path full", None),
    "minimax": (transformers.MiniMaxConfig(**MINIMAX), "MiniMaxCache", "cache of its own"),
    "mamba": (transformers.MambaConfig(**RECURRENT), "NoneType", "read in two parts"),
    "rwkv": (transformers.RwkvConfig(**RECURRENT), "NoneType", "read in two parts"),
    "bert": (transformers.BertConfig(**BERT), "what follows a text", "what follows a text"),
}


def rows_of(*sources):
    """The checked rows of all files."""
    return [row for _, _, rows in read_rows(sources) for row in rows]


def user(text):
    return [{"role": "user", "content": text}]


def ids_of(tokenizer, prompt, response=None, history=()):
    """Token ids of a conversation."""
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    return encode(tokenizer, [*history, *user(prompt), *answer])[0]


def asked(ids):
    """A prompt of these token ids."""
    return Text(ids, 0, False)


def score(guard, conversations, **options):
    """Logits (B, 1 + K) of B lists of token ids at their ends."""
    judged = guard.judge([Text(ids, 0, True) for ids in conversations], **options)
    return torch.stack([logits.amax(0) for _, logits in judged])


def forward(guard, conversations):
    """The same by the guard's forward, with a gradient."""
    return guard(conversations, [[len(ids)] for ids in conversations])[:, 0]


def verdict_on(guard, logits, tokens):
    """The guard's verdict on an answer of so many tokens; 0: on a prompt. logits: (1 + K,)."""
    text = Text([5] * max(tokens, 1), 0, tokens > 0)
    return guard.verdict(text, torch.tensor([len(text.ids)]), torch.as_tensor(logits)[None])


def plain(kind, ids, seed=0, **options):
    """What the chat model alone answers: transformers' own generate on a model that never had a guard."""
    chat_model, ids = make_model(kind), torch.tensor([ids])  # ids (1, T)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 2, **options}
    torch.manual_seed(seed)
    output = chat_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, ids.shape[1] :].tolist()


def until(row, end):
    return row[: row.index(end)] if end in row else row


def make_rows(count, start=0):
    return [
        {
            "prompt": f"question {i // 2}",
            "response": f"answer {i}",
            "category": {"theft": i % 2 == 0, "hate": i % 4 == 0},
            "is_safe": i % 2 == 1,
        }
        for i in range(start, start + count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def same_environment():
    """accelerate writes WORLD_SIZE and the like into the environment, where the next test would find them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def model_folder(tmp_path):
    """A tiny chat model as a local folder, as a user would name it."""
    make_model().save_pretrained(tmp_path / "chat-model")
    make_tokenizer().save_pretrained(tmp_path / "chat-model")
    return str(tmp_path / "chat-model")


@pytest.fixture
def saved(tmp_path, model_folder):
    """(config path, adapter path) of a guard whose base model is a local folder, as train.py writes them."""
    guard, config, adapter = make_guard(), tmp_path / "config.json", tmp_path / "adapter.safetensors"
    base = fingerprint(guard.chat_model, guard.tokenizer)
    content = {"base_model": model_folder, "dtype": "float32", "base_fingerprint": base}
    config.write_text(json.dumps(content | {"guard": asdict(guard.config)}))
    save_adapter(adapter, guard.adapter(), adapter_header(base, guard.config))
    return config, adapter
