"""Rows as people's tables have them: labels, columns of known sets, containers, encodings."""

import csv
import gzip
import json

import datasets
import pytest
from conftest import make_rows, rows_of, user, write

from common import UserError, read_file
from data import conversation, labels, load_splits


def told(path):
    """(last text, is_safe, category) of each row."""
    return [(conversation(row)[-1]["content"], row["is_safe"], row["category"]) for row in rows_of(path)]


@pytest.mark.parametrize(
    "safe, unsafe",
    [
        ("true", "False"),
        ("TRUE ", "false"),
        ("1", "0"),
        ("1.0", "0.0"),
        ("safe", "unsafe"),
        (" Safe", "UNSAFE "),
    ],
)
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_labels_of_a_table(tmp_path, safe, unsafe, delimiter):
    """Kills: a label that is read by its case or its type, swapped labels, a comma as the only delimiter."""
    lines = ["Prompt", "IS_SAFE "], ["bread", safe], ['"a; b, c\n\td"', unsafe]
    (tmp_path / "rows.csv").write_text("".join(delimiter.join(cells) + "\r\n" for cells in lines))
    assert told(tmp_path / "rows.csv") == [("bread", True, None), ("a; b, c\n\td", False, None)]


@pytest.mark.parametrize("label", ["maybe", "2", "-1", "safe?", "n/a"])
def test_a_label_that_is_not_understood_is_refused(tmp_path, label):
    """Kills: a label that counts as safe or unsafe because it is not the other word."""
    (tmp_path / "rows.csv").write_text(f"prompt,is_safe\na,safe\nb,{label}\n")
    with pytest.raises(UserError, match=rf"row 2: `is_safe` is '{label.replace('?', '.')}'; .*unsafe"):
        rows_of(tmp_path / "rows.csv")


def test_categories_as_pandas_and_parquet_write_them(tmp_path):
    """Kills: a dict's text that is not JSON, a null kind of harm taken for false."""
    text = 'prompt,category\na,"{\'theft\': True, \'hate\': False}"\nb,"{""theft"": 0, ""hate"": 1}"\nc,{}\n'
    (tmp_path / "rows.csv").write_text(text.replace("c,{}\n", ""))
    theft, hate = {"theft": True, "hate": False}, {"theft": False, "hate": True}
    assert told(tmp_path / "rows.csv") == [("a", False, theft), ("b", False, hate)]
    rows = [{"prompt": "a", "category": {"theft": True}}, {"prompt": "b", "category": {"hate": False}}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert told(tmp_path / "rows.parquet") == [("a", False, {"theft": True}), ("b", True, {"hate": False})]


@pytest.mark.parametrize("text", [json.dumps, str])
def test_messages_of_a_table(tmp_path, text):
    """Kills: a conversation in a table's cell that is taken for a prompt, or only read as JSON."""
    messages = [{"role": "user", "content": 'it\'s "b"'}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.csv").write_text("messages;is_safe\n")
    with open(tmp_path / "rows.csv", "a", newline="") as file:
        csv.writer(file, delimiter=";").writerow([text(messages), "1"])
    [row] = rows_of(tmp_path / "rows.csv")
    assert conversation(row) == messages


def test_columns_of_known_sets(tmp_path):
    """Kills: a set whose response or prompt is dropped, swapped labels, a missing label taken for safe."""
    pku = {"prompt": "p", "response_0": "x", "response_1": "y"}
    pku |= {"is_response_0_safe": True, "is_response_1_safe": False, "better_response_id": 0}
    wild = {"prompt": "w", "response": None, "prompt_harm_label": "harmful", "response_harm_label": None}
    half = wild | {"response": "yes"}  # nobody labelled the answer
    both = wild | {"response": "no", "response_harm_label": "unharmful"}
    aegis = {"prompt": "e", "response": "sure", "prompt_label": "safe", "response_label": "unsafe"}
    share = {"conversations": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "is_safe": 0}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "m"}]}], "is_safe": "safe"}
    path = write(tmp_path / "rows.jsonl", [pku, wild, half, both, aegis, share, parts])
    wanted = [("x", True), ("y", False), ("w", False), ("w", False), ("w", False), ("no", True)]
    wanted += [("e", True), ("sure", False), ("g", False), ("m", True)]
    assert [(text, is_safe) for text, is_safe, _ in told(path)] == wanted
    assert [conversation(row)[0]["content"] for row in rows_of(path)] == list("ppwwwweehm")


