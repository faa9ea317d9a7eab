"""Rows of other data sets -> JSON Lines in this project's columns, one line a labelled text.

python tools/convert.py IN [IN ...] OUT.jsonl [--encoding NAME] [--threshold X]

IN is a .jsonl, .ndjson, .json (an array or lines), .csv, .tsv or .parquet file, or a folder of such files.
All but .parquet may end in .gz. A line of OUT has `prompt` and perhaps `response`, or `messages`; `category`
and `is_safe` if they are known; and the other columns of its row. A row without a label gives lines without
one. What cannot be read is named on standard error with its place. The rest is written, and the exit status
is then 2.
"""

import argparse
import ast
import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from pyarrow.parquet import ParquetFile

SAFE, HARMFUL = True, False  # values of `is_safe`
OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")
SETS = (  # prompt, answer (None: the prompt alone is labelled), labels (any of them), what a true label means
    ("prompt", None, ("prompt_harm_label",), HARMFUL),  # WildGuardMix, arXiv 2406.18495
    ("prompt", "response", ("response_harm_label",), HARMFUL),
    ("prompt", "response_0", ("is_response_0_safe",), SAFE),  # PKU-SafeRLHF, arXiv 2406.15513
    ("prompt", "response_1", ("is_response_1_safe",), SAFE),
    ("prompt", None, ("prompt_label",), HARMFUL),  # Aegis 2.0, arXiv 2501.09004
    ("prompt", "response", ("response_label",), HARMFUL),
    ("prompt", None, OPENAI_LABELS, HARMFUL),  # OpenAI's moderation set, arXiv 2208.03274
    ("user_input", None, ("toxicity", "jailbreaking"), HARMFUL),  # ToxicChat, arXiv 2310.17389
    ("behavior", "generation", ("label",), HARMFUL),  # HarmBench, arXiv 2402.04249
)
PROMPTS = list(dict.fromkeys(prompt for prompt, *_ in SETS))
ANSWERS = {answer: prompt for prompt, answer, _, _ in SETS if answer}
# Labels of the conversation, of `response` or the only answer, or of a prompt without an answer
PLAIN = {"is_safe": SAFE, "safe": SAFE, "is_unsafe": HARMFUL, "unsafe": HARMFUL}
PLAIN |= dict.fromkeys(("is_harmful", "harmful", "is_toxic", "toxic", "flagged"), HARMFUL)
OWN = {"prompt", "response", "messages", "conversations", "category", *PLAIN}  # never among other columns
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
UNKNOWN = ("", "null", "nan", "none")
NUMBERS = {"true": 1, "yes": 1, "false": 0, "no": 0}
WORDS = dict.fromkeys(("safe", "unharmful", "harmless", "benign", "nontoxic", "non-toxic"), SAFE)
WORDS |= dict.fromkeys(("unsafe", "harmful", "toxic"), HARMFUL)

TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
ENDINGS = (*TABLES, ".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet")
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
BOMS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # last: UTF-32's begins with UTF-16's
BATCH = 64  # rows of a Parquet file that are in memory at once
# Wrong bytes become half of a surrogate pair. No text has one, so `to_json` refuses the row.
codecs.register_error("mark", lambda error: ("\udfff", error.end))


class Unreadable(ValueError):
    """What cannot be read, or has two meanings."""


# ---------------------------------------------------------------- a row -> lines


