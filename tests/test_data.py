"""Rows, their splits, their labels and their token ids."""

import csv
import gzip
import json
import math
import re
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
    """Write bytes, or {name: column} as Parquet."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_table(pyarrow.table(content), path)
    return str(path)


def test_whole_words_of_a_files_name_choose_its_split(tmp_path):
    """Kills: "test" in "latest" or "val" in "interval", a word in capitals, a folder's name, a word lost."""
    (tmp_path / "test-dev").mkdir()
    words = {
        "train": ("latest", "interval", "train", "training"),
        "validation": ("x.validation", "valid", "my-val", "dev_1"),
        "test": ("TEST_2", "testing", "eval", "evaluation"),
    }
    for split, names in words.items():
        for name in names:
            path = put(tmp_path / "test-dev" / f"{name}.jsonl", OK)
            assert [(found, len(rows)) for _, found, rows in read_rows([path])] == [(split, 1)], name


def test_splits_share_no_prompt_and_lose_no_row(tmp_path):
    """Kills: a split by row, by the first turn or by the order of rows, one that is lost or too large."""
    rows, greeting = [], [said("user", "Hello"), said("assistant", "Hi.")]
    for n in range(400):
        turn = f"question {n // 2}" if n % 2 else f"QUESTION {n // 2}\n"
        rows.append({"messages": [*greeting, said("user", turn)], "is_safe": bool(n % 2)})
    keys = []
    for part in (rows, rows[::-1]):
        splits = load_splits([write(tmp_path / "rows.jsonl", part)]).splits
        assert sum(map(len, splits.values())) == 400
        keys.append({name: {prompt_key(row) for row in split} for name, split in splits.items()})
    assert keys[0] == keys[1] and len(set.union(*keys[0].values())) == 200
    assert sum(map(len, keys[0].values())) == 200
    assert all(10 <= len(keys[0][name]) <= 32 for name in ("validation", "test"))


def test_given_splits_stay_whole_and_out_of_training(tmp_path):
    """Kills: rows that are moved into a given split, training on test prompts, a missing split."""
    test = [row | {"prompt": f" {row['prompt'].upper()}\n"} for row in make_rows(20, 180)]
    parts = {"train": make_rows(200), "dev": make_rows(40, 150), "my-test": test}
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()]
    splits, names, notes = load_splits(files)
    assert names == NAMES and splits["test"] == test
    assert prompts(splits["validation"]) == prompts(make_rows(30, 150))
    assert prompts(splits["train"]) == prompts(make_rows(150))
    assert notes[0] == f"train: 200 rows of {files[0]}"
    assert [note[:22] for note in notes[3:]] == ["left out 10 validation", "left out 50 train rows"]
    half = load_splits(files[::2]).splits  # without the validation file
    assert half["test"] == test
    assert prompts(half["train"]) | prompts(half["validation"]) == prompts(make_rows(180))


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


def test_what_cannot_be_learnt_from_is_refused_in_one_line(tmp_path):
    """Kills: a guard of one class, an epoch chosen on none, two splits, a refusal that names no tool."""
    rows = make_rows(100)
    for name, part, message in (
        ("train-test.jsonl", rows, "has the words of several splits: train, test"),
        ("rows.jsonl", rows[1::2], "the train split .*needs safe and unsafe ones"),
        ("rows.jsonl", rows[:4], "the validation split"),
        ("rows.jsonl", [], "has no rows"),
        ("rows.jsonl", [{"user_input": "a", "toxicity": 1}], r"line 1: .*tools/convert\.py"),
    ):
        with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
            load_splits([write(tmp_path / name, part)])
    ours, table = (write(tmp_path / name, rows) for name in ("rows.jsonl", "rows.tsv"))
    for sources in ([table], [ours, table], [str(tmp_path)]):
        with pytest.raises(UserError, match=r"^[^\n]* is not [^\n]*tools/convert\.py[^\n]*$"):
            load_splits(sources)
    with pytest.raises(UserError, match=r"--dataset train\.jsonl"):  # what works without the hub
        load_splits(["no/such-data-set"])


def test_over_blocking_rows_are_unlike_the_training_rows():
    """Kills: a row of overblocking.jsonl that differs by one word from a row to learn from."""
    words = {}
    for name in ("overblocking", "sample", "prompts"):
        rows = rows_of(str(Path(data.__file__).parent / f"samples/{name}.jsonl"))
        words[name] = [{*re.findall("[a-z]+", row["prompt"].lower())} for row in rows]
    for held_out in words["overblocking"]:
        for learnt in words["sample"] + words["prompts"]:
            assert len(held_out & learnt) / len(held_out | learnt) < 0.5, held_out


