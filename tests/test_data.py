"""Rows, their splits, their labels and their token ids."""

import gzip
import json
import math
import re
import time
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from conftest import CHATML, ids_of, make_rows, rows_of, user, write
from pyarrow.parquet import write_table

import data
from chat import conversation, encode
from data import check_row, encode_row, labels, load_splits, prompt_key, read_file, read_rows
from errors import UserError
from train import epoch_updates

NAMES = ["theft", "hate"]
OK = b'{"prompt": "a", "is_safe": true}\n'


def said(role, content):
    return {"role": role, "content": content}


CHAT = [said("system", "be kind"), said("user", "hi"), said("assistant", "safe"), said("user", "or?")]


def prompts(rows):
    return {row["prompt"] for row in rows}


def put(path, content):
    """Write bytes, or (names, columns) as Parquet."""
    if isinstance(content, bytes):
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    else:
        names, columns = content
        write_table(pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names), path)
    return str(path)


# ---------------------------------------------------------------------------
# Splits

SPLIT_OF = {
    "train": "latest.jsonl contest.csv protest.parquet retrieval.jsonl devices.jsonl interval.csv a.JSONL",
    "test": "my-test.jsonl TEST_2.csv eval.jsonl testing.2.parquet",
    "validation": "dev.parquet x.validation.jsonl.gz val2.csv",
}


@pytest.mark.parametrize(("split", "name"), [(s, name) for s in SPLIT_OF for name in SPLIT_OF[s].split()])
def test_whole_words_of_a_files_name_choose_its_split(split, name, tmp_path):
    """Kills: "test" in "latest" or "val" in "interval" as a split, a word in capitals, a folder's name."""
    (tmp_path / "test-dev").mkdir()
    table = ["prompt", "is_safe"], [["a"], [True]]
    content = {".csv": b"prompt,is_safe\na,true\n", ".parquet": table}.get(Path(name).suffix, OK)
    path = put(tmp_path / "test-dev" / name, content)
    assert [(found, len(rows)) for _, found, rows in read_rows([path])] == [(split, 1)]


def test_splits_share_no_prompt_and_lose_no_row(tmp_path):
    """Kills: a split by row, one that is dropped or too large, one that follows the order of the rows."""
    rows = make_rows(400)
    splits, names, notes = load_splits([write(tmp_path / "rows.jsonl", rows)])
    cut = [f"{name}: {len(splits[name])} of these rows, cut by prompt" for name in ("validation", "test")]
    assert names == NAMES and notes == [f"train: 400 rows of {tmp_path}/rows.jsonl", *cut]
    found = sorted(row["response"] for split in splits.values() for row in split)
    assert found == sorted(row["response"] for row in rows)
    assert sum(len(prompts(split)) for split in splits.values()) == 200
    assert all(10 <= len(prompts(splits[name])) <= 32 for name in ("validation", "test"))
    again = load_splits([write(tmp_path / "reversed.jsonl", rows[::-1])]).splits
    assert {s: prompts(rows) for s, rows in again.items()} == {s: prompts(rows) for s, rows in splits.items()}


def test_chats_of_one_greeting_are_split_by_all_that_the_user_says(tmp_path):
    """Kills: a split by the first turn, which cannot split these, or by the text as it is written."""
    rows, greeting = [], [said("user", "Hello"), said("assistant", "Hi.")]
    for n in range(400):
        turn = f"question {n // 2}" if n % 2 else f"QUESTION {n // 2}\n"
        rows.append({"messages": [*greeting, said("user", turn)], "is_safe": bool(n % 2)})
    splits = load_splits([write(tmp_path / "rows.jsonl", rows)]).splits
    keys = [{prompt_key(row) for row in split} for split in splits.values()]
    assert all(keys) and sum(map(len, keys)) == 200 == len(set.union(*keys))


