"""Rows of labelled text -> token ids.

A row has
    prompt      text
    response    text; without it the prompt alone is judged
    category    {name: bool}; without it only the unsafe output learns from the row
    is_safe     bool; without it a row is safe if no category is true
as in BeaverTails (Ji et al., arXiv 2307.04657). Instead of prompt and response a row may have
    messages    [{"role", "content"}, ...]; its last turn is judged in the light of those before
SETS has the columns of other data sets.
"""

import ast
import hashlib
import json
import math
import re
from pathlib import Path

import torch

from chat import encode
from common import SUFFIXES, UserError, explain, files_of, read_file, read_hub, refuse, suffix

BEAVERTAILS = "PKU-Alignment/BeaverTails"
SETS = (  # (prompt, response, label) of known data sets; a row becomes one for each line whose columns it has
    ("user_input", None, "toxicity"),  # ToxicChat, arXiv 2310.17389
    ("prompt", None, "prompt_harm_label"),  # WildGuardMix, arXiv 2406.18495
    ("prompt", "response", "response_harm_label"),
    ("prompt", "response_0", "is_response_0_safe"),  # PKU-SafeRLHF, arXiv 2406.15513
    ("prompt", "response_1", "is_response_1_safe"),
    ("prompt", None, "prompt_label"),  # Aegis 2.0, arXiv 2501.09004
    ("prompt", "response", "response_label"),
)
OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")  # OpenAI's moderation set, arXiv 2208.03274
COLUMNS = {"messages", "conversations", "category", "is_safe"}.union(*SETS) - {None}
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT
UNKNOWN = ("", "none", "nan", "null")
TRUTH = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
SAFETY = TRUTH | {"safe": True, "unharmful": True, "unsafe": False, "harmful": False}
NOT_TEXT = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, as bytes that are not UTF-8 become
SPLITS = ("train", "validation", "test")

# ---------------------------------------------------------------- reading


def read_rows(sources):
    """Yield (name, split, checked rows) of each file, or each split of one hub id, that `sources` name."""
    paths = [Path(source) for source in sources]
    files = [file for path in paths for file in (files_of(path) if path.is_dir() else [path])]
    if files and all(suffix(file) in SUFFIXES for file in files):
        parts = ((str(file), file.name, read_file(file)) for file in files)
    else:
        unknown = len(sources) > 1 or paths[0].exists()
        refuse(unknown, f"{' '.join(map(str, sources))}: give one hub id, or {', '.join(SUFFIXES)} files")
        parts = read_hub(sources[0])
    words = {"train": "train", "test": "test", "val": "validation", "dev": "validation"}
    for name, part, rows in parts:
        split = next((words[word] for word in words if word in part.lower()), "train")
        numbered = ((where, view) for where, row in rows for view in views(row))
        yield name, split, [check_row(row, where) for where, row in numbered]


# ---------------------------------------------------------------- checking


def check_row(row, where):
    """A row with a `category` and `is_safe`. Raises UserError, which names the place, for wrong values."""
    conversation(row, where)
    category = nested(row.get("category"), f"{where}: `category`") or {}
    refuse(not isinstance(category, dict), f"{where}: `category` must be an object of name: true or false")
    odd = [name for name in category if not isinstance(name, str) or NOT_TEXT.search(name)]
    refuse(odd, f"{where}: the name of a category must be text, not {odd[:1]!r}")
    category = {name: truth(value, f"{where}: category {name!r}") for name, value in category.items()}
    category = {name: value for name, value in category.items() if value is not None}
    is_safe = truth(row.get("is_safe"), f"{where}: `is_safe`", SAFETY)
    refuse(is_safe and any(category.values()), f"{where}: `is_safe` is true, but a `category` is too")
    if is_safe is None and category:
        is_safe = not any(category.values())
    refuse(is_safe is None, f"{where}: a row needs `is_safe` (true or false) or a `category`")
    return row | {"category": category or None, "is_safe": is_safe}