def lines_of(row, threshold: float | None) -> list[dict]:
    """The lines of a row: one for each text that has a label, or one for each text if none has one."""
    if isinstance(row, Unreadable):
        raise row
    if not isinstance(row, dict):
        raise Unreadable(f"{row!r} is not an object with columns")
    names = simple_names(row)
    columns = {simple: row[name] for simple, name in names.items()}
    texts = texts_of(columns)
    whole = [text for text in texts if text[1]] or list(texts)  # with their answers, if there is any
    own = whole[0]  # what the plain labels and the category are about
    plain = [name for name in (*PLAIN, "category") if word(columns.get(name)) not in UNKNOWN]
    sources = [((prompt, answer), *rest) for prompt, answer, *rest in SETS if (prompt, answer) in texts]
    sources += [(own, [name], PLAIN[name]) for name in plain if name in PLAIN]
    safe = labels_of(columns, sources, threshold)
    category = category_of(columns, threshold)
    if category:
        is_harmful = any(category.values())
        safe.setdefault(own, not is_harmful)
        texts[own]["category"] = category
        if safe[own] and is_harmful:
            raise Unreadable("a label says that the text is safe, but a `category` is true")
    is_pair = {answer for _, answer in whole} == {"response_0", "response_1"}  # as in PKU-SafeRLHF
    is_ambiguous = plain if is_pair else set(whole) - set(safe)
    if len(whole) > 1 and is_ambiguous:
        raise Unreadable(f"it has the texts {whole}, and not each has a label of its own")
    for text in safe:
        texts[text]["is_safe"] = safe[text]
    used = OWN.union(*whole, *safe, *(labels for _, labels, _ in sources))
    others = {name: row[name] for simple, name in names.items() if simple not in used}
    return [texts[text] | others for text in safe or whole]


def simple_names(names):
    """{name in small letters and without spaces around it: name}"""
    stripped = [(name.strip(), name) for name in names]
    return unique([(name if name in OPENAI_LABELS else name.lower(), full) for name, full in stripped])


def unique(pairs: list):
    """dict(pairs). Raises Unreadable for a name that stands twice, of which dict() would keep one value."""
    if len(dict(pairs)) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise Unreadable(f"the name {twice!r} stands twice")
    return dict(pairs)


def texts_of(columns):
    """{(prompt column, answer column or None): the text in our columns}"""
    prompts = [name for name in PROMPTS if has_text(columns, name)]
    answers = [name for name in ANSWERS if has_text(columns, name)]
    messages = conversation(columns)
    if messages:
        turn = messages[-2:] if messages[-1]["role"] == "assistant" else messages[-1:]
        contents = [message["content"] for message in turn]
        if any(columns[name] not in contents for name in OWN.intersection(prompts + answers)):
            raise Unreadable("`prompt` and `response` are not the last turn of the conversation")
        return {("messages", None): {"messages": messages}}
    if not prompts:
        raise Unreadable("it has no text as `prompt`, and no `messages`")
    texts = {(prompt, None): {"prompt": columns[prompt]} for prompt in prompts}
    for answer in answers:
        prompt = ANSWERS[answer] if ANSWERS[answer] in prompts else prompts[0]
        texts[prompt, answer] = {"prompt": columns[prompt], "response": columns[answer]}
    return texts


def has_text(columns, name):
    value = columns.get(name)
    if isinstance(value, str):
        return bool(value.strip())
    if word(value) not in UNKNOWN:
        raise Unreadable(f"`{name}` is {value!r}, not text")
    return False


def labels_of(columns, sources, threshold):
    """{text: whether it is safe} of the texts whose label is known."""
    safe = {}
    for text, labels, true_means in sources:
        said = [is_safe(f"`{name}`", columns.get(name), true_means, threshold) for name in labels]
        known = [verdict for verdict in said if verdict is not None]
        if not known:
            continue
        if safe.setdefault(text, all(known)) != all(known):
            raise Unreadable(f"`{labels[0]}` disagrees with another label of the same text")
    return safe


def category_of(columns, threshold):
    """{kind of harm: whether the text has it} of the kinds whose label is known."""
    given = nested(columns, "category") or {}
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise Unreadable(f"`category` is {given!r}, not an object of name: true or false")
    safe = {name: is_safe(f"category {name!r}", value, HARMFUL, threshold) for name, value in given.items()}
    return {name: not verdict for name, verdict in safe.items() if verdict is not None}