def test_given_splits_stay_whole_and_out_of_training(tmp_path):
    """Kills: rows that are moved into a given split, training on prompts of the test split."""
    test = [row | {"prompt": f" {row['prompt'].upper()}\n"} for row in make_rows(20, 180)]
    parts = {"train": make_rows(200), "dev": make_rows(40, 150), "my-test": test}
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()]
    splits, _, notes = load_splits(files)
    assert splits["test"] == test and prompts(splits["validation"]) == prompts(make_rows(30, 150))
    assert prompts(splits["train"]) == prompts(make_rows(150))
    read = ["train: 200 rows of ", "validation: 40 rows of ", "test: 20 rows of "]
    assert notes[:3] == [start + file for start, file in zip(read, files, strict=True)]
    assert [note[:25] for note in notes[3:]] == ["left out 10 validation ro", "left out 50 train rows: t"]
    half = load_splits(files[::2]).splits
    assert half["test"] == test
    assert prompts(half["train"]) | prompts(half["validation"]) == prompts(make_rows(180))


def test_beavertails_from_the_hub_is_its_30k_version(monkeypatch):
    """Kills: all splits of the hub, which hold the same rows twice; its test rows in training."""
    sizes = {"330k_train": (400, 0), "330k_test": (80, 400), "30k_train": (100, 0), "30k_test": (20, 400)}
    hub = {name: datasets.Dataset.from_list(make_rows(*size)) for name, size in sizes.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    splits = load_splits(["PKU-Alignment/BeaverTails"]).splits
    assert len(splits["train"]) + len(splits["validation"]) == 100 and splits["test"] == make_rows(20, 400)


def test_a_category_has_an_output_if_training_shows_it_both_ways(tmp_path):
    """Kills: an output without positives or negatives, one of validation rows alone, lost names."""
    files = []
    for name, new, count, start in (("a", "theft", 60, 0), ("b", "greed", 60, 100), ("dev", "late", 20, 200)):
        rows = make_rows(count, start)
        for row in rows:
            row["category"] = {new: not row["is_safe"], "never": False, "rare": not row["is_safe"] or None}
        files.append(write(tmp_path / f"{name}.jsonl", rows))
    _, names, notes = load_splits(files)
    assert names == ["theft", "greed"] and notes[-1].endswith("true and false: never, rare, late")


def test_what_cannot_be_learnt_from_is_refused(tmp_path):
    """Kills: a guard of one class, an epoch chosen on none, a file without rows, one of two splits."""
    rows = make_rows(100)
    for name, part, message in (
        ("train-test.jsonl", rows, "has the words of several splits: train, test"),
        ("dev_eval.jsonl", rows, "has the words of several splits: validation, test"),
        ("rows.jsonl", rows[1::2], "the train split .*needs safe and unsafe ones"),
        ("test.jsonl", rows, "the train split has 0 rows"),
        ("rows.jsonl", rows[:4], "the validation split"),
        ("rows.jsonl", [], "has no rows"),
    ):
        with pytest.raises(UserError, match=message):
            load_splits([write(tmp_path / name, part)])


def test_over_blocking_rows_are_unlike_the_training_rows():
    """Kills: a row of overblocking.jsonl that differs by one word from a row to learn from."""
    samples = Path(data.__file__).parent / "samples"
    held_out, *learnt = (rows_of(str(samples / f"{n}.jsonl")) for n in ("overblocking", "sample", "prompts"))
    assert sum(row["kind"] == "hard_negative" for row in held_out) >= 60
    held_out, *learnt = (
        [{*re.findall("[a-z]+", row["prompt"].lower())} for row in part] for part in (held_out, *learnt)
    )
    for words in held_out:
        assert max(len(words & other) / len(words | other) for part in learnt for other in part) < 0.5, words


# ---------------------------------------------------------------------------
# Reading and checking


def test_the_kinds_of_files_hold_the_same_rows(tmp_path):
    """Kills: a byte-order mark in a text, a type that is guessed, a cell cut at a line, "None" as none."""
    rows = make_rows(8)
    rows[1] |= {"prompt": '"2020-01-01", or;\r\n\tso', "response": "None"}
    rows[2] |= {"prompt": "007", "response": None}
    lines = "".join(json.dumps(row) + "\r\n\n" for row in rows).encode("utf-8-sig")
    for name in ("a.JSONL", "b.jsonl.gz"):
        put(tmp_path / name, lines)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    flat = [row | {"category": json.dumps(row["category"]), "is_safe": None} for row in rows]
    datasets.Dataset.from_list(flat).to_csv(tmp_path / "d.csv")
    for file in sorted(tmp_path.iterdir()):
        assert [row | {"response": row["response"] or None} for row in rows_of(str(file))] == rows, file.name


LABELS = {"true": True, "FALSE ": False, "1": True, "0": False, "1.0": True, "0.0": False}
LABELS |= dict.fromkeys(["", "null", "NaN", "None"])


@pytest.mark.parametrize(("word", "label"), LABELS.items())
def test_labels_are_read_as_tables_write_them(word, label, tmp_path):
    """Kills: a label that is read by its case or its type, swapped labels, an unknown one taken for false."""
    cells = f'prompt,category,is_safe\na,"{{""theft"": ""{word}"", ""x"": 0}}",\nb,"{{""x"": 0}}",{word}\n'
    kind, whole = rows_of(put(tmp_path / "rows.csv", cells.encode()))
    assert kind["category"].get("theft") is label and kind["is_safe"] is (not label)
    assert whole["is_safe"] is (label is not False)


@pytest.mark.parametrize("value", ["maybe", "2", "-1", "safe", "yes", "n/a", 2, [], {}])
def test_other_labels_are_refused_with_the_tool_that_reads_them(value, tmp_path):
    """Kills: a label that counts as safe or unsafe because it is not the other word."""
    for row in ({"is_safe": value}, {"category": {"theft": value}}):
        path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "is_safe": 1}, {"prompt": "b"} | row])
        with pytest.raises(UserError, match=rf"line 2: .*{re.escape(repr(value))}, not .*tools/convert\.py"):
            rows_of(path)