def test_containers(tmp_path):
    """Kills: a suffix that is not read, in capitals or packed; an array that is read as lines."""
    rows = make_rows(6)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.JSONL").write_text(lines)
    (tmp_path / "b.ndjson").write_text(lines)
    (tmp_path / "c.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "d.json").write_text(lines)
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "f.json.GZ").write_bytes(gzip.compress(json.dumps(rows).encode()))
    table = "".join(f"{row['prompt']}\t{row['response']}\t{row['is_safe']}\n" for row in rows)
    (tmp_path / "g.tsv").write_text("prompt\tresponse\tis_safe\n" + table)
    (tmp_path / "h.csv.gz").write_bytes(gzip.compress(("prompt\tresponse\tis_safe\n" + table).encode()))
    for path in sorted(tmp_path.iterdir()):
        assert [text for text, _, _ in told(path)] == [row["response"] for row in rows], path.name
        assert [is_safe for _, is_safe, _ in told(path)] == [row["is_safe"] for row in rows]


def test_a_folder_names_the_files_that_are_not_read(tmp_path, capsys):
    """Kills: rows.xlsx that is left out in silence."""
    write(tmp_path / "rows.jsonl", make_rows(4))
    (tmp_path / "more.xlsx").touch()
    assert len(rows_of(tmp_path)) == 4
    assert "not read: more.xlsx" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json"])
def test_encodings_that_say_what_they_are(tmp_path, encoding, name):
    """Kills: a byte-order mark in the first column's name, UTF-16 of PowerShell read as UTF-8."""
    text = {
        "rows.jsonl": '{"prompt": "größe 東京", "is_safe": true}\r\n',
        "rows.csv": "prompt,is_safe\r\ngröße 東京,1\r\n",
        "rows.json": '[{"prompt": "größe 東京", "is_safe": true}]',
    }[name]
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert told(tmp_path / name) == [("größe 東京", True, None)]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "mac-roman", "cp437", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_other_encodings_are_refused(tmp_path, encoding, name):
    """Kills: bytes that are replaced by question marks and judged."""
    text = {"rows.jsonl": '{"prompt": "größe", "is_safe": true}\n', "rows.csv": "prompt,is_safe\ngröße,1\n"}
    (tmp_path / name).write_bytes(text[name].encode(encoding))
    with pytest.raises(UserError, match="rows"):
        rows_of(tmp_path / name)


def test_a_row_that_does_not_fit_the_header_is_refused(tmp_path):
    """Kills: cells that slide into other columns."""
    (tmp_path / "rows.csv").write_text("prompt,is_safe\na,1\nb,c,0\n")
    with pytest.raises(UserError, match="row 2: there are 3 cells for 2 columns"):
        rows_of(tmp_path / "rows.csv")


def test_two_taxonomies_learn_together(tmp_path):
    """Kills: a set that is refused because of the other's names, a name that it lacks taken for false."""
    mine = [row | {"category": {"greed": not row["is_safe"]}} for row in make_rows(40, 100)]
    files = [write(tmp_path / "a.jsonl", make_rows(40)), write(tmp_path / "b.jsonl", mine)]
    splits, names = load_splits(files)
    assert names == ["theft", "hate", "greed"]
    for row in splits["train"]:
        unknown = labels([row], names)[0].isnan().tolist()
        assert unknown == ([False, True, True, False] if "greed" in row["category"] else [False] * 3 + [True])


