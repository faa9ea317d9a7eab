"""The two paths and the cache that they share. Each test names the mutations that it kills."""

import copy
import math
from itertools import pairwise

import conftest
import pytest
import torch
from conftest import (
    CONTEXT,
    PATHS,
    forward,
    guard_for,
    ids_of,
    make_guard,
    make_model,
    score,
    user,
    verdict_on,
)
from transformers import DynamicCache

import model
from chat import Text, encode
from errors import UserError
from lora import LoRALinear
from model import GuardConfig, GuardedChat

KINDS = ["llama", "mistral", "gpt2"]
TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "or"]


def conversations(guard):
    return [ids_of(guard.tokenizer, text, "safe") for text in TEXTS]


# ---------------------------------------------------------------- The chat path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_path_is_untouched(kind, path):
    """Kills: a gate left open, an update that is added while the gate is shut, a changed base or lm_head."""
    guard, plain = make_guard(kind, guard_path=path), make_model(kind)
    ids = torch.tensor([conversations(guard)[2][:40]])
    with torch.no_grad():
        wanted = plain(ids).logits
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        last = {"input_ids": ids.expand(2, -1), "logits_to_keep": 1}
        assert torch.equal(guard.chat_model(**last).logits, plain(**last).logits)
        score(guard, conversations(guard))
        assert torch.equal(guard.chat_model(ids).logits, wanted)
        with guard.gate.opened():
            assert not torch.equal(guard.chat_model(ids).logits, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_verdict_between_two_tokens_leaves_the_chat_as_it_was(kind):
    """Kills: judging on the cache itself, or cropping it afterwards, which a window that slid makes wrong."""
    guard, plain = make_guard(kind), make_model(kind)
    ids = torch.tensor([conversations(guard)[2][:30]])  # longer than the sliding window
    ours, theirs = (DynamicCache(config=plain.config) for _ in range(2))
    with torch.no_grad():
        guard.chat_model(ids, past_key_values=ours)
        plain(ids, past_key_values=theirs)
        for token in (7, 8, 9):
            before = copy.deepcopy(ours)
            guard.ask(ours, torch.tensor([[ours.get_seq_length()]]))
            assert ours.get_seq_length() == before.get_seq_length()
            for old, new in zip(before.layers, ours.layers, strict=True):
                assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)
            step = guard.chat_model(torch.tensor([[token]]), past_key_values=ours).logits
            assert torch.equal(step, plain(torch.tensor([[token]]), past_key_values=theirs).logits)


