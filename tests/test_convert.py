"""tools/convert.py: foreign forms and columns of rows. Each test names the mutations that it kills."""

import gzip
import json
import os
from unittest.mock import Mock

import pyarrow
import pytest
from pyarrow.parquet import write_table

from tools import convert

PKU = {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 0}
SAFER = PKU | {"is_response_0_safe": True, "is_response_1_safe": False}
WILD = {"prompt": "w", "response": "r", "prompt_harm_label": "harmful", "response_harm_label": "unharmful"}
AEGIS = {"prompt": "e", "response": "r", "prompt_label": "safe", "response_label": "unsafe"}
TOXIC = {"user_input": "u", "model_output": "o", "toxicity": 0, "jailbreaking": 0}
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


@pytest.fixture
def converted(tmp_path, capsys):
    """A function: (rows, a table or the content of a file) -> (lines of the output, standard error)."""

    def run(content, *options, name="r.jsonl"):
        if isinstance(content, pyarrow.Table):
            write_table(content, tmp_path / name)
        else:
            text = "\n".join(map(json.dumps, content)) if isinstance(content, list) else content
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        status = convert.main([str(tmp_path / name), str(tmp_path / "out.jsonl"), *options])
        said = capsys.readouterr().err.replace(f"{tmp_path}/", "")
        assert status == (2 if said else 0)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()], said

    return run


def prompts(lines):
    return [line["prompt"] for line in lines]


def test_each_labelled_text_is_a_line(converted):
    """Kills: the other polarity, a text or label that is not read, an unknown label taken for a known one."""
    for row, wanted in (
        (TOXIC, [("u", None, True)]),
        (TOXIC | {"jailbreaking": 1}, [("u", None, False)]),
        (TOXIC | {"toxicity": 1}, [("u", None, False)]),
        (WILD, [("w", None, False), ("w", "r", True)]),
        (WILD | {"prompt_harm_label": 1, "response_harm_label": 0}, [("w", None, False), ("w", "r", True)]),
        (SAFER, [("p", "x", True), ("p", "y", False)]),
        (SAFER | {"is_response_0_safe": None}, [("p", "y", False)]),
        (AEGIS, [("e", None, True), ("e", "r", False)]),
        (AEGIS | {"prompt_label": 0, "response_label": 1}, [("e", None, True), ("e", "r", False)]),
        ({"prompt": "o", "S": 0, "V2": 1}, [("o", None, False)]),
        ({"prompt": "o", "S": 0, "V2": 0}, [("o", None, True)]),
        ({"behavior": "b", "generation": "g", "label": 1}, [("b", "g", False)]),
        ({"prompt": "a", "response": "r", "is_safe": 1}, [("a", "r", True)]),
        (PKU, [("p", "x", None), ("p", "y", None)]),
    ):
        lines, _ = converted([row])
        assert [(line["prompt"], line.get("response"), line.get("is_safe")) for line in lines] == wanted


@pytest.mark.parametrize("name", convert.PLAIN)
def test_a_name_says_no_polarity_and_some_words_do(converted, name):
    """Kills: `is_unsafe` 1 read as safe, a word that follows its column, a label read by its case or type."""
    values = ["Yes ", 1, "FALSE", 0.0, "UNHARMFUL", "toxic", "NaN", None]
    lines, _ = converted([{"prompt": "a", name: value} for value in values])
    yes = name in ("is_safe", "safe")
    assert [line.get("is_safe") for line in lines] == [yes, yes, not yes, not yes, True, False, None, None]


def test_a_label_between_0_and_1_needs_a_threshold(converted):
    """Kills: a probability that is rounded, a threshold that leaves out its own value."""
    rows = [{"prompt": str(value), "toxic": value} for value in (0, 0.2, "0.7", 0.9, 1)]
    lines, said = converted(rows)
    assert prompts(lines) == ["0", "1"] and said.count("--threshold") == 3
    lines, _ = converted(rows, "--threshold", "0.7")
    assert [line["is_safe"] for line in lines] == [True, True, False, False, False]


def test_categories(converted):
    """Kills: an unknown kind of harm taken for false, an is_safe that does not follow, a cell of text."""
    table = "prompt,category,is_safe\na,\"{'theft': True, 'hate': None}\",\n"
    table += 'b,"{""theft"": false}",\nc,,0\nd,"{""x"": 0}",unsafe\n'
    lines, said = converted(table, name="r.csv")
    assert [line.get("category") for line in lines] == [{"theft": True}, {"theft": False}, None, {"x": False}]
    assert [line["is_safe"] for line in lines] == [False, True, False, False] and said == ""