def test_lines_come_one_at_a_time_and_a_bad_one_stays_in_its_place(tmp_path):
    """Kills: a file that is read whole, a reader that ends at a bad line."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": \n{"prompt": "b"}\n')
    (where, first), (place, bad), (_, last) = read_file(tmp_path / "rows.jsonl")
    assert where.endswith("line 1") and place.endswith("line 3") and isinstance(bad, UserError)
    assert [first, last] == [{"prompt": "a"}, {"prompt": "b"}]
    assert conversation(first) == user("a")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 2**16)[:-8])
    rows = read_file(tmp_path / "cut.jsonl.gz")
    assert next(rows)[1] == first  # it comes before the damage at the end is seen
    with pytest.raises(UserError, match="cannot read"):
        list(rows)


MESSAGE = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a", "more": "b"}
REFUSED = {
    "two columns of one name": ("prompt,Prompt,is_safe\na,b,1\n", "several columns"),
    "one name twice": ("prompt,prompt,is_safe\na,b,1\n", "the same name"),
    "an open quote": ('is_safe,prompt\n1,a\n0,"b\n1,c\n', "cannot read"),
    "a category in Latin-1": ({"prompt": "a", "category": {"cr\udce9dit": True}}, "must be text"),
    "a number for a category": ("prompt,category\na,\"{1: True, 'a': False}\"\n", "must be text"),
    "one message": ({"messages": MESSAGE, "is_safe": 1}, "line 1"),
    "texts for messages": ({"messages": ["a"], "is_safe": 1}, "line 1"),
    "text for messages": ("messages,is_safe\nhi,1\n", "row 1"),
    "two conversations": ({"messages": [MESSAGE], "conversations": [MESSAGE], "is_safe": 1}, "not both"),
    "more in a part": ({"messages": [MESSAGE | {"content": [PART]}], "is_safe": 1}, "more"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_text_that_would_be_lost_is_refused(tmp_path, content, said):
    """Kills: a text, a row or a label that another one silently replaces, a traceback."""
    path = tmp_path / ("rows.csv" if isinstance(content, str) else "rows.jsonl")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=said):
        rows_of(path)


def test_damaged_utf_16_is_refused(tmp_path):
    """Kills: a traceback for half of a character."""
    (tmp_path / "rows.jsonl").write_bytes('{"prompt": "a", "is_safe": 1}'.encode("utf-16") + b"x")
    with pytest.raises(UserError, match="cannot read"):
        rows_of(tmp_path / "rows.jsonl")


def test_an_array_may_stand_below_blank_lines(tmp_path):
    """Kills: an array that is read as lines because it does not begin on the first one."""
    (tmp_path / "rows.json").write_text(
        '\n \n[\n{"prompt": "a", "is_safe": 1},\n{"prompt": "b", "is_safe": 0}\n]\n'
    )
    assert told(tmp_path / "rows.json") == [("a", True, None), ("b", False, None)]


def test_a_table_of_one_column_has_commas_in_its_text(tmp_path):
    """Kills: a text that is split where the header has no delimiter."""
    (tmp_path / "rows.tsv").write_text("prompt\nHello, how; are you\n")
    [(_, row)] = read_file(tmp_path / "rows.tsv")
    assert row == {"prompt": "Hello, how; are you"}


def test_a_blank_response_does_not_label_its_prompt(tmp_path):
    """Kills: one prompt that is both safe and unsafe."""
    row = {"prompt": "a", "response": " ", "prompt_label": "safe", "response_label": "unsafe"}
    assert told(write(tmp_path / "rows.jsonl", [row])) == [("a", True, None)]


def test_the_first_label_that_is_not_understood_is_named(tmp_path):
    """Kills: an error that depends on the order of a set, and so on the process."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p", "S": "a", "H": "b", "V": "c"}])
    with pytest.raises(UserError, match="`is_safe` is 'a'"):
        rows_of(path)