def is_safe(what, value, true_means, threshold) -> bool | None:
    """What a label says; None if it is unknown. Words such as "harmful" do not depend on `true_means`."""
    if word(value) in UNKNOWN:
        return None
    if word(value) in WORDS:
        return WORDS[word(value)]
    number = -1
    with contextlib.suppress(ValueError):
        number = float(NUMBERS.get(word(value), word(value)))
    if not 0 <= number <= 1:
        raise Unreadable(f"{what} is {value!r}, not 0 to 1, empty, or a word such as true, no or harmful")
    if 0 < number < 1 and threshold is None:
        raise Unreadable(f"{what} is {value!r}: say with --threshold X from where on a label is true")
    return true_means if number >= (threshold or 1) else not true_means


def word(value):
    return str(value).strip().lower()


# ---------------------------------------------------------------- conversations


def conversation(columns):
    """The messages of a row without a blank answer at their end; [] if it has none."""
    given = [nested(columns, name) or [] for name in ("messages", "conversations")]
    if not all(isinstance(value, list) for value in given) or all(given):
        raise Unreadable("it needs one list as `messages` or `conversations`")
    messages = [plain_message(message) for message in given[0] + given[1]]
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["user", "assistant"] * len(turns)
    if turns != wanted[: len(turns)] or (roles and not turns):
        raise Unreadable(f"the roles {roles} are not user and assistant in turn, perhaps after system")
    if turns and turns[-1] == "assistant" and not messages[-1]["content"].strip():
        messages.pop()
    return messages


def plain_message(message):
    """{"role", "content"} of a message, which may be ShareGPT's {"from", "value"} or have a list of texts."""
    is_sharegpt = isinstance(message, dict) and "from" in message
    role, content = fields(message, ["from", "value"] if is_sharegpt else ["role", "content"])
    if isinstance(content, list):
        parts = [fields(part, ["type", "text"]) for part in content]
        if any(kind != "text" or not isinstance(text, str) for kind, text in parts):
            raise Unreadable("a part of a message is not text")
        content = "".join(text for _, text in parts)
    if role not in list(ROLES) or not isinstance(content, str):
        raise Unreadable(f"a message has the role {role!r} and the content {content!r}")
    return {"role": ROLES[role], "content": content}


def fields(given, names):
    """The values of these names, if there are no others. Parquet has null for names that are absent."""
    if not isinstance(given, dict):
        raise Unreadable(f"a message or a part of one is {given!r}, not an object with {names}")
    found = [name for name, value in given.items() if value is not None]
    if set(found) != set(names):
        raise Unreadable(f"a message or a part of one has {found}; the guard would see {names} only")
    return [given[name] for name in names]


def nested(columns, name):
    """A list or an object, perhaps out of the text that a table has: JSON or Python's notation."""
    value = columns.get(name)
    if word(value) in UNKNOWN:
        return None
    if not isinstance(value, str):
        return value
    with contextlib.suppress(json.JSONDecodeError, RecursionError):
        return json.loads(value, object_pairs_hook=unique)
    try:
        return ast.literal_eval(value.strip())
    except Exception as error:  # it raises many kinds
        raise Unreadable(f"`{name}` is {value!r}, which is neither JSON nor Python's notation") from error


# ---------------------------------------------------------------- files -> rows


def rows_of(path: Path, encoding: str):
    """Yield (place, row) of a file, one at a time. Where a row cannot be read, it is an Unreadable."""
    place = None
    name = path.name.lower()
    read = parquet_rows if name.endswith(".parquet") else text_rows
    try:
        if not path.is_file() or not name.endswith(ENDINGS):
            raise Unreadable(f"only regular files are read whose names end in {', '.join(ENDINGS)}")
        for place, row in read(path, encoding):
            yield f"{path}, {place}", row
        if place is None:
            raise Unreadable("it has no rows")
    except Exception as error:  # damaged bytes raise many kinds, in gzip, zlib, csv, codecs and pyarrow
        after = f", after {place}, where the reading ends" if place else ""
        yield f"{path}{after}", Unreadable(error)