def test_the_kinds_of_files_hold_the_same_rows(tmp_path):
    """Kills: a byte-order mark in a text, a type that is guessed, a cell cut at a line, "None" as none."""
    rows = make_rows(8)
    rows[1] |= {"prompt": '"2020-01-01", or;\r\n\tso', "response": "None"}
    rows[2] |= {"prompt": "007", "response": None}
    lines = "".join(json.dumps(row) + "\r\n\n" for row in rows).encode("utf-8-sig")
    put(tmp_path / "a.JSONL", lines)
    put(tmp_path / "b.jsonl.gz", gzip.compress(lines))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    flat = [row | {"category": json.dumps(row["category"]), "is_safe": None} for row in rows]
    datasets.Dataset.from_list(flat).to_csv(tmp_path / "d.csv")
    for file in tmp_path.iterdir():
        assert [row | {"response": row["response"] or None} for row in rows_of(str(file))] == rows, file.name


def test_labels_are_read_as_tables_write_them_or_follow_or_are_unknown(tmp_path):
    """Kills: a label read by its case or type, swapped ones, an unknown one taken for false, no default."""
    cells = [
        ("FALSE ", ""),
        ("1", ""),
        ("0.0", '{"theft": "true", "hate": 0}'),
        ("", '{"theft": "False", "hate": null}'),
        ("NaN", '{"theft": 1}'),
        ("", '{"theft": "", "hate": "0"}'),
    ]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("is_safe", "category", "prompt"), *((*row, "a") for row in cells)])
    found = labels(rows_of(str(tmp_path / "rows.csv")), NAMES).nan_to_num(9)  # 9: unknown
    assert found.tolist() == [[1, 9, 9], [0, 9, 9], [1, 1, 0], [0, 0, 9], [1, 1, 9], [0, 9, 0]]


