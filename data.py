"""From labelled text to token ids: rows are read and checked, split so that no prompt is in two parts, written out with
the chat model's own template, and grouped into batches of similar length.

A row has `prompt` (text), and may have `response` (text; without it the prompt alone is judged), `category`
({name: bool}; without it only the unsafe output learns from the row) and `is_safe` (bool; without it, a row is safe
when no category is true). BeaverTails (Ji et al., arXiv 2307.04657) has all four. In place of the first two it may have
`messages`, a conversation whose last turn is judged in the light of those before.
"""

import hashlib
import json
import math
import re
import threading
from pathlib import Path

import datasets
import torch

from common import UserError, first_line

BEAVERTAILS = "PKU-Alignment/BeaverTails"
HUB_CONFIGS = {"lmsys/toxic-chat": "toxicchat0124"}  # of a data set that has several, the one that is meant
OPENAI_LABELS = ("S", "H", "V", "HR", "SH", "S3", "H2", "V2")  # columns of OpenAI's moderation set, arXiv 2208.03274
SPLITS = ("train", "validation", "test")
SUFFIXES = (".jsonl", ".csv", ".parquet")
TOKENIZING = threading.Lock()  # to defuse control tokens a tokenizer is switched over, for all threads


def load_splits(sources):
    """Read `sources` into ({"train": rows, "validation": rows, "test": rows}, category names in the data's order).

    sources: one hub id, or data files, or folders of them. A name with "train" in it is the training split, else with
    "test" the test split, with "val" or "dev" the validation split, and any other is training too. A split that is not
    given is cut out of the training one, a tenth of its prompts. No prompt stays in two splits, of a conversation the
    first: test keeps it before validation, validation before training, and how many rows that leaves out is printed.
    Raises UserError for data that cannot be learnt from.
    """
    given, names = {}, None
    for source, split, rows in read_rows(sources):
        if not rows:
            raise UserError(f"{source} has no rows")
        for number, row in enumerate(rows, 1):
            if row["category"] is not None:
                names = names or list(row["category"])
                if differing := sorted(set(names) ^ set(row["category"])):
                    raise UserError(f"{source}, row {number}: not in every row's categories: {', '.join(differing)}")
            given.setdefault(split, []).append(row)

    splits, held_out = {split: [] for split in SPLITS}, set()
    to_cut = [split for split in SPLITS if split not in given]
    for split in [split for split in SPLITS[::-1] if split in given]:
        rows = [row for row in given[split] if prompt_key(row) not in held_out]
        if left_out := len(given[split]) - len(rows):
            print(f"left out {left_out} {split} rows: their prompts are in another split that was given")
        held_out |= {prompt_key(row) for row in rows}
        for row in rows:
            tenth = tenth_of(row)
            splits[to_cut[tenth] if split == "train" and tenth < len(to_cut) else split].append(row)
    for split in SPLITS[:2]:
        if len({row["is_safe"] for row in splits[split]}) < 2:
            raise UserError(
                f"the {split} split needs safe and unsafe rows; it has {len(splits[split])} rows of one kind"
            )
    return splits, names or []