def text_rows(path, encoding):
    name = path.name.lower()
    with CutGzip(path) if name.endswith(".gz") else open(path, "rb") as file:
        file.damage = None
        start = file.peek(4)
        encoding = next((BOMS[bom] for bom in BOMS if start.startswith(bom)), encoding)
        lines = io.TextIOWrapper(file, encoding, "mark", newline="")
        if name.endswith(TABLES):  # the last line of a cut file could pass for a whole row
            yield from table_rows(line for line in lines if line[-1] in "\r\n" or not file.damage)
        else:
            yield from json_rows(lines)
        if file.damage:
            raise file.damage


class CutGzip(gzip.GzipFile):
    """A .gz file that ends where it is cut or damaged; `damage` is then the error."""

    def read1(self, size=-1):
        try:
            return super().read1(size)
        except (OSError, EOFError, zlib.error) as error:
            self.damage = error
            return b""


def json_rows(lines):
    """Yield (place, row) of JSON Lines, or of a JSON array, which alone is in memory as a whole."""
    for place, text in json_texts(lines):
        try:
            yield place, json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            yield place, Unreadable(f"it cannot be read as JSON: {error}")


def json_texts(lines):
    is_first = True
    for number, line in enumerate(lines, 1):
        if is_first and line.lstrip().startswith("["):
            yield from array_texts(line + "".join(lines))
        elif not line.isspace():
            yield f"line {number}", line
            is_first = False


def array_texts(text):
    """Yield (place, text) of the rows of a JSON array one by one, up to where it is cut."""
    skip = re.compile(r"[\s,]*")
    at = skip.match(text, text.index("[") + 1).end()
    for number in itertools.count(1):
        if text.startswith("]", at):
            break
        _, end = json.JSONDecoder().raw_decode(text, at)
        yield f"row {number}", text[at:end]
        at = skip.match(text, end).end()
    if text[at + 1 :].strip():
        raise Unreadable("there is more text after the array")


def table_rows(lines):
    """Yield (place, row) of a table with a header, whose cells are between commas, semicolons or tabs."""
    csv.field_size_limit(10**8)  # characters: an open quote takes in all that follows
    lines = itertools.dropwhile(str.isspace, lines)
    header = next(lines, "")
    unquoted = re.sub('"[^"]*"', "", header)
    delimiter = max(",;\t", key=unquoted.count)
    delimiter = delimiter if delimiter in unquoted else "\0"  # one column, whose text may have commas
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    names = next(reader, [])
    simple_names(names)
    for number, cells in enumerate(filter(None, reader), 1):
        if len(cells) == len(names):
            yield f"row {number}", dict(zip(names, cells, strict=True))
        else:
            yield f"row {number}", Unreadable(f"it has {len(cells)} cells for {len(names)} columns")


def parquet_rows(path, _encoding):
    """Yield (place, row) of a Parquet file without the columns that cannot be read, which come first."""
    with ParquetFile(path) as file:
        names = simple_names(file.schema_arrow.names).values()
        faults = {name: fault_of(file, name) for name in names}
        yield from ((f"column {name!r}", fault) for name, fault in faults.items() if fault)
        readable = [name for name, fault in faults.items() if not fault]
        number = 0
        for group in range(file.num_row_groups):  # one by one, or a damaged one would cost rows before it
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=readable):
                columns = [cells_of(*column) for column in zip(batch.columns, readable, strict=True)]
                for cells in zip(*columns, strict=True):
                    number += 1
                    bad = [cell for cell in cells if isinstance(cell, Unreadable)]
                    yield f"row {number}", bad[0] if bad else dict(zip(readable, cells, strict=True))