def truth(value, where, words=TRUTH):
    """A label as tables write it -> True, False or None, which is unknown."""
    refuse(word(value) not in (*UNKNOWN, *words), f"{where} is {value!r}; allowed: empty, {', '.join(words)}")
    return words.get(word(value))


def word(value):
    return str(value).strip().lower()


def nested(value, where):
    """An object or list as it is, or from the text that a table has: JSON or Python's notation."""
    if not isinstance(value, str):
        return value
    if word(value) in UNKNOWN:
        return None
    with explain(f"{where} must be JSON"):
        try:
            return json.loads(value)
        except ValueError:
            return ast.literal_eval(value)


def views(row):
    """Yield the row in our columns, once for each text of it that a known data set labels."""
    row = in_our_columns(row)
    if not isinstance(row, dict) or row.keys() & {"is_safe", "category"}:
        yield row
        return
    found = [row | {"is_safe": openai_label(row)}] if row.keys() & {*OPENAI_LABELS} else []
    for prompt, response, label in SETS:
        if {prompt, label} <= row.keys() and (response is None or word(row.get(response)) not in UNKNOWN):
            value = TRUTH.get(word(row[label]))
            is_safe = row[label] if value is None or "safe" in label else not value
            texts = {"prompt": row[prompt], "response": row[response] if response else None}
            found.append(row | texts | {"is_safe": is_safe})
    known = [view for view in found if word(view["is_safe"]) not in UNKNOWN]
    yield from known or found[-1:] or [row]


def unlabelled(row):
    """Yield the row in our columns, once for each of its answers: what is judged where nothing is learnt."""
    row = in_our_columns(row)
    if not isinstance(row, dict):
        yield row
        return
    prompts = [name for name, _, _ in SETS if name in row]
    row = row | {"prompt": row[prompts[0]]} if prompts and "prompt" not in row else row
    answers = {name for _, name, _ in SETS if word(row.get(name)) not in UNKNOWN} - {"response"}
    yield from [row | {"response": row[name]} for name in sorted(answers)] or [row]


def in_our_columns(row):
    """The row with our names of columns; tables may have capitals or spaces in theirs."""
    if not isinstance(row, dict):
        return row
    names = [word(name) if word(name) in COLUMNS else name for name in row]
    if twice := [name for name in names if names.count(name) > 1]:
        return UserError(f"several columns have the name {twice[0]!r}")
    return dict(zip(names, row.values(), strict=True))


def openai_label(row):
    """Whether a text of OpenAI's set is safe: unsafe if any label is 1. A value that is no label as it is."""
    values = [row[name] for name in OPENAI_LABELS if name in row and word(row[name]) not in UNKNOWN]
    odd = [value for value in values if word(value) not in TRUTH]
    harm = any(TRUTH.get(word(value)) for value in values)
    return odd[0] if odd else not harm if values else None


def conversation(row, where="a row"):
    """The messages of a row, [{"role", "content"}, ...], without a blank answer.

    Raises UserError, which names the place, if they are not text or not a conversation.
    """
    refuse(isinstance(row, UserError), f"{where}: {row}")
    row = row if isinstance(row, dict) else {}
    texts = [("user", row.get("prompt")), ("assistant", row.get("response"))]
    last = [{"role": role, "content": text} for role, text in texts if text is not None]
    names = [name for name in ("messages", "conversations") if row.get(name) not in (None, "")]
    refuse(len(names) > 1, f"{where}: give `messages` or `conversations`, not both")
    given = nested(row[names[0]], f"{where}: `{names[0]}`") if names else None
    kinds = (TypeError, LookupError, AttributeError)
    with explain(f"{where}: a message is {{role, content}}, and content is text", kinds):
        messages = last if given is None else [plain_message(message, where) for message in given]
    roles = [m["role"] for m in messages if m is not messages[0] or m["role"] != "system"]
    fits = roles and roles == (["user", "assistant"] * len(roles))[: len(roles)]
    fits = fits and all(isinstance(m["content"], str) for m in messages)
    form = "`messages` with perhaps a system message, and then user and assistant in turn"
    refuse(not fits, f"{where}: a row needs text as `prompt` (and `response`), or {form}")
    turn = messages[-2:] if roles[-1] == "assistant" else messages[-1:]
    other = [m for m in last if m["content"] and m not in turn]
    refuse(other, f"{where}: `prompt` and `response` are not the last turn of `messages`")
    odd = NOT_TEXT.search("".join(m["content"] for m in messages))
    refuse(odd, f"{where}: bytes that are not UTF-8, or half of a surrogate pair, are not text")
    return messages if roles[-1] == "user" or messages[-1]["content"].strip() else messages[:-1]