def read_rows(sources):
    """Yield (name, split, rows) of every file or hub split that `sources` name, the rows as check_labels gives them."""
    for source, split, rows in _read(sources):
        yield source, split, [check_labels(row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]


def evaluation_rows(sources):
    """The rows of the files that `sources` name, or of a hub id's test split where it has one, as check_labels does."""
    given = list(read_rows(sources))
    if not Path(sources[0]).exists() and any(split == "test" for _, split, _ in given):
        given = [part for part in given if part[1] == "test"]
    if not (rows := [row for _, _, some in given for row in some]):
        raise UserError(f"{' '.join(map(str, sources))}: there are no rows to evaluate on")
    return rows


def _read(sources):
    paths = []
    for path in map(Path, sources):
        paths += sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if paths and all(path.suffix in SUFFIXES for path in paths):
        return [(str(path), _split(path.name), _read_file(path)) for path in paths]
    if len(sources) > 1 or Path(sources[0]).exists():
        raise UserError(f"{' '.join(map(str, sources))}: expected one hub id, or files: {', '.join(SUFFIXES)}")
    try:
        splits = datasets.load_dataset(sources[0], HUB_CONFIGS.get(sources[0]))
    except Exception as error:  # hub, network and format errors share no narrower class
        advice = "without a network give JSONL, CSV or Parquet files: --dataset train.jsonl test.jsonl"
        raise UserError(f"cannot load the data set {sources[0]!r} ({first_line(error)}); {advice}") from error
    # BeaverTails comes in two sizes of the same rows; the paper's, and ours, is the 30k one.
    splits = {name: rows for name, rows in splits.items() if "330k" not in name}
    return [(f"{sources[0]} {name}", _split(name), rows.to_list()) for name, rows in splits.items()]


def _read_file(path):
    if path.suffix == ".jsonl":  # not by `datasets`, whose reader guesses types from the first rows and refuses others
        return [row for _, row in read_jsonl(path)]
    # All text, for the same reason; and an empty field stays "", without "None" and "null" becoming missing values.
    columns = dict.fromkeys(("prompt", "response", "category", "is_safe", "user_input"), str)
    options = {"converters": columns, "keep_default_na": False} if path.suffix == ".csv" else {}
    try:
        return datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train", **options).to_list()
    except Exception as error:  # the two readers share no narrower class
        raise UserError(f"cannot read {path}: {first_line(error.__cause__ or error)}") from error


def read_jsonl(path):
    """Yield (line number, row) for each line that is not blank. Raises UserError, with the number, for a bad one."""
    try:
        with open(path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, json.loads(line.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number} is not JSON in UTF-8: {first_line(error)}") from error


def _split(name):
    name = name.lower()
    if "train" in name:
        return "train"
    return "test" if "test" in name else "validation" if "val" in name or "dev" in name else "train"


def prompt_key(row):
    """What makes rows one prompt's: the first thing that the user says, which all turns of a conversation share."""
    said = [message["content"] for message in row.get("messages") or () if message["role"] == "user"]
    return (said[0] if said else row["prompt"]).strip().lower()


def tenth_of(row):
    """Which tenth of all prompts, 0 to 9, a row belongs to: neither the order of the rows nor a seed can move it."""
    return int(hashlib.sha256(prompt_key(row).encode()).hexdigest(), 16) % 10


def conversation(row, where="a row"):
    """(prompt, response or None, history) of a row, as encode takes them, from its `messages` if it has those.

    Raises UserError, naming the place `where`, if they are not text, or no conversation.
    """
    row = row if isinstance(row, dict) else {}
    prompt, response, history = row.get("prompt"), row.get("response"), []
    if row.get("messages") is not None:
        prompt, response, history = _last_turn(row["messages"], where)
        if (row.get("prompt") or prompt, row.get("response") or response) != (prompt, response):
            raise UserError(f"{where}: its `prompt` and `response` are not the last turn of its `messages`")
    if not isinstance(prompt, str) or not isinstance(response, str | None):
        raise UserError(f"{where}: a row needs a `prompt` that is text, and a `response` that is text or absent")
    if re.search("[\ud800-\udfff]", "".join([prompt, response or "", *(message["content"] for message in history)])):
        raise UserError(f"{where}: half of a surrogate pair is no text")
    return prompt, response, history


def _last_turn(messages, where):
    try:
        # What else a message says, as `tool_calls`, would be out of the guard's sight; Parquet has null for nothing.
        others = {name for message in messages for name in message if message[name] is not None} - {"role", "content"}
        messages = [{"role": message["role"], "content": message["content"] + ""} for message in messages]
    except (TypeError, LookupError):
        others, messages = (), []
    if others:
        raise UserError(f"{where}: a message has a role and content, and no {', '.join(sorted(map(str, others)))}")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        form = "[{role, content}, ...]: a system's if there is one, then the user's and the assistant's in turn"
        raise UserError(f"{where}: `messages` must be {form}")
    response = messages.pop()["content"] if turns[-1] == "assistant" else None
    return messages.pop()["content"], response, messages


def check_labels(row, where):
    """A row with `prompt`, `response` or None, `category` or None, `is_safe`, and its other columns as they are.

    Raises UserError as `conversation` does.
    """
    row = _in_our_columns(row, where)
    prompt, response, _ = conversation(row, where)
    category, is_safe = row.get("category") or None, row.get("is_safe")
    if isinstance(category, str):  # CSV has no nested columns
        try:
            category = json.loads(category)
        except json.JSONDecodeError:
            category = [category]
    if not isinstance(category, dict | None) or any(value not in (True, False) for value in (category or {}).values()):
        raise UserError(f"{where}: `category` must be an object of name: true or false")
    if isinstance(is_safe, str):
        is_safe = {"true": True, "false": False, "": None}.get(is_safe.lower(), is_safe)
    if is_safe is None and category:
        is_safe = not any(category.values())
    if is_safe not in (True, False):
        raise UserError(f"{where}: a row needs `is_safe`, true or false, or a `category` that it follows from")
    return row | {"prompt": prompt, "response": response, "category": category, "is_safe": bool(is_safe)}


def _in_our_columns(row, where):
    """A row of ToxicChat (arXiv 2310.17389) or of OpenAI's moderation set as one of ours; any other as it is."""
    if not isinstance(row, dict) or "is_safe" in row or "category" in row:
        return row
    if "user_input" in row and "toxicity" in row:
        row = row | {"prompt": row["user_input"]}
        names = ["toxicity"]
    elif not (names := [name for name in OPENAI_LABELS if name in row]):
        return row
    known = {str(row[name]).removesuffix(".0") for name in names} - {"", "None", "nan"}  # a missing label is unknown
    if not known or known - {"0", "1"}:
        raise UserError(f"{where}: {', '.join(names)} must be 0 or 1")
    return row | {"is_safe": "1" not in known}


def labels(rows, names):
    """What the guard's outputs should be, (rows, 1 + K) fp32: unsafe, then the K categories; NaN where unknown."""
    unknown = dict.fromkeys(names, math.nan)
    values = [[not row["is_safe"], *((row["category"] or unknown)[name] for name in names)] for row in rows]
    return torch.tensor(values, dtype=torch.float32).view(len(rows), 1 + len(names))


def encode_row(tokenizer, row, where=None):
    """Token ids of a row's conversation, as encode gives them. Raises UserError, naming the place or the prompt."""
    texts = conversation(row, where or "a row")
    try:
        return encode(tokenizer, *texts)
    except UserError as error:
        raise UserError(f"{where or f'the row with the prompt {texts[0][:60]!r}'}: {error}") from error


def encode(tokenizer, prompt, response=None, history=()):
    """Token ids of a conversation in the model's own chat template, up to where the answer begins or has got to.

    history: the messages before the prompt, [{"role": "system", "user" or "assistant", "content": text}, ...].
    The answer is left open (no end-of-turn token behind it), so that a finished answer and one still being written are
    judged in the same form. Control literals in the texts ("<|im_end|>") are encoded as the plain text that they are.
    Raises UserError where the template cannot show the texts whole, or a text would still become a control token.
    """
    messages = [*history, {"role": "user", "content": prompt}]
    answered = is_answer(response)
    if answered:
        messages.append({"role": "assistant", "content": response})
    # By these two transformers tells literals in texts from the template's own. It drops them from texts, but on the
    # way to ids alone, so the template could be shown one text there and another here.
    messages = [message | {"content": re.sub("[\U000f0000\U000f0001]", "", message["content"])} for message in messages]
    options = {"add_generation_prompt": not answered, "continue_final_message": answered}
    marks = [f"mark{n}mark" if message["content"].strip() else "" for n, message in enumerate(messages)]
    letters = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
    # What the template drops of earlier answers, as reasoning, the chat model does not read either.
    earlier = [message["role"] == "assistant" for message in messages[:-1]] + [False]
    to_see = [b if skipped else a for a, b, skipped in zip(messages, letters, earlier, strict=True)]
    # All, for a template can put one together from its parts, out of sight of what looks for it there; but runs of
    # spaces, which Gemma writes as lower blocks, are text.
    control = {token: n for token, n in tokenizer.get_added_vocab().items() if token.replace("\u2581", " ").strip()}
    try:
        shown, skeleton = (tokenizer.apply_chat_template(some, tokenize=False, **options) for some in (to_see, letters))
        with TOKENIZING:
            tokenizer.chat_control_tokens = list(control)
            ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True, return_dict=False, **options)
            plain = tokenizer(skeleton, add_special_tokens=False).input_ids
    except Exception as error:  # a template is a program of the model's author, which raises what it likes
        raise UserError(f"the chat template cannot write this conversation: {first_line(error)}") from error
    whole = re.sub("mark([0-9]+)mark", lambda mark: to_see[int(mark[1])]["content"], skeleton)
    there = all(mark in skeleton for mark, skipped in zip(marks, earlier, strict=True) if not skipped)
    if not there or "".join(shown.split()) != "".join(whole.split()):
        raise UserError("the chat template leaves out a part of this conversation, which the guard would not see")
    # Literals are defused as they stand, but a tokenizer may look for tokens in what it normalises the text to.
    control_ids = set(control.values())
    if [n for n in ids if n in control_ids] != [n for n in plain if n in control_ids]:
        raise UserError("a text of this conversation would become a control token of the chat template")
    return ids


def is_answer(response):
    """Whether a row's response is one; with None or white space for it, the prompt alone is judged."""
    return bool(response and response.strip())


def answer_start(prompt_ids, ids):
    """Where the answer begins: how far the ids of the prompt alone and of the answered prompt agree."""
    differ = (n for n, pair in enumerate(zip(prompt_ids, ids, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(prompt_ids), len(ids)))


def answer_start_of(tokenizer, row, ids):
    """Where the answer of a row begins in `ids`, which encode_row makes of it."""
    prompt, _, history = conversation(row)
    return answer_start(encode(tokenizer, prompt, history=history), ids)


def epoch_batches(lengths, batch_size, batches_per_update, generator):
    """One epoch of row numbers: lists of `batch_size`, shuffled; each run of `batches_per_update` lists is one update.

    Rows of similar length share an update, so little is padding. Every update is full, topped up with rows of the same
    epoch, so its gradient is the mean over its rows however it is cut into batches and processes.
    """
    update, rows = batch_size * batches_per_update, len(lengths)
    order = torch.randperm(rows, generator=generator).repeat(update // rows + 2)[: math.ceil(rows / update) * update]
    # Noise on the length, or the same rows would meet in every epoch.
    key = torch.tensor(lengths)[order] * (1 + 0.2 * torch.rand(len(order), generator=generator))
    updates = order[key.argsort(stable=True)].view(-1, update)
    return updates[torch.randperm(len(updates), generator=generator)].view(-1, batch_size).tolist()