# ---------------------------------------------------------------- The guard path


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_verdict_equals_one_without_a_cache(kind, path, monkeypatch):
    """Kills: an open gate over the conversation, other positions for the guard prompt, another last token."""
    guard = make_guard(kind, guard_path=path)
    ids = conversations(guard)[2][:30]
    question = guard.guard_prompt_ids[0].tolist()
    assert (path == "full") == (question == [])
    mask = torch.tensor([float(path == "full")] * len(ids) + [1.0] * len(question))[None, :, None]
    scores = score(guard, [ids, ids[:7]])[:1]

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
        assert torch.allclose(guard.head(output.hidden_states[-1][:, -1]), score(guard, [ids]), atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_score_depends_on_no_padding_neighbour_or_order(kind, path):
    """Kills: pooling at the last column, padding on the other side, sorted results."""
    guard = make_guard(kind, guard_path=path)
    # The pad id is the end-of-text id, and the last text holds it.
    rows = [*conversations(guard), [5, guard.tokenizer.pad_token_id, 6, 7, guard.tokenizer.pad_token_id]]
    alone = torch.cat([score(guard, [row]) for row in rows])
    assert torch.allclose(score(guard, rows), alone, atol=1e-5)
    assert torch.allclose(score(guard, rows[::-1], batch_size=2), alone.flip(0), atol=1e-5)
    assert (alone[0] - alone[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", conftest.KINDS)
def test_verdicts_at_several_cuts_of_one_reading_are_those_of_the_beginnings(kind, path):
    """Kills: a prompt that sees past its cut or another prompt, positions of the end, a slid window."""
    guard = make_guard(kind, guard_path=path)
    rows = [
        torch.randint(3, 320, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (31, 7, 120)
    ]
    cuts = [[5, 17, 31], [1, 7], [3, 60, 90, 120]]
    with torch.no_grad():
        found = guard(rows, cuts)  # (B, C, 1 + K)
    for ids, ends, logits in zip(rows, cuts, found, strict=True):
        alone = torch.cat([score(guard, [ids[:end]]) for end in ends])
        assert torch.allclose(logits[: len(ends)], alone, atol=1e-4)
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3


def test_a_text_is_judged_on_the_way_and_the_highest_verdict_counts():
    """Kills: the end alone, cuts before the judged part, a mean, the first cut, `verdict_every` ignored."""
    guard, ids = make_guard(verdict_every=8), list(range(5, 45))
    for is_answer in (True, False):
        text = Text(ids, 10, is_answer)
        ends = [18, 26, 34, 40]
        guard.config.verdict_every = 0
        wanted = score(guard, [ids[:end] for end in ends])  # (4, 1 + K)
        guard.config.verdict_every = 8
        [(cuts, logits)] = guard.judge([text])
        assert cuts.tolist() == ends and torch.allclose(logits, wanted, atol=1e-5)
        verdict = guard.verdicts([text])[0]
        best = wanted[:, 0].argmax().item()
        assert verdict.highest == ends[best] - 10 and verdict.tokens == (30 if is_answer else 0)
        assert [verdict.unsafe, *verdict.categories.values()] == pytest.approx(
            wanted.amax(0).sigmoid().tolist(), abs=1e-5
        )


DISGUISED = {  # how a harmful text may hide: what the guard reads as well
    "\uff28\uff4f\uff57\u3000is it?": "How is it?",
    "H\u200bo\u00adw\u2060 is\ufeff it?": "How is it?",
    "\U0001d407\U0001d428\U0001d430 is it?": "How is it?",  # bold letters for formulas
    "\uff1c|\uff49m_end|\uff1e": "<|im_end|>",
    "be\u200b\u0301": "b\u00e9",
}


@pytest.mark.parametrize("text", DISGUISED, ids=ascii)
@pytest.mark.parametrize("role", ["prompt", "response"])
def test_a_disguised_text_is_judged_as_it_reads_too(role, text):
    """Kills: a disguise that hides harm, in an earlier turn too; the lower verdict; a literal as a token."""
    guard = make_guard(verdict_every=4)
    before, behind = (text, "yes"), (DISGUISED[text], "yes")
    messages, plain = (
        [
            {"role": name, "content": content}
            for name, content in zip(("user", "assistant"), pair, strict=True)
        ]
        for pair in (before, behind)
    )
    end = 1 if role == "prompt" else 2
    text = encode(guard.tokenizer, messages[:end])
    (other,) = text.undisguised
    assert other == encode(guard.tokenizer, plain[:end])
    alone = [guard.verdicts([form])[0] for form in (text._replace(undisguised=()), other)]
    verdict = guard.verdicts([other, text, other])[1]
    assert verdict.unsafe == pytest.approx(max(v.unsafe for v in alone), abs=1e-5)
    assert (verdict.tokens, verdict.highest) in [(v.tokens, v.highest) for v in alone]
    guard.config.prompt_threshold = guard.config.threshold = sum(v.unsafe for v in alone) / 2
    assert guard.verdicts([text])[0].flagged
    if role == "prompt":
        (_, verdict), *_ = guard.stream(text, max_new_tokens=2)
        assert verdict.unsafe == pytest.approx(max(v.unsafe for v in alone), abs=1e-5) and verdict.flagged


PLAIN = [
    "How is it?",
    "\u4f60\u597d\uff0c na\u00efve \u0441\u0442\u043e\u043b \U0001f642",
    "Well\u2026 \u00bd x\u00b2",
]
PLAIN += ["\U0001f468\u200d\U0001f469", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0e17\u0e33"]


@pytest.mark.parametrize("text", PLAIN, ids=ascii)
def test_a_plain_text_is_judged_once(text, tokenizer):
    """Kills: other languages, emoji and punctuation taken for disguises, every text judged twice."""
    assert encode(tokenizer, user(text)).undisguised == ()


@pytest.mark.parametrize("every", [0, 7])
@pytest.mark.parametrize("path", PATHS)
def test_long_text_is_seen_whole_and_its_worst_window_counts(path, every, monkeypatch):
    """Kills: cutting, windows without an overlap, windows of a text that fits, a mean, places in a window."""
    guard, seen = make_guard(guard_path=path, verdict_every=every), []

    def highest_id(guard, conversations, cuts):
        seen.extend(conversations)
        pairs = [[max(ids[:cut]) for cut in row] for ids, row in zip(conversations, cuts, strict=True)]
        most = max(map(len, pairs))
        return torch.tensor([[[n * 1.0] * 3 for n in row + row[-1:] * (most - len(row))] for row in pairs])

    monkeypatch.setattr(GuardedChat, "forward", highest_id)
    text = list(range(3, 903))
    assert score(guard, [text, [5, 4]])[:, 0].tolist() == [902, 5]
    assert score(guard, [text[::-1]])[:, 0].tolist() == [902]
    windows = [window for window in seen if len(window) > 2 and window[0] < window[1]]
    assert max(map(len, windows)) == guard.max_tokens <= CONTEXT
    pairs = {pair for window in windows for pair in pairwise(window)}
    assert pairs == set(pairwise(text))
    [(cuts, logits)] = guard.judge([Text(text, 400, True)])
    wanted = [cut for cut in Text(text, 400, True).cuts(every) if cut > 400]
    assert cuts.tolist() == sorted(set(cuts.tolist())) and set(wanted) <= set(cuts.tolist())
    assert logits[:, 0].tolist() == [2 + cut for cut in cuts.tolist()]
    assert guard.verdicts([Text(text, 400, True)])[0].highest == 500
    seen.clear()
    score(guard, [text[: guard.max_tokens]])
    assert seen == [text[: guard.max_tokens]]


def test_long_texts_share_a_batch_only_as_far_as_memory_goes(monkeypatch):
    """Kills: 32 texts of any length in one batch, a text that is longer than a batch and never judged."""
    guard, batches = make_guard(), []
    forward_ = GuardedChat.forward

    def spy(guard, conversations, cuts):
        batches.append([len(ids) for ids in conversations])
        return forward_(guard, conversations, cuts)

    monkeypatch.setattr(GuardedChat, "forward", spy)
    monkeypatch.setattr(model, "BATCH_TOKENS", 64)
    monkeypatch.setattr(model, "CUTS", 2)
    texts = [Text([5] * length, 0, True) for length in (10, 30, 100, 20, 30)]
    guard.config.verdict_every = 8
    found = guard.judge(texts)
    assert batches == [[100], [30, 30], [20, 10]]
    assert [len(cuts) for cuts, _ in found] == [2, 4, 13, 3, 4]
    monkeypatch.undo()
    for (_, logits), (_, wanted) in zip(found, guard.judge(texts), strict=True):
        assert torch.allclose(logits, wanted, atol=1e-5)


# ---------------------------------------------------------------- The head and its verdicts


def test_logits_are_fp32_under_autocast():
    """Kills: a head in bf16, which rounds different scores to the same."""
    guard = make_guard()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = forward(guard, conversations(guard))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_without_an_unsafe_output_the_largest_category_stands_for_it():
    """Kills: another stand-in for unsafe, an output too many, a bias that was declined."""
    guard = make_guard(unsafe_head=False, clf_head_bias=False)
    scores = score(guard, conversations(guard))
    assert scores.shape == (4, 3) and torch.equal(scores[:, 0], scores[:, 1:].amax(1))
    shapes = {name: p.shape for name, p in guard.adapter().items() if "head" in name}
    assert shapes == {"guard_head.weight": (2, 32)}
    assert make_guard().adapter()["guard_head.weight"].shape == (3, 32)


def test_probability_is_the_sigmoid_of_the_logit():
    """Kills: probabilities in single precision, where high ones tie at 1; categories in another order."""
    verdict = verdict_on(make_guard(), [20.0, -1.0, 3.0], tokens=5)
    unsafe, *others = (1 / (1 + math.exp(-z)) for z in (20.0, -1.0, 3.0))
    assert verdict.unsafe == pytest.approx(unsafe, abs=1e-12) and verdict.unsafe < 1
    assert verdict.categories == pytest.approx(dict(zip(["theft", "hate"], others, strict=True)), abs=1e-12)
    fields = {"unsafe_probability": verdict.unsafe, "flagged": True, "categories": verdict.categories}
    assert verdict.tokens == 5 and verdict.fields() == fields


def test_prompts_and_answers_are_flagged_from_their_own_threshold():
    """Kills: one threshold for both, > in place of >=, a broken guard whose NaN lets everything pass."""
    guard = make_guard(threshold=0.5, prompt_threshold=0.75)

    def flagged(logit, tokens):
        return verdict_on(guard, [logit, 9.0, 9.0], tokens).flagged

    logit = math.log(3)  # probability 0.75, within rounding
    assert flagged(0.0, tokens=1) and not flagged(-1e-6, tokens=1)
    assert flagged(logit + 1e-6, tokens=0) and not flagged(logit - 1e-6, tokens=0)
    assert flagged(math.nan, tokens=0) and flagged(math.nan, tokens=1)


def test_classify_gives_a_verdict_for_each_row_in_order():
    """Kills: sorted verdicts, an answer that is left out or counts a blank one, the wrong threshold."""
    guard = make_guard(threshold=0.0)  # every answer is flagged, and no prompt
    message = {"role": "user", "content": TEXTS[2]}
    rows = [{"prompt": TEXTS[2], "response": "safe"}, {"prompt": TEXTS[0], "response": " "}]
    rows += [{"messages": [message, {"role": "assistant", "content": "safe"}]}, {"messages": [message]}]
    texts = [(TEXTS[2], "safe"), (TEXTS[0],), (TEXTS[2], "safe"), (TEXTS[2],)]
    wanted = score(guard, [ids_of(guard.tokenizer, *text) for text in texts])[:, 0].sigmoid().tolist()
    found = guard.classify(rows)
    assert [verdict.unsafe for verdict in found] == pytest.approx(wanted, abs=1e-6)
    assert [verdict.flagged for verdict in found] == [True, False, True, False]
    assert [verdict.tokens for verdict in found] == [3, 0, 3, 0]
    assert len(set(map(round, wanted, [6] * 4))) == 3 and guard.classify([]) == []
    with pytest.raises(UserError, match="prompt"):
        guard.classify([{"response": "safe"}])


# ---------------------------------------------------------------- Training mode


@pytest.mark.parametrize("path", PATHS)
def test_training_changes_adapters_and_head_and_nothing_else(path):
    """Kills: a base that is not frozen, an adapter or head without gradient, a gate shut in training."""
    guard = make_guard(guard_path=path, trained=False)
    before = {name: parameter.detach().clone() for name, parameter in guard.named_parameters()}
    optimizer = torch.optim.SGD(guard.parameters(), lr=0.1)
    for _ in range(2):  # B is zero at first, so A moves in the second step only
        forward(guard.train(), conversations(guard)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(guard.named_parameters())
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "lora_" in name or name.startswith("head.")}


@pytest.mark.parametrize("path", PATHS)
def test_only_the_dropout_of_lora_acts_and_in_training_only(path):
    """Kills: GPT-2's own dropout, a training mode that does not reach LoRA, a score that stays in it."""
    plain, guard = (make_guard("gpt2", guard_path=path, lora_dropout=p).train() for p in (0.0, 0.5))
    texts = conversations(guard)
    assert torch.equal(forward(plain, texts), forward(plain, texts))
    assert not torch.equal(forward(guard, texts), forward(guard, texts))
    assert torch.equal(score(guard, texts), score(guard, texts))


# ---------------------------------------------------------------- Settings


def test_the_default_guard_prompt_is_the_end_token():
    """Kills: a question of many tokens, for which a verdict costs as many decode steps."""
    guard = make_guard(guard_prompt="")
    assert guard.guard_prompt_ids.tolist() == [[guard.tokenizer.eos_token_id]]
    guard.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="guard prompt of 0 tokens"):
        GuardedChat(make_model(), guard.tokenizer, guard.config)


def test_a_guard_prompt_that_does_not_fit_is_refused_before_anything_changes():
    """Kills: a guard that has no room for a conversation, LoRA left in the model."""
    chat_model = make_model()
    with pytest.raises(ValueError, match=r"guard prompt of \d{3} tokens does not fit"):
        guard_for(chat_model, guard_prompt="a " * CONTEXT)
    assert not any(isinstance(module, LoRALinear) for module in chat_model.modules())
    assert all(parameter.requires_grad for parameter in chat_model.parameters())


NUMBERS = ("lora_r", "lora_alpha", "lora_dropout", "threshold", "prompt_threshold")
WRONG = [{name: value} for name in NUMBERS for value in (math.inf, math.nan, True, "1")]
WRONG += [{"lora_r": 0}, {"lora_alpha": -1.0}, {"lora_dropout": 1.0}, {"guard_path": "half"}]
WRONG += [{"categories": ["a", "a"]}, {"categories": "ab"}, {"categories": [], "unsafe_head": False}]
WRONG += [{"date": "yesterday"}, {"date": ""}]
WRONG += [{"verdict_every": value} for value in (-1, 1.5, True)]


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_settings_that_make_no_sense_are_refused(settings):
    """Kills: a check that is left out, or that takes true for 1."""
    with pytest.raises(ValueError, match=r"guard|LoRA|categories|finite|date|isoformat|verdict"):
        GuardConfig(**settings)


def test_misspelt_setting_is_refused_and_defaults_are_not_shared():
    """Kills: a misspelt setting that leaves the default in place, one list of categories for all guards."""
    with pytest.raises(TypeError, match="lora_rank"):
        GuardConfig(lora_rank=8)
    GuardConfig().categories.append("theft")
    assert GuardConfig().verdict_every == 32  # the thresholds of new guards are of this many tokens
    assert GuardConfig().categories == []
