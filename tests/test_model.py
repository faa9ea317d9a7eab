"""The two paths and the cache that they share. Each test names the mutations that it kills."""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from conftest import CONTEXT, ids_of, make_guard, make_model
from conftest import KINDS as FAMILIES
from transformers import DynamicCache, StaticCache

import chat
from common import UserError
from lora import LoRALinear
from model import GuardConfig, GuardedChat

KINDS = ["llama", "mistral", "gpt2"]
PATHS = ["activated", "full"]
TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]


def conversations(guard):
    return [ids_of(guard.tokenizer, text, "safe") for text in TEXTS]


def all_tensors(cache):
    return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]


def read(guard, ids):
    with torch.no_grad():
        return guard.chat_model.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values


# ---------------------------------------------------------------------------
# The chat path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_path_is_untouched(kind, path):
    """Kills: a gate left open after a verdict, an update that is added while the gate is shut, a changed
    base, an lm_head that computes differently because it is frozen."""
    guard, plain = make_guard(kind, guard_path=path), make_model(kind)
    ids = torch.tensor([conversations(guard)[2][:40]])
    with torch.no_grad():
        wanted = plain(ids).logits
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        last = {"input_ids": ids.expand(2, -1), "logits_to_keep": 1}
        assert torch.equal(guard.chat_model(**last).logits, plain(**last).logits)
        guard.score(conversations(guard))
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        with guard.gate.opened():
            assert not torch.equal(guard.chat_model(ids).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_chat_path_runs_the_same_operations(kind):
    """Kills: an update multiplied by zero, an lm_head that copies its frozen weight for a prompt's last
    token."""
    ids, counts = torch.tensor([[5, 6, 7, 8]]), []
    for model in (make_guard(kind).chat_model, make_model(kind)):
        with torch.no_grad(), torch.profiler.profile() as profiled:
            model(ids, logits_to_keep=1)
        counts.append(Counter({event.key: event.count for event in profiled.key_averages()}))
    names = ("clone", "copy_", "empty", "empty_like")  # the clone of one token's input
    copied = Counter(f"aten::{name}" for name in names)
    assert counts[0] - counts[1] == copied and not counts[1] - counts[0]


@pytest.mark.parametrize("kind", KINDS)
def test_verdict_between_two_tokens_leaves_the_chat_as_it_was(kind):
    """Kills: judging on the cache itself, cropping it afterwards (wrong once a window has slid), a gate left
    open, logits that are inference tensors, a verdict with autograd's bookkeeping."""
    guard, plain = make_guard(kind), make_model(kind)
    ids = conversations(guard)[2][:30]  # longer than the sliding window
    ours, theirs = read(guard, ids), DynamicCache(config=plain.config)
    inference = []
    with torch.no_grad():
        plain(torch.tensor([ids]), past_key_values=theirs)
        guard.chat_model.base_model.register_forward_hook(
            lambda module, inputs, output: inference.append(output.last_hidden_state.is_inference())
        )
        for token in (7, 8, 9):
            before, length = all_tensors(ours), ours.get_seq_length()
            assert not guard.judge(ours).is_inference()
            assert ours.get_seq_length() == length
            assert all(map(torch.equal, all_tensors(ours), before))
            step = guard.chat_model(torch.tensor([[token]]), past_key_values=ours).logits
            assert torch.equal(step, plain(torch.tensor([[token]]), past_key_values=theirs).logits)
    assert inference == [True, False] * 3  # a verdict, then a step of the chat


# ---------------------------------------------------------------------------
# The guard path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_verdict_equals_one_without_a_cache(kind, path, monkeypatch):
    """Kills: an open gate over the conversation, wrong positions for the guard prompt, a head on the wrong
    token."""
    guard = make_guard(kind, guard_path=path)
    ids = conversations(guard)[2][:30]
    question = guard.guard_prompt_ids[0].tolist()
    assert (path == "full") == (question == [])
    mask = torch.tensor([float(path == "full")] * len(ids) + [1.0] * len(question))[None, :, None]
    scores = guard.score([ids, ids[:7]])[:1]

    def masked(layer, x):
        return layer.base(x) + mask * layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)

    monkeypatch.setattr(LoRALinear, "forward", masked)
    with torch.no_grad():
        ids = torch.tensor([ids + question])
        hidden = guard.chat_model.base_model(ids, use_cache=False).last_hidden_state
        assert torch.allclose(guard.head(hidden[:, -1]), scores, atol=1e-5)