def test_what_has_two_meanings_or_none_is_refused(converted):
    """Kills: a text or a label that another one silently replaces, a good row that is lost with a bad one."""
    for row, why in (
        ({"prompt": "p", "is_safe": 2}, "`is_safe` is 2"),
        (PKU | {"response": "r"}, "response_0"),
        (PKU | {"is_safe": 1}, "response_0"),
        ({"prompt": "p", "is_safe": 1, "is_unsafe": 1}, "disagrees"),
        ({"prompt": "p", "is_safe": 1, "category": {"a": 1}}, "`category` is true"),
        ({"prompt": "p", "category": ["a"]}, "['a']"),
        ({"response": "r"}, "no text as `prompt`"),
        ({"prompt": 3}, "`prompt` is 3"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"prompt": "p", "Prompt": "q"}, "twice"),
        ({"messages": [USER], "prompt": "x"}, "last turn"),
        ({"messages": [USER | {"content": [{"type": "image", "text": "a"}]}]}, "not text"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [ANSWER]}, "roles"),
    ):
        lines, said = converted([{"prompt": "a"}, row, {"prompt": "b"}])
        assert prompts(lines) == ["a", "b"] and said.startswith("r.jsonl, line 2: ")
        assert why in said and said.count("\n") == 1


def test_other_columns_stay_and_translated_ones_go(converted):
    """Kills: a label that stays beside is_safe, a column that is lost, NaN in the output."""
    row = {"Prompt": "a", "toxic": 0, "S": 0, "Note ": "n", "x": float("nan"), "label": 1, "response": None}
    lines, _ = converted([row])
    assert lines == [{"prompt": "a", "is_safe": True, "Note ": "n", "x": None, "label": 1}]
    assert converted(lines)[0] == lines


def test_conversations(converted):
    """Kills: ShareGPT's form, text in parts, a system message or Python's notation that is not read."""
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    part = {"type": "text", "text": "a", "image_url": None}
    rows = [{"conversations": turns, "is_safe": 0}]
    rows += [{"messages": [USER | {"content": [part, part]}], "prompt": "aa", "unsafe": 1}]
    lines, said = converted(rows)
    found = [[message["content"] for message in line["messages"]] for line in lines]
    assert found == [["s", "a", "b"], ["aa"]] and said == ""
    assert [line["is_safe"] for line in lines] == [False, False]
    lines, _ = converted(f'messages;is_safe\n"{[USER]}";1\n', name="r.csv")
    assert lines == [{"messages": [USER], "is_safe": True}]


ROWS = [{"prompt": "größe 東京", "is_safe": True}, {"prompt": "b", "is_safe": False}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY = "\n " + json.dumps(ROWS, indent=1)
TABLE = "prompt\tis_safe\ngröße 東京\t1\nb\t0\n"


def test_kinds_of_files_and_encodings(converted):
    """Kills: an ending that is not read, in capitals or packed; a byte-order mark taken for text."""
    for ending, text in ((".ndjson", LINES), (".json", LINES), (".json", ARRAY), (".tsv", TABLE)):
        assert converted(gzip.compress(text.encode()), name=f"r{ending}.GZ") == (ROWS, "")
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            assert converted(text.encode(encoding), name=f"r{ending.upper()}") == (ROWS, "")
        assert converted(text.encode("gb18030"), "--encoding=gb18030", name=f"r{ending}") == (ROWS, "")


def test_tables(converted):
    """Kills: a delimiter of a cell taken for the table's, cells that slide, blank lines that are rows."""
    table = '\n Prompt ;"a,b,c"; IS_SAFE\n"x; y,\n";1,2;safe\nz;0\n\nlast;;0\n'
    lines, said = converted(table, name="r.csv")
    assert lines[0] == {"prompt": "x; y,\n", "is_safe": True, "a,b,c": "1,2"}
    assert prompts(lines[1:]) == ["last"] and said == "r.csv, row 2: it has 2 cells for 3 columns\n"
    lines, _ = converted("prompt\nHello, how; are\tyou\n", name="r.tsv")
    assert lines == [{"prompt": "Hello, how; are\tyou"}]


def test_what_comes_before_the_damage_is_kept(converted):
    """Kills: rows before the damage that are lost, a cut row that is kept, a name given twice."""
    packed = gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n')
    for name, content, place in (
        ("wrong.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n{"prompt": "b"}\n', ", line 2: "),
        ("twice.jsonl", b'{"prompt": "a"}\n{"prompt": "x", "prompt": "y"}\n{"prompt": "b"}\n', ", line 2: "),
        ("twice.csv", b'prompt;category\na;\nb;\nc;"{""x"": 1, ""x"": 0}"\n', ", row 3: "),
        ("stray.csv", b'prompt;x\na;1\nb;1\n"c" d;1\ne;1\n', ", after row 2, "),
        ("cut.json", b'[{"prompt": "a"}, {"prompt": "b"}, {"pro', ", after row 2, "),
        ("cut.json.gz", gzip.compress(b'[{"prompt": "a"}, {"prompt": "b"}, {"pro')[:-8], ", after row 2, "),
        ("cut.csv.gz", gzip.compress(b"prompt\na\nb\ncut")[:-8], ", after row 2, "),
        ("cut.jsonl.gz", packed[:-8], ", after line 2, "),
    ):
        lines, said = converted(content, name=name)
        assert prompts(lines) == ["a", "b"] and name + place in said


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"prompt,prompt\na,b\n"])
@pytest.mark.parametrize("name", ["r.jsonl", "r.json.gz", "r.csv", "r.parquet"])
def test_a_file_without_rows_is_named(converted, name, content):
    """Kills: a traceback, a file that is passed over in silence, two columns of one name."""
    lines, said = converted(content, name=name)
    assert lines == [] and said.startswith(name)