def fault_of(file, name) -> Unreadable | None:
    """Why no cell of the first batch of a column can be read, or None."""
    try:
        groups = list(range(file.num_row_groups))[:1]
        for batch in itertools.islice(file.iter_batches(BATCH, row_groups=groups, columns=[name]), 1):
            cells = [cell for cell in cells_of(batch.column(0), name) if cell is not None]
            if cells and all(isinstance(cell, Unreadable) for cell in cells):
                return cells[0]
    except Exception as error:  # pyarrow raises many kinds
        return Unreadable(error)
    return None


def cells_of(column, name):
    """The values of a column; an Unreadable for a cell that Python cannot hold, such as a far date."""
    cells = []
    for cell in column:
        try:
            cells.append(cell.as_py(maps_as_pydicts="strict"))
        except Exception as error:  # pyarrow raises many kinds
            cells.append(Unreadable(f"`{name}` cannot be read: {error}"))
    return cells


# ---------------------------------------------------------------- rows -> a file


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("inputs", metavar="IN", nargs="+", type=Path)
    parser.add_argument("out", metavar="OUT.jsonl", type=Path)
    parser.add_argument("--encoding", default="utf-8", help="of files without a byte-order mark (UTF-8)")
    parser.add_argument("--threshold", type=float, help="labels between 0 and 1 are true from here on")
    options = parser.parse_intermixed_args(arguments)
    try:
        counts = convert(checked_files(options), options)
    except (OSError, Unreadable) as error:
        parser.error(str(error))
    labels = {True: "safe", False: "unsafe", None: "unlabelled"}
    parts = []
    for kind in ("prompts", "answers", "conversations"):
        parts.append(f"{kind}: " + ", ".join(f"{counts[kind, label]} {labels[label]}" for label in labels))
    print("; ".join(parts))
    return 2 if counts["unreadable"] else 0


def checked_files(options) -> list[Path]:
    """The files to read. Raises Unreadable for arguments that cannot work."""
    out = options.out
    files = []
    for path in options.inputs:
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        if not path.exists() or not found:
            raise Unreadable(f"{path} does not exist, or is an empty folder")
        files += found
    try:
        io.TextIOWrapper(io.BytesIO(), options.encoding)
    except LookupError as error:
        raise Unreadable(error) from error
    if out.suffix != ".jsonl" or out.is_dir() or not out.parent.is_dir():
        raise Unreadable(f"{out} must be a file that ends in .jsonl, in a folder that exists")
    if out.exists() and any(file.exists() and out.samefile(file) for file in files):
        raise Unreadable(f"{out} is one of the files to read")
    if options.threshold is not None and not 0 < options.threshold <= 1:
        raise Unreadable("--threshold must be above 0 and at most 1")
    return files


def convert(files, options) -> Counter:
    """Write the lines of all files. Returns how many have each (kind, is_safe), and are "unreadable"."""
    counts = Counter()
    temporary = Path(f"{options.out}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for place, row in (found for path in files for found in rows_of(path, options.encoding)):
                try:
                    lines = lines_of(row, options.threshold)
                    file.write(b"".join(to_json(line) for line in lines))
                    counts.update((kind_of(line), line.get("is_safe")) for line in lines)
                except Unreadable as error:
                    counts["unreadable"] += 1
                    message = " ".join(f"{place}: {error}".splitlines())
                    print(message[:500], file=sys.stderr)
        os.replace(temporary, options.out)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def kind_of(line):
    return "conversations" if "messages" in line else "answers" if "response" in line else "prompts"


def to_json(line) -> bytes:
    """A line in UTF-8, with null for NaN, which other languages cannot read, and with dates as text."""
    try:
        text = json.dumps(line, ensure_ascii=False, default=str)
        plain = json.loads(text, parse_constant=lambda _: None)
        return json.dumps(plain, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise Unreadable("bytes that are not text in the encoding, or half a surrogate pair") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Unreadable(f"it cannot be written as JSON: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
