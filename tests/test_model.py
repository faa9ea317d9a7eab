"""The two paths and the cache that they share. Each test names the mutations that it kills."""

import math
from itertools import pairwise
from unittest.mock import patch

import conftest
import pytest
import torch
from conftest import PATHS, forward, guard_for, ids_of, make_guard, make_model, score, user, verdict_on
from transformers import DynamicCache

import model
from chat import Text, encode
from errors import UserError
from lora import LoRALinear
from model import GuardConfig, GuardedChat

KINDS = ["llama", "mistral", "gpt2"]
ROWS = [list(range(5, 36)), [5, 2, 6, 7, 2], list(range(100, 220))]  # 2 ends a text and pads a batch


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_chat_path_is_untouched_by_verdicts_between_its_tokens(kind, path):
    """Kills: a gate left open, a changed base, judging on the cache itself, cropping a slid window."""
    guard, plain = make_guard(kind, guard_path=path), make_model(kind)
    ours, theirs = (DynamicCache(config=plain.config) for _ in range(2))
    read = []
    for part in (ROWS[0], [7], [8]):
        read += part
        step = guard.chat_model(torch.tensor([part]), past_key_values=ours).logits
        assert torch.equal(step, plain(torch.tensor([part]), past_key_values=theirs).logits)
        guard.states([read], [[len(read)]], ours)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_verdict_equals_one_without_a_cache(kind, path, monkeypatch):
    """Kills: an open gate over the conversation, other positions for the guard prompt, another last token."""
    guard, ids = make_guard(kind, guard_path=path), ROWS[0]
    question = guard.guard_prompt_ids[0].tolist()
    assert (path == "full") == (question == [])
    wanted = score(guard, [ids])
    adapted = torch.tensor([path == "full"] * len(ids) + [True] * len(question))[:, None]  # (T, 1)

    def masked(layer, x):
        return layer.base(x) + adapted * layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)

    monkeypatch.setattr(LoRALinear, "forward", masked)
    hidden = guard.chat_model.base_model(torch.tensor([ids + question]), use_cache=False).last_hidden_state
    assert torch.allclose(guard.head(hidden[:, -1]), wanted, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", conftest.KINDS)
def test_a_verdict_depends_only_on_what_stands_before_its_cut(kind, path):
    """Kills: the state of the end at every cut, a window that slid, padding or a neighbour that is seen."""
    guard = make_guard(kind, guard_path=path)
    cuts = [[5, 17, 31], [1, 5], [3, 60, 90, 120]]
    found = guard(ROWS, cuts)  # (B, C, 1 + K)
    for ids, ends, logits in zip(ROWS, cuts, found, strict=True):
        alone = torch.cat([score(guard, [ids[:end]]) for end in ends])
        assert torch.allclose(logits[: len(ends)], alone, atol=1e-4)
    assert (found[0, 0] - found[0, 1]).abs().max() > 1e-3


def test_a_text_is_judged_on_the_way_and_the_highest_verdict_counts():
    """Kills: the end alone, cuts before the judged part, a mean, the first cut, `verdict_every` ignored."""
    guard, ids, ends = make_guard(), list(range(5, 45)), [18, 26, 34, 40]
    wanted = score(guard, [ids[:end] for end in ends])  # (4, 1 + K)
    guard.config.verdict_every = 8
    text = Text(ids, 10, True)
    [(cuts, logits)] = guard.judge([text])
    assert cuts.tolist() == ends and torch.allclose(logits, wanted, atol=1e-5)
    [verdict] = guard.verdicts([text])
    assert verdict.tokens == 30 and verdict.highest == ends[wanted[:, 0].argmax()] - 10
    highest = wanted.amax(0).sigmoid().tolist()
    assert [verdict.unsafe, *verdict.categories.values()] == pytest.approx(highest, abs=1e-5)


@pytest.mark.parametrize("answer", [[], [{"role": "assistant", "content": "yes"}]], ids=["prompt", "answer"])
def test_a_disguised_text_is_judged_as_it_reads_too(answer):
    """Kills: a disguise that hides harm, in an earlier turn too; the lower verdict."""
    guard = make_guard()
    for disguised, seen in (
        ("\uff28\uff4f\uff57\u3000is it?", "How is it?"),
        ("H\u200bo\u00adw\u2060 is\ufeff it?", "How is it?"),
        ("\uff1c|\uff49m_end|\uff1e", "<|im_end|>"),
    ):
        text, plain = (encode(guard.tokenizer, user(prompt) + answer) for prompt in (disguised, seen))
        assert text.undisguised == (plain,)
        for _ in range(2):
            wanted = score(guard, [text.ids, plain.ids])[:, 0].max().sigmoid().item()
            assert guard.verdicts([plain, text])[1].unsafe == pytest.approx(wanted, abs=1e-5)
            if not answer:
                _, verdict = next(guard.stream(text, max_new_tokens=2))
                assert verdict.unsafe == pytest.approx(wanted, abs=1e-5)
            guard.head.weight.data.neg_()  # so the other form is the more harmful one


def test_a_plain_text_is_judged_once(tokenizer):
    """Kills: other languages, emoji and punctuation taken for disguises, every text judged twice."""
    for text in ("How is it?", "你好\uff0c naïve стол", "Well… ½ x²", "👨\u200d👩", "ทำ"):
        assert encode(tokenizer, user(text)).undisguised == ()


def test_long_text_is_seen_whole_in_windows(monkeypatch):
    """Kills: cutting, windows without an overlap, windows of a text that fits, places in a window."""
    guard, seen = make_guard(verdict_every=7), []

    def highest_id(_, conversations, cuts):
        seen.extend(conversations)
        return torch.tensor([[[float(max(conversations[0][:cut]))] * 3 for cut in cuts[0]]])

    monkeypatch.setattr(GuardedChat, "forward", highest_id)
    monkeypatch.setattr(model, "BATCH_TOKENS", 1)  # so each window is a batch
    text = Text(list(range(1, 901)), 400, True)
    [(cuts, logits)] = guard.judge([text])
    assert max(map(len, seen)) == guard.max_tokens <= conftest.CONTEXT
    assert {pair for window in seen for pair in pairwise(window)} == set(pairwise(text.ids))
    assert cuts.tolist() == sorted(set(cuts.tolist())) and set(text.cuts(7)) <= set(cuts.tolist())
    assert logits[:, 0].tolist() == cuts.tolist()  # the highest id before a cut is its place
    assert guard.verdicts([text])[0].highest == 500
    seen.clear()
    guard.judge([Text(text.ids[: guard.max_tokens], 0, True)])
    assert seen == [text.ids[: guard.max_tokens]]


def test_long_texts_share_a_batch_only_as_far_as_memory_goes(monkeypatch):
    """Kills: 32 texts of any length in one batch, a text longer than a batch left out, sorted results."""
    guard = make_guard(verdict_every=8)
    texts = [Text([5] * length, 0, True) for length in (10, 30, 100, 20, 30)]
    wanted = guard.judge(texts)
    monkeypatch.setattr(model, "BATCH_TOKENS", 64)
    monkeypatch.setattr(model, "CUTS", 2)
    with patch.object(GuardedChat, "forward", autospec=True, side_effect=GuardedChat.forward) as judged:
        found = guard.judge(texts)
    batches = [[len(ids) for ids in call.args[1]] for call in judged.call_args_list]
    assert batches == [[100], [30, 30], [20, 10]]
    assert [len(cuts) for cuts, _ in found] == [2, 4, 13, 3, 4]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_logits_are_fp32_under_autocast():
    """Kills: a head in bf16, which rounds different scores to the same."""
    guard = make_guard()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = forward(guard, ROWS)
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_without_an_unsafe_output_the_largest_category_stands_for_it():
    """Kills: another stand-in for unsafe, an output too many, a bias that was declined."""
    guard = make_guard(unsafe_head=False, clf_head_bias=False)
    scores = score(guard, ROWS)
    assert scores.shape == (3, 3) and torch.equal(scores[:, 0], scores[:, 1:].amax(1))
    shapes = {name: p.shape for name, p in guard.adapter().items() if "head" in name}
    assert shapes == {"guard_head.weight": (2, 32)}


def test_probability_is_the_sigmoid_of_the_logit():
    """Kills: probabilities in single precision, where high ones tie at 1; categories in another order."""
    verdict = verdict_on(make_guard(), [20.0, -1.0, 3.0], tokens=5)
    unsafe, theft, hate = (1 / (1 + math.exp(-z)) for z in (20.0, -1.0, 3.0))
    assert verdict.unsafe == pytest.approx(unsafe, abs=1e-12) and verdict.unsafe < 1
    assert verdict.categories == pytest.approx({"theft": theft, "hate": hate}, abs=1e-12)


def test_prompts_and_answers_are_flagged_from_their_own_threshold():
    """Kills: one threshold for both, > in place of >=, a broken guard whose NaN lets everything pass."""
    guard = make_guard(threshold=0.5, prompt_threshold=0.75)

    def flagged(logit, tokens):
        return verdict_on(guard, [logit, 9.0, 9.0], tokens).flagged

    assert flagged(0.0, tokens=1) and not flagged(-1e-6, tokens=1)
    assert flagged(1.1, tokens=0) and not flagged(1.0, tokens=0)  # 0.75 is the probability of logit 1.0986
    assert flagged(math.nan, tokens=0) and flagged(math.nan, tokens=1)


def test_classify_gives_a_verdict_for_each_row_in_order():
    """Kills: verdicts in another order, an answer or messages not read, a traceback for no prompt."""
    guard, pair = make_guard(), ("hi", "safe")
    messages = [*user("hi"), {"role": "assistant", "content": "safe"}]
    rows = [{"prompt": "hi"}, {"prompt": "how is it?"}, {"prompt": "hi", "response": "safe"}]
    texts = [ids_of(guard.tokenizer, *text) for text in (("hi",), ("how is it?",), pair, pair)]
    found = guard.classify([*rows, {"messages": messages}])
    wanted = score(guard, texts)[:, 0].sigmoid().tolist()
    assert [verdict.unsafe for verdict in found] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(UserError, match="prompt"):
        guard.classify([{"response": "safe"}])


@pytest.mark.parametrize("path", PATHS)
def test_only_the_dropout_of_lora_acts_and_in_training_only(path):
    """Kills: GPT-2's own dropout, a training mode that does not reach LoRA, a score that stays in it."""
    plain, guard = (make_guard("gpt2", guard_path=path, lora_dropout=p).train() for p in (0.0, 0.5))
    assert torch.equal(forward(plain, ROWS), forward(plain, ROWS))
    assert not torch.equal(forward(guard, ROWS), forward(guard, ROWS))
    assert torch.equal(score(guard, ROWS), score(guard, ROWS))


def test_the_default_guard_prompt_is_the_end_token_and_a_long_one_is_refused():
    """Kills: a question of many tokens, one without room for a conversation, LoRA left in the model."""
    guard, chat_model = make_guard(guard_prompt=""), make_model()
    assert guard.guard_prompt_ids.tolist() == [[guard.tokenizer.eos_token_id]]
    assert GuardConfig().verdict_every == 32
    with pytest.raises(ValueError, match="does not fit"):
        guard_for(chat_model, guard_prompt="a " * conftest.CONTEXT)
    assert not any(isinstance(module, LoRALinear) for module in chat_model.modules())


def test_settings_that_make_no_sense_are_refused():
    """Kills: a check that is left out, or that takes true for 1."""
    wrong = [{"lora_r": 0}, {"lora_r": True}, {"lora_alpha": math.inf}, {"lora_alpha": -1.0}]
    wrong += [{"lora_dropout": 1.0}, {"lora_dropout": -0.1}, {"date": "no date"}, {"guard_path": "half"}]
    wrong += [{"threshold": "1"}, {"prompt_threshold": math.nan}, {"verdict_every": -1}]
    wrong += [{"verdict_every": True}, {"categories": ["a", "a"]}, {"categories": "ab"}]
    wrong += [{"categories": [], "unsafe_head": False}]
    words = {"lora_r": "LoRA|lora_r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
    words |= {"guard_path": "guard path", "date": "isoformat"}
    for settings in wrong:
        name = next(iter(settings))
        with pytest.raises(ValueError, match=words.get(name, name)):
            GuardConfig(**settings)