def test_odd_types_of_parquet(converted):
    """Kills: a column that costs the file, a cell that costs more than its row, a map that is no category."""
    times = pyarrow.array([0, 2**61, None], pyarrow.timestamp("us"))
    harm = pyarrow.array([[("x", True)]] * 3, pyarrow.map_(pyarrow.string(), pyarrow.bool_()))
    nowhere = pyarrow.array([0, 1, 2], pyarrow.timestamp("us", "No/Where"))
    columns = {"prompt": list("abc"), "category": harm, "time": times, "zone": nowhere}
    lines, said = converted(pyarrow.table(columns), name="r.parquet")
    assert [line["time"] for line in lines] == ["1970-01-01 00:00:00", None]
    assert lines[1] == {"prompt": "c", "category": {"x": True}, "is_safe": False, "time": None}
    assert "r.parquet, row 2: `time`" in said and "r.parquet, column 'zone': " in said


def test_a_folder_stands_for_its_files(tmp_path, capsys):
    """Kills: rows.xlsx that is left out in silence, a FIFO that is waited for, a row that is not counted."""
    folder, out = tmp_path / "folder", tmp_path / "out.jsonl"
    folder.mkdir()
    (folder / "rows.xlsx").touch()
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "b.jsonl").write_text(json.dumps({"prompt": "a", "unsafe": 1}) + "\n" + json.dumps(WILD))
    (folder / "c.json").write_text(json.dumps([{"prompt": "b"}]))
    assert convert.main([str(folder), str(out)]) == 2
    said = capsys.readouterr()
    bad = [line.split(": ")[0] for line in said.err.splitlines()]
    assert bad == [f"{folder}/fifo.jsonl", f"{folder}/rows.xlsx"]
    counts = "prompts: 0 safe, 2 unsafe, 1 unlabelled; answers: 1 safe, 0 unsafe, 0 unlabelled;"
    assert said.out.startswith(counts)
    assert prompts(map(json.loads, out.read_text().splitlines())) == ["a", "w", "w", "b"]


def test_bad_arguments_change_nothing(tmp_path, monkeypatch, capsys):
    """Kills: an input that is overwritten, under another name too; a traceback; a check after the reading."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"prompt": "a"}\n')
    (tmp_path / "same.jsonl").hardlink_to(rows)
    monkeypatch.setattr(convert, "rows_of", None)
    for *arguments, why in (
        (rows, tmp_path / "same.jsonl", "one of the files"),
        (rows, tmp_path / "none/out.jsonl", "must be a file"),
        (tmp_path / "none.jsonl", out, "does not exist"),
        (rows, out, "--threshold=nan", "--threshold"),
        (rows, out, "--encoding=rot13", "rot13"),
    ):
        with pytest.raises(SystemExit) as left:
            convert.main([str(argument) for argument in arguments])
        assert left.value.code == 2 and why in capsys.readouterr().err.split("error: ")[1]
    assert rows.read_text() == '{"prompt": "a"}\n' and not out.exists()


def test_the_output_appears_whole(converted, tmp_path, monkeypatch):
    """Kills: half of the lines under the output's name, a temporary file that stays."""
    (tmp_path / "out.jsonl").write_text("before")
    monkeypatch.setattr(convert, "to_json", Mock(side_effect=OSError))
    with pytest.raises(SystemExit):
        converted([{"prompt": "a"}])
    assert (tmp_path / "out.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 2