def plain_message(message, where):
    """{"role", "content"} of a message, perhaps ShareGPT's {"from", "value"} or with a list of texts."""
    # The guard would not see other fields, such as tool_calls. Parquet fills absent ones with null.
    message = {name: value for name, value in message.items() if value is not None}
    if "from" in message:
        role, content = message.pop("from"), message.pop("value")
    else:
        role, content = message.pop("role"), message.pop("content")
    names = ", ".join(sorted(map(str, message)))
    refuse(names, f"{where}: a message has role and content only, not {names}")
    if isinstance(content, list):
        other = {name for part in content for name in part if part[name] is not None} - {"type", "text"}
        other |= {part["type"] for part in content} - {"text"}
        refuse(other, f"{where}: the guard would not see all of a part with {', '.join(map(str, other))}")
        content = "".join(part["text"] for part in content)
    return {"role": ROLES.get(role, role), "content": content + ""}


def encode_row(tokenizer, row, where=None):
    """encode() of a row -> (ids, start). Raises UserError, which names the place or the last text."""
    messages = conversation(row, where or "a row")
    try:
        return encode(tokenizer, messages)
    except UserError as error:
        where = where or f"the row that ends with {messages[-1]['content'][:60]!r}"
        raise UserError(f"{where}: {error}") from error


# ---------------------------------------------------------------- splits, labels, updates


def load_splits(sources):
    """({"train": rows, "validation": rows, "test": rows}, all category names in the data's order).

    Each missing split takes a tenth of the training prompts. No prompt is in two splits: of given ones, test
    keeps it before validation, and validation before training.
    Raises UserError for data that cannot be learnt from.
    """
    given, names = {}, {}
    for name, split, rows in read_rows(sources):
        refuse(not rows, f"{name} has no rows")
        names |= {category: None for row in rows for category in row["category"] or ()}
        given.setdefault(split, []).extend(rows)
    splits, taken = {split: [] for split in SPLITS}, set()
    missing = [split for split in SPLITS if split not in given]
    for split in [split for split in reversed(SPLITS) if split in given]:
        rows = [row for row in given[split] if prompt_key(row) not in taken]
        if left_out := len(given[split]) - len(rows):
            print(f"left out {left_out} {split} rows: their prompts are in another split that was given")
        taken |= {prompt_key(row) for row in rows}
        for row in rows:
            tenth = tenth_of(row)
            splits[missing[tenth] if split == "train" and tenth < len(missing) else split].append(row)
    for split in ("train", "validation"):
        kinds = {row["is_safe"] for row in splits[split]}
        refuse(
            len(kinds) < 2, f"the {split} split has {len(splits[split])} rows, and needs safe and unsafe ones"
        )
    return splits, list(names)


def prompt_key(row):
    """What all rows of one prompt share: the first thing that the user says."""
    return next(m["content"] for m in conversation(row) if m["role"] == "user").strip().lower()


def tenth_of(row):
    """Which tenth of all prompts, 0 to 9, a row belongs to. No seed and no order of rows changes it."""
    return int(hashlib.sha256(prompt_key(row).encode()).hexdigest(), 16) % 10


def labels(rows, names):
    """Targets (N, 1 + K), fp32: unsafe, then the categories; NaN where unknown."""
    found = [row["category"] or {} for row in rows]
    values = [
        [not row["is_safe"], *(category.get(name, math.nan) for name in names)]
        for row, category in zip(rows, found, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float32).view(len(rows), 1 + len(names))