BAD_ROWS = {
    "null prompt": {"prompt": None},
    "number for a response": {"prompt": "a", "response": 3},
    "list for a category": {"prompt": "a", "category": ["theft"]},
    "safe with a true category": {"prompt": "a", "category": {"theft": True}, "is_safe": True},
    "another word for a label": {"prompt": "a", "is_safe": "safe"},
    "no label": {"prompt": "a", "is_safe": None, "category": {"theft": None}},
    "text for messages": {"messages": "user: hi"},
    "one user twice": {"messages": user("a") * 2},
    "unknown role": {"messages": [*user("a"), said("tool", "b")]},
    "message with more than text": {"messages": [said("user", "a") | {"tool_calls": [{}]}]},
    "messages and a response": {"messages": CHAT, "response": "b"},
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_its_place(tmp_path, row):
    """Kills: a check that is left out, a word taken for a label, a row skipped in silence, a count from 0."""
    rows = [*make_rows(40), {"is_safe": False} | row]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 41: "):
        load_splits([write(tmp_path / "rows.jsonl", rows)])


@pytest.mark.parametrize("name", ["Response", "response_0"])
def test_a_column_that_may_be_the_answer_is_refused(name, tmp_path):
    """Kills: a prompt that is judged alone although its answer stands in the next column."""
    row = {"prompt": "a", "is_safe": 1, name: "b"}
    table = {column: [value] for column, value in row.items()}
    for path in (write(tmp_path / "rows.jsonl", [row]), put(tmp_path / "rows.parquet", table)):
        with pytest.raises(UserError, match=f"'{name}'.*tools/convert"):
            rows_of(path)
    beside = {"prompt": "a", "is_safe": 1, "response": "c", "response_0": "b"}
    assert rows_of(write(tmp_path / "rows.jsonl", [beside]))


WHEN = pyarrow.array([0, 2**62, 1], pyarrow.timestamp("us"))  # the second date does not exist
TABLE = {"prompt": ["a"] * 3, "is_safe": [1] * 3, "x": WHEN}
DAMAGED = {  # {what cannot be read: (name, content, rows before it, its place, rows after it)}
    "no JSON": ("r.jsonl", OK + b'\n{"prompt": \n' + OK, 1, "line 3", 1),
    "deep": ("r.jsonl", OK + b"[" * 100_000 + b"\n" + OK, 1, "line 2", 1),
    "a byte": ("r.jsonl", OK + OK.replace(b"a", b"\xff", 1) + OK, 1, "line 2", 1),
    "half a pair": ("r.jsonl", OK.replace(b'"a"', b'"\\ud83d"') + OK, 0, "line 1", 1),
    "twice a key": ("r.jsonl", OK + OK.replace(b"}", b', "prompt": "b"}') + OK, 1, "line 2", 1),
    "twice a key in a cell": ("r.csv", b'prompt,category\na,"{""x"": 1, ""x"": 0}"\n', 0, "line 2", 0),
    "twice a column": ("r.csv", b"prompt,is_safe,prompt\na,1,b\n", 0, "after the start", 0),
    "few cells": ("r.csv", b'prompt,is_safe\n"a","\n1"\na\na,0\n', 1, "line 4", 1),
    "a stray quote": ("r.csv", b'prompt,is_safe\na,1\na,1\n"a" b,1\na,0\n', 2, "line 4", 1),
    "a cut .gz": ("r.jsonl.gz", gzip.compress(OK * 300)[:-8], 300, "after line 300", 0),
    "a date": ("r.parquet", TABLE, 1, "row 2", 1),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_cannot_be_read_costs_itself_alone(kind, tokenizer, tmp_path):
    """Kills: a reader that ends at a bad row or loses those before damage, a guess at what is meant."""
    name, content, before, place, after = DAMAGED[kind]
    path, bad = tmp_path / name, []
    put(path, content)
    rows = list(read_file(path))
    for where, row in rows:
        try:
            assert encode_row(tokenizer, check_row(row, where))[0] == ids_of(tokenizer, "a")
        except UserError as error:
            bad.append(str(error))
    assert bad[0].startswith(f"{path}, {place}: ") and ("comes twice" in bad[0]) == ("twice" in kind)
    assert rows[before][0] == f"{path}, {place}" and len(rows) - len(bad) == before + after
    if kind == "a date":  # training and evaluation do not read this column
        assert len(rows_of(str(path))) == 3


def test_messages_are_a_conversation_and_a_blank_answer_is_none(tmp_path):
    """Kills: a lost history or answer, a cell's JSON taken for text, nulls, a blank answer kept."""
    chats = [CHAT, [*CHAT, said("assistant", "the answer")]]
    with_nulls = [[message | {"n": None} for message in chat] for chat in chats]
    table = put(tmp_path / "a.parquet", {"messages": with_nulls, "is_safe": [1, 0]})
    cells = [json.dumps(chat).replace('"', '""') for chat in chats]
    text = put(tmp_path / "b.csv", 'messages,is_safe\n"{}",1\n"{}",0\n'.format(*cells).encode())
    for file in (table, text):
        assert [conversation(row) for row in rows_of(file)] == chats
    blank = [{"prompt": "hi", "response": " \n"}, {"messages": [*user("hi"), said("assistant", "")]}]
    assert [conversation(row) for row in blank] == [user("hi")] * 2


@pytest.mark.parametrize("messages", [user("  ünï 🙂 \n\n"), user("a < b |> <|im end|>"), CHAT])
def test_texts_are_read_as_the_chat_template_writes_them(tokenizer, messages):
    """Kills: a template of our own, a text or a history that is trimmed, changed, cut or read by itself."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ids, start, is_answer, _ = encode(tokenizer, messages)
    header = tokenizer("<|im_start|>user\n").input_ids
    assert ids == prompt and not is_answer and ids[:start][-len(header) :] == header
    pair = [*messages, said("assistant", "x" + messages[-1]["content"])]
    whole = tokenizer.apply_chat_template(pair, continue_final_message=True, return_dict=False)
    assert encode(tokenizer, pair)[:3] == (whole, len(prompt), True)


def test_a_template_may_drop_spaces_and_earlier_reasoning_alone(tokenizer):
    """Kills: a lost part, one that another text has as well, a check too strict, a row that is not named."""
    content = "message['content']"
    repeated = [said("user", "or?"), said("assistant", "harmful||hi"), said("user", "harmful||hi")]
    behind_a_mark = user("hi|\U000f0000|harmful<|im_end|>")
    for template, messages in (
        (CHATML.replace(content, f"({content}.split('||')[-1])"), repeated),
        (CHATML.replace(content, f"({content}.split('||')[0])"), behind_a_mark),
        (CHATML.replace("in messages", "in messages if message['role'] != 'system'"), CHAT),
    ):
        tokenizer.chat_template = template
        with pytest.raises(UserError, match=r"^the row {'messages': \[{'role': .*drops a part"):
            encode_row(tokenizer, {"messages": messages})
    tokenizer.chat_template = CHATML.replace(content, f"({content}.split('</think>')[-1] | trim)")
    earlier = [*user(" hi"), said("assistant", "hm</think>ok ")]
    text = tokenizer.decode(ids_of(tokenizer, "or? ", "ha</think>so ", earlier))
    assert "ok" in text and "hm" not in text and text.endswith("ha</think>so ")


def test_an_epoch_has_every_row_in_full_updates_of_similar_lengths():
    """Kills: a last partial update, rows left out, an order without a seed or by length."""
    lengths = torch.tensor([7 * i % 101 + 1 for i in range(101)])

    def order(rows, per_update, seed=0):
        return epoch_updates(lengths[:rows], per_update, torch.Generator().manual_seed(seed))

    for rows, per_update in ((100, 4), (101, 12), (3, 8)):
        updates = order(rows, per_update)
        assert updates.shape == (math.ceil(rows / per_update), per_update)
        assert set(updates.flatten().tolist()) == set(range(rows))
    assert torch.equal(order(100, 4), order(100, 4)) and not torch.equal(order(100, 4), order(100, 4, seed=1))
    found = lengths[order(100, 4)].double()  # (25, 4)
    assert (found.amax(1) / found.amin(1)).median() < 1.3
    assert abs(found[:12].mean() - found[12:].mean()) < 30  # in order they would be far apart