def test_what_a_row_leaves_out_is_unknown_or_follows(tmp_path):
    """Kills: a default for an absent category, an is_safe that does not follow from the categories."""
    rows = make_rows(3)
    del rows[0]["category"], rows[1]["is_safe"], rows[2]["is_safe"]
    rows[2]["category"]["hate"] = None
    found = labels(rows_of(write(tmp_path / "rows.jsonl", rows)), NAMES)
    assert found.nan_to_num(9).tolist() == [[1, 9, 9], [0, 0, 0], [1, 1, 9]]


BAD_ROWS = {
    "null prompt": {"prompt": None},
    "number for a response": {"prompt": "a", "response": 3},
    "text for a row": "a",
    "a column in capitals": {"prompt": "a", "Response": "b"},
    "list for a category": {"prompt": "a", "category": ["theft"]},
    "safe with a true category": {"prompt": "a", "category": {"theft": True}, "is_safe": True},
    "no label": {"prompt": "a", "is_safe": None, "category": {"theft": None}},
    "text for messages": {"messages": "user: hi"},
    "one message": {"messages": said("user", "a")},
    "content with a picture": {"messages": user([{"type": "image", "text": "a"}])},
    "system message later": {"messages": [*user("a"), said("system", "b")]},
    "one user twice": {"messages": user("a") * 2},
    "unknown role": {"messages": [*user("a"), said("tool", "b")]},
    "message with more than text": {"messages": [said("user", "a") | {"tool_calls": [{}]}]},
    "messages and a prompt": {"messages": CHAT, "prompt": "b"},
    "messages and a response": {"messages": CHAT, "response": "b"},
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_its_place(tmp_path, row):
    """Kills: a check that is left out, a row that is skipped in silence, a count from zero."""
    row = {"is_safe": False} | row if isinstance(row, dict) else row
    with pytest.raises(UserError, match=r"rows\.jsonl, line 41: "):
        load_splits([write(tmp_path / "rows.jsonl", [*make_rows(40), row])])


STARTS = pyarrow.array([0, 1, 2, 3], pyarrow.int32()).buffers()[1]
LATIN = pyarrow.StringArray.from_buffers(3, STARTS, pyarrow.py_buffer(b"a\xffa"))
WHEN = pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us"))  # the second date does not exist
TABLE, THREE, ZIPPED = ["prompt", "is_safe", "x"], [["a"] * 3, [1] * 3], gzip.compress(OK * 300)
DAMAGED = {  # {what cannot be read: (name, content, rows before it, its place, rows after it)}
    "no JSON": ("r.jsonl", OK + b'\n{"prompt": \n' + OK, 1, "line 3", 1),
    "deep": ("r.jsonl", OK + b"[" * 100_000 + b"\n" + OK, 1, "line 2", 1),
    "a long number": ("r.jsonl", OK + b"9" * 5000 + b"\n" + OK, 1, "line 2", 1),
    "a byte": ("r.jsonl", OK + OK.replace(b"a", b"\xff", 1) + OK, 1, "line 2", 1),
    "UTF-16": ("r.jsonl", OK + OK.decode().encode("utf-16") + OK, 1, "line 2", 0),
    "half a pair": ("r.jsonl", OK.replace(b'"a"', b'"\\ud83d"') + OK, 0, "line 1", 1),
    "half in an answer": ("r.jsonl", OK + OK.replace(b"}", b', "response": "\\udc01"}') + OK, 1, "line 2", 1),
    "twice a key": ("r.jsonl", OK + OK.replace(b"}", b', "prompt": "b"}') + OK, 1, "line 2", 1),
    "twice a nested key": ("r.jsonl", OK.replace(b"}", b', "x": {"y": 1, "y": 2}}') + OK, 0, "line 1", 1),
    "twice a key in a cell": ("r.csv", b'prompt,category\na,"{""x"": 1, ""x"": 0}"\n', 0, "line 2", 0),
    "twice a column": ("r.csv", b"prompt,is_safe,prompt\na,1,b\n", 0, "after the start", 0),
    "twice an unread column": ("r.csv", b"prompt,is_safe,x,x\na,1,b,c\n", 0, "after the start", 0),
    "twice in Parquet": ("r.parquet", (["is_safe", "a", "a"], [*THREE, WHEN]), 0, "after the start", 0),
    "a byte in a cell": ("r.csv", b'prompt,is_safe\n\xff,1\n"a",1\n', 0, "line 2", 1),
    "many cells": ("r.csv", b'prompt,is_safe\n"a",1\na,1,2\n\na,"1\n"\n', 1, "line 3", 1),
    "few cells": ("r.csv", b'prompt,is_safe\n"a","\n1"\na\na,0\n', 1, "line 4", 1),
    "a stray quote": ("r.csv", b'prompt,is_safe\na,1\na,1\n"a" b,1\na,0\n', 2, "line 4", 1),
    "a stray quote at the start": ("r.csv", b'prompt,is_safe\n"a" b,1\na,0\n', 0, "line 2", 1),
    "an open quote": ("r.csv", b'prompt,is_safe\na,1\n"a,1\na,0\n', 1, "line 4", 0),
    "a cut .gz": ("r.jsonl.gz", ZIPPED[:-8], 300, "after line 300", 0),
    "a cell": ("r.parquet", (TABLE, [*THREE, LATIN]), 1, "row 2", 1),
    "a date": ("r.parquet", (TABLE, [*THREE, WHEN]), 1, "row 2", 1),
    "no Parquet": ("r.parquet", b"PAR1 or not", 0, "after the start", 0),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_read_costs_itself_alone(kind, tokenizer, tmp_path):
    """Kills: a reader that ends at a bad row or loses those before damage, a guess at what is meant."""
    name, content, before, place, after = DAMAGED[kind]
    path, wanted, bad = tmp_path / name, ids_of(tokenizer, "a"), []
    path.write_bytes(content) if name.endswith(".gz") else put(path, content)
    rows = list(read_file(path))
    for where, row in rows:
        try:
            assert encode_row(tokenizer, check_row(row, where))[0] == wanted
        except UserError as error:
            bad.append(str(error))
    assert bad[0].startswith(f"{path}, {place}: ") and ("comes twice" in bad[0]) == ("twice" in kind)
    assert rows[before][0] == f"{path}, {place}" and len(rows) - len(bad) == before + after
    if kind in ("a cell", "a date"):  # training and evaluation do not read this column
        assert len(rows_of(str(path))) == 3


def test_other_sources_are_refused_in_one_line(tmp_path):
    """Kills: a traceback for a file of another kind, an error that does not say which tool reads it."""
    (tmp_path / "folder").mkdir()
    ours = write(tmp_path / "a.jsonl", make_rows(40))
    for name in ("folder", "rows.tsv", "rows.json", "rows.csv.gz", "rows.xlsx"):
        path = str(tmp_path / name) if name == "folder" else put(tmp_path / name, OK)
        for sources in ([path], [ours, path]):
            with pytest.raises(UserError, match=rf"^[^\n]*{name} is not [^\n]*tools/convert\.py[^\n]*$"):
                load_splits(sources)
    with pytest.raises(UserError, match=r"line 1: [^\n]*tools/convert\.py"):
        rows_of(write(tmp_path / "a.jsonl", [{"user_input": "a", "toxicity": 1}]))
    for sources in (["none.jsonl"], ["two/hub", "ids/here"]):
        with pytest.raises(UserError, match="is not a"):
            load_splits(sources)
    with pytest.raises(UserError, match=r"--dataset train\.jsonl"):  # what works without the hub
        load_splits(["no/such-data-set"])


@pytest.mark.parametrize("name", ["w.jsonl", "w.csv", "w.parquet"])
def test_wide_rows_are_read_in_time(name, tmp_path):
    """Kills: a time that grows with the square of the columns."""
    width = 60_000 if name == "w.jsonl" else 1500
    row = {"prompt": "a", "is_safe": "1"} | {f"c{n}": "1" for n in range(width)}
    content = {
        "w.jsonl": json.dumps(row).encode(),
        "w.csv": "\n".join([",".join(row), *[",".join(row.values())] * 20]).encode(),
        "w.parquet": (list(row), [[value] * 20 for value in row.values()]),
    }
    path = put(tmp_path / name, content[name])
    start = time.process_time()
    assert rows_of(path)[-1]["prompt"] == "a" and [row for _, row in read_file(Path(path))][-1] == row
    assert time.process_time() - start < 1


def test_messages_are_a_conversation_up_to_the_last_turn(tmp_path):
    """Kills: a history that is lost, an answer taken for a prompt, a cell's JSON taken for text, nulls."""
    chats = [CHAT, [*CHAT, said("assistant", "the answer")]]
    put(
        tmp_path / "a.parquet",
        (["messages", "is_safe"], [[[m | {"n": None} for m in c] for c in chats], [1, 0]]),
    )
    cells = [json.dumps(chat).replace('"', '""') for chat in chats]
    put(tmp_path / "b.csv", 'messages,is_safe\n"{}",1\n"{}",0\n'.format(*cells).encode())
    for file in ("a.parquet", "b.csv"):
        assert [conversation(row) for row in rows_of(str(tmp_path / file))] == chats


@pytest.mark.parametrize("blank", ["", " \n"])
def test_a_blank_answer_is_no_answer(tokenizer, blank):
    """Kills: an empty answer that gets an answer's verdict and threshold."""
    for row in ({"prompt": "hi", "response": blank}, {"messages": [*user("hi"), said("assistant", blank)]}):
        assert encode_row(tokenizer, row) == encode(tokenizer, user("hi"))


# ---------------------------------------------------------------------------
# Token ids; more of them in test_chat.py, and the control tokens in test_attacks.py

TEXTS = ["how is the bread?", "  spaces \n\n", "ünï 🙂", "\n", "<|im end|>", "a < b |> c"]


@pytest.mark.parametrize("messages", [*map(user, TEXTS), CHAT])
def test_texts_are_read_as_the_chat_template_writes_them(tokenizer, messages):
    """Kills: a template of our own, a text or a history that is trimmed, changed, cut or read by itself."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids, start, is_answer, _ = encode(tokenizer, messages)
    header = tokenizer("<|im_start|>user\n").input_ids
    assert ids == prompt and not is_answer and ids[:start][-len(header) :] == header
    pair = [*messages, said("assistant", "x" + messages[-1]["content"])]
    whole = tokenizer.apply_chat_template(pair, continue_final_message=True, return_dict=False)
    assert encode(tokenizer, pair)[:3] == (whole, len(prompt), True)


TEXT = "message['content']"
CUT = "message['content'].split('||')[{}]"
DROPS = {  # {what the template drops: (what it writes in place of each text, texts)}
    "what the answer repeats": (CUT.format(-1), ["harmful||hi", "harmful||hi"]),
    "what an earlier answer repeats": (CUT.format(-1), ["or?", "harmful||hi", "harmful||hi"]),
    "behind a mark that transformers removes": (CUT.format(0), ["hi|\U000f0000|harmful<|im_end|>"]),
    "a prompt": ("message['content'] if loop.index > 1 else ''", ["harmful", "safe", "or?"]),
}


@pytest.mark.parametrize(("shown", "texts"), DROPS.values(), ids=DROPS)
def test_a_text_that_the_template_drops_is_refused(tokenizer, shown, texts):
    """Kills: a verdict on a conversation that lacks a part, a check that finds it in another text."""
    tokenizer.chat_template = CHATML.replace(TEXT, f"({shown})")
    messages = [said(role, text) for role, text in zip(("user", "assistant") * 2, texts, strict=False)]
    with pytest.raises(UserError, match="drops a part"):
        encode(tokenizer, messages)


def test_a_system_message_must_be_shown_but_not_spaces_or_earlier_reasoning(tokenizer):
    """Kills: a verdict without the system message; a check on what the chat model does not read."""
    shown = "message['content'].split('</think>')[-1] | trim"
    earlier = [said("system", " be kind"), *user(" hi"), said("assistant", "hm</think>ok ")]
    tokenizer.chat_template = CHATML.replace(TEXT, shown)
    text = tokenizer.decode(ids_of(tokenizer, "or? ", "ha</think>so ", earlier))
    assert "be kind" in text and "ok" in text and "hm" not in text and text.endswith("ha</think>so ")
    tokenizer.chat_template = CHATML.replace("in messages", "in messages if message['role'] != 'system'")
    with pytest.raises(UserError, match="drops a part"):
        ids_of(tokenizer, "hi", "safe", earlier)


def test_a_refused_row_is_named(tokenizer):
    """Kills: an error that leaves a reader of a long file to search for its row."""
    tokenizer.chat_template = "{{ raise_exception('no such text') }}" + CHATML
    row = {"prompt": "hi", "response": "safe"}
    for where, message in (("rows.jsonl, line 7", r"^rows\.jsonl, line 7: .*no such text"), (None, "'safe'")):
        with pytest.raises(UserError, match=message):
            encode_row(tokenizer, row, where)


# ---------------------------------------------------------------------------
# Updates and cuts

LENGTHS = torch.tensor([7 * i % 101 + 1 for i in range(101)])


def seeded(function, *arguments):
    """What the function makes of one seed, of the same once more, and of another one."""
    return (function(*arguments, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))


@pytest.mark.parametrize("rows, per_update", [(100, 4), (101, 12), (3, 8), (64, 64)])
def test_an_epoch_has_every_row_in_full_updates_of_similar_lengths(rows, per_update):
    """Kills: a last partial update, rows left out, an order without a seed or by length."""
    updates, again, other = seeded(epoch_updates, LENGTHS[:rows], per_update)
    assert updates.shape == (math.ceil(rows / per_update), per_update)
    assert set(updates.flatten().tolist()) == set(range(rows))
    assert torch.equal(updates, again) and not torch.equal(updates, other)
    if rows == 100:
        lengths = LENGTHS[updates].double()  # (25, 4)
        assert (lengths.amax(1) / lengths.amin(1)).median() < 1.3
        assert abs(lengths[:12].mean() - lengths[12:].mean()) < 30  # in order they would be far apart


@pytest.mark.parametrize("name", ["Response", "response_0", "responses", " messages"])
def test_a_column_that_may_be_the_answer_is_refused(name, tmp_path):
    """Kills: a prompt that is judged alone although its answer stands in the next column."""
    row = {"prompt": "a", "is_safe": 1, name: "b"}
    write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    for path in (write(tmp_path / "rows.jsonl", [row]), str(tmp_path / "rows.parquet")):
        with pytest.raises(UserError, match=f"'{name}'.*tools/convert"):
            rows_of(path)
    if name.startswith("response"):  # beside an answer it is a column like others
        assert rows_of(write(tmp_path / "rows.jsonl", [row | {"response": "c"}]))


@pytest.mark.parametrize("roles", [["user assistant", "user"], ["tool"], ["user", "user"], ["assistant"]])
def test_a_role_is_one_of_three(roles):
    """Kills: roles that only look right when they are joined."""
    with pytest.raises(UserError, match=r"message|needs text"):
        conversation({"messages": [{"role": role, "content": "x"} for role in roles]})