def test_activated_path_equals_activated_lora_of_peft():
    """Kills: any departure from activated LoRA, where the update acts on the invocation tokens alone."""
    peft = pytest.importorskip("peft")
    guard = make_guard(lora_targets=["q_proj", "v_proj"])
    question = guard.guard_prompt_ids[0].tolist()
    lora = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=question, **lora)
    theirs = peft.get_peft_model(make_model(), config).eval()
    tensors = {name: tensor for name, tensor in guard.adapter().items() if "lora_" in name}
    assert not peft.set_peft_model_state_dict(theirs, tensors).unexpected_keys
    ids = conversations(guard)[0]
    with torch.no_grad():
        output = theirs(torch.tensor([ids + question]), output_hidden_states=True)
        assert torch.allclose(guard.head(output.hidden_states[-1][:, -1]), guard.score([ids]), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_score_depends_on_no_padding_neighbour_or_order(kind, path):
    """Kills: pooling at the last column, padding on the other side, no mask where rows are padded, a result
    in the order of lengths. The pad id is the end-of-text id, and one of the texts holds it."""
    guard = make_guard(kind, guard_path=path)
    rows = [*conversations(guard), [5, guard.tokenizer.pad_token_id, 6, 7, guard.tokenizer.pad_token_id]]
    alone = torch.cat([guard.score([row]) for row in rows])
    assert torch.allclose(guard.score(rows), alone, atol=1e-5)
    assert torch.allclose(guard.score(rows[::-1], batch_size=2), alone.flip(0), atol=1e-5)
    assert (alone[0] - alone[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shared_beginning_changes_no_verdict(kind):
    """Kills: sharing with a model that counts padding: by a window, local attention or its own positions."""
    guard = make_guard(kind)
    rows = [[*range(5, 55), *range(60 + n, 65 + 3 * n)] for n in range(4)]
    with torch.no_grad():
        alone = torch.cat([guard([row]) for row in rows])
        assert torch.allclose(guard(rows), alone, atol=1e-4)


@pytest.mark.parametrize(("shared", "rows", "passes"), [(64, 3, 2), (63, 3, 1), (128, 2, 2), (200, 1, 1)])
def test_what_conversations_have_in_common_is_read_once(shared, rows, passes):
    """Kills: a system prompt that is read for each row, one that is read apart where that takes longer, a row
    of which all is shared, so nothing is left."""
    guard, read = make_guard(), []
    beginning = [5 + n % 7 for n in range(shared)]
    rows = [[*beginning, 20], [*beginning, 20, 30, 31], [*beginning, 20, 40]][:rows]
    alone = torch.cat([guard.score([row]) for row in rows])
    guard.chat_model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert torch.allclose(guard.score(rows), alone, atol=1e-5)
    longest = max(map(len, rows))
    chat = [(1, shared), (len(rows), longest - shared)] if passes == 2 else [(len(rows), longest)]
    assert read == [*chat, (len(rows), guard.guard_prompt_ids.shape[1])]


def test_cache_that_cannot_be_forked_is_refused():
    """Kills: judging on a static cache, which is written in place."""
    guard = make_guard()
    cache = StaticCache(config=guard.chat_model.config, max_cache_len=64)
    with torch.no_grad():
        guard.chat_model(torch.tensor([[4, 5, 6]]), past_key_values=cache)
    with pytest.raises(ValueError, match=r"StaticCache.*--guard-path full"):
        guard.judge(cache)


@pytest.mark.parametrize("size", [100, 10**6])
@pytest.mark.parametrize("path", PATHS)
def test_long_text_is_seen_whole_and_its_worst_window_counts(path, size, monkeypatch):
    """Kills: cutting at the context, windows longer than the context or than WINDOW, windows of a text that
    fits the context, windows without overlap, the last or the mean window instead of the worst."""
    guard, seen = make_guard(guard_path=path), []
    monkeypatch.setattr(chat, "WINDOW", size)
    monkeypatch.setattr(
        guard, "forward", lambda ids: seen.extend(ids) or torch.tensor([[max(i) * 1.0] * 3 for i in ids])
    )
    text = list(range(3, 903))
    assert guard.score([text, [5, 4]])[:, 0].tolist() == [902, 5]
    assert guard.score([text[::-1]])[:, 0].tolist() == [902]
    windows = [window for window in seen if len(window) > 2 and window[0] < window[1]]
    assert max(map(len, windows)) == min(size, guard.max_tokens) <= CONTEXT
    pairs = {pair for window in windows for pair in pairwise(window)}
    assert pairs == set(pairwise(text))
    seen.clear()
    guard.score([text[: guard.max_tokens]])
    assert seen == [text[: guard.max_tokens]]


# ---------------------------------------------------------------------------
# The head and its verdicts


def test_logits_are_fp32_under_autocast():
    """Kills: a head in bf16, which rounds different scores to the same."""
    guard = make_guard()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = guard(conversations(guard))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_heads():
    """Kills: a stand-in for unsafe that is not the largest category, an output too many, a bias that was
    declined."""
    guard = make_guard(unsafe_head=False, clf_head_bias=False)
    scores = guard.score(conversations(guard))
    assert scores.shape == (4, 3) and torch.equal(scores[:, 0], scores[:, 1:].amax(1))
    assert {name for name in guard.adapter() if "head" in name} == {"guard_head.weight"}
    assert guard.adapter()["guard_head.weight"].shape == (2, 32)
    assert make_guard().adapter()["guard_head.weight"].shape == (3, 32)


def test_probability_is_the_sigmoid_of_the_logit():
    """Kills: probabilities in single precision, where high ones tie at 1; categories in another order."""
    verdict = make_guard().verdict(torch.tensor([20.0, -1.0, 3.0]), tokens=5)
    unsafe, *others = (1 / (1 + math.exp(-z)) for z in (20.0, -1.0, 3.0))
    assert verdict.unsafe == pytest.approx(unsafe, abs=1e-12) and verdict.unsafe < 1
    assert list(verdict.categories) == ["theft", "hate"]
    assert list(verdict.categories.values()) == pytest.approx(others, abs=1e-12)
    fields = {"unsafe_probability": verdict.unsafe, "flagged": True, "categories": verdict.categories}
    assert verdict.tokens == 5 and verdict.fields() == fields


def test_prompts_and_answers_are_flagged_from_their_own_threshold():
    """Kills: one threshold for both, > in place of >=, a broken guard whose NaN lets everything pass."""
    guard = make_guard(threshold=0.5, prompt_threshold=0.75)

    def flagged(logit, tokens):
        return guard.verdict(torch.tensor([logit, 9.0, 9.0]), tokens).flagged

    logit = math.log(3)  # probability 0.75, within rounding
    assert flagged(0.0, tokens=1) and not flagged(-1e-6, tokens=1)
    assert flagged(logit + 1e-6, tokens=0) and not flagged(logit - 1e-6, tokens=0)
    assert flagged(math.nan, tokens=0) and flagged(math.nan, tokens=1)


def test_classify_gives_a_verdict_for_each_row_in_order():
    """Kills: verdicts in the order of lengths, an answer that is left out, messages read differently from
    prompt and response, the answer's threshold for a row that has only a prompt."""
    guard = make_guard(threshold=0.0)  # every answer is flagged, and no prompt
    message = {"role": "user", "content": TEXTS[2]}
    rows = [
        {"prompt": TEXTS[2], "response": "safe"},
        {"prompt": TEXTS[0]},
        {"prompt": TEXTS[0], "response": " "},
    ]
    rows += [{"messages": [message, {"role": "assistant", "content": "safe"}]}, {"messages": [message]}]
    texts = [(TEXTS[2], "safe"), (TEXTS[0],), (TEXTS[0],), (TEXTS[2], "safe"), (TEXTS[2],)]
    wanted = guard.score([ids_of(guard.tokenizer, *text) for text in texts])[:, 0].sigmoid().tolist()
    found = guard.classify(rows)
    assert [verdict.unsafe for verdict in found] == pytest.approx(wanted, abs=1e-6)
    assert [verdict.flagged for verdict in found] == [True, False, False, True, False]
    assert [verdict.tokens > 0 for verdict in found] == [True, False, False, True, False]
    assert len(set(map(round, wanted, [6] * 5))) == 3 and guard.classify([]) == []
    with pytest.raises(UserError, match="prompt"):
        guard.classify([{"response": "safe"}])


# ---------------------------------------------------------------------------
# Training mode


@pytest.mark.parametrize("path", PATHS)
def test_training_changes_adapters_and_head_and_nothing_else(path):
    """Kills: a base that is not frozen, an adapter or head without gradient, a gate that stays shut in
    training."""
    guard = make_guard(guard_path=path, trained=False)
    before = {name: parameter.detach().clone() for name, parameter in guard.named_parameters()}
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves in the second step only
        guard.train()(conversations(guard)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(guard.named_parameters())
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("head.")}


def test_frozen_model_has_no_dropout_in_training():
    """Kills: training mode for the base. GPT-2 has dropout, which would train the guard on another model."""
    guard = make_guard("gpt2").train()
    assert torch.equal(guard(conversations(guard)), guard(conversations(guard)))


@pytest.mark.parametrize("path", PATHS)
def test_lora_dropout_acts_in_training_only(path):
    """Kills: a training mode that does not reach the LoRA layers, and a score that leaves them in it."""
    guard = make_guard(guard_path=path, lora_dropout=0.5).train()
    assert not torch.equal(guard(conversations(guard)), guard(conversations(guard)))
    assert torch.equal(guard.score(conversations(guard)), guard.score(conversations(guard)))


def test_the_default_guard_prompt_is_the_end_token():
    """Kills: a question of many tokens, for which a verdict costs as many decode steps."""
    guard = make_guard(guard_prompt="")
    assert guard.guard_prompt_ids.tolist() == [[guard.tokenizer.eos_token_id]]
    guard.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="guard prompt of 0 tokens"):
        GuardedChat(make_model(), guard.tokenizer, guard.config)


def test_ends_cut_the_conversations_of_a_batch():
    """Kills: an `ends` that is ignored, or that cuts the beginning."""
    guard, ends = make_guard(), [3, 9, 5, 7]
    ids = conversations(guard)
    cut = [row[:end] for row, end in zip(ids, ends, strict=True)]
    assert torch.equal(guard(ids, ends), guard(cut)) and not torch.allclose(guard(ids), guard(cut), atol=1e-3)


# ---------------------------------------------------------------------------
# Settings


WRONG = [
    {"lora_r": 0},
    {"lora_alpha": -1.0},
    {"lora_alpha": math.inf},
    {"lora_dropout": 1.0},
    {"guard_path": "half"},
    {"guard_prompt": ["a", "b"]},
    {"guard_prompt": "a" * 10**4},
    {"categories": ["a", "a"]},
    {"categories": "ab"},
    {"categories": [1, 2]},
    {"categories": [], "unsafe_head": False},
    {"threshold": math.nan},
    {"prompt_threshold": math.nan},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_that_make_no_sense_are_refused(settings):
    """Kills: a check that is left out."""
    with pytest.raises(ValueError, match=r"guard|LoRA|categories|threshold"):
        make_guard(**settings)


def test_misspelt_setting_is_refused_and_defaults_are_not_shared():
    """Kills: a misspelt setting that leaves the default in place, one list of categories for all guards."""
    with pytest.raises(TypeError, match="lora_rank"):
        make_guard(lora_rank=8)
    GuardConfig().categories.append("theft")
    assert GuardConfig().categories == []
