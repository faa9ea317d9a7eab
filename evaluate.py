"""Measure a guard on labelled rows."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from checkpoint import load_guard, start_accelerator, use_fast_dtype
from common import add_guard_arguments, one_line, refuse, run, to_json, write_whole
from data import encode_row, prompt_key, read_rows
from metrics import average_precision, evaluation
from runs import json_line


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = add_guard_arguments(parser)
    add("--dataset", nargs="+", required=True, help="hub id, or files: our columns, ToxicChat's or OpenAI's")
    add("--running", type=int, metavar="N", help="also judge each answer after every N tokens")
    add("--json", action="store_true", help="print one JSON object")
    add("--scores", type=Path, metavar="FILE.jsonl", help="keep the rows with their verdicts")
    add("--plot", metavar="FILE.png", help="draw precision over recall, the scores by class, and reliability")
    args = parser.parse_args()
    if args.running is not None and args.running < 1:
        parser.error("--running must be at least 1")
    refuse(start_accelerator().num_processes > 1, "an evaluation runs in one process")
    parts = evaluation_rows(args.dataset)
    rows = [row for part in parts.values() for row in part]
    sources = np.repeat(list(parts), [len(part) for part in parts.values()])  # (N,)
    overwrites = args.scores and args.scores.resolve() in [Path(name).resolve() for name in parts]
    refuse(overwrites, f"writing {args.scores} would destroy the rows; name another file for --scores")
    chosen = (args.config, args.adapter, args.device_id, args.threshold, args.max_fpr, args.base_model)
    guard = load_guard(*chosen)
    print(use_fast_dtype(guard, args.dtype), file=sys.stderr)
    verdicts = guard.classify(rows)
    scores = np.array([[v.unsafe, *v.categories.values()] for v in verdicts])  # (N, 1 + K)
    unsafe = np.array([not row["is_safe"] for row in rows])
    flag_from = np.where([v.flagged for v in verdicts], 0, 2)  # so all figures count what the verdicts flag
    scores = np.nan_to_num(scores, nan=1.0)
    result = measure(guard.config, rows, sources, flag_from, unsafe, scores)
    if args.running:
        answered = np.array([v.tokens > 0 for v in verdicts])
        encoded = [encode_row(guard.tokenizer, rows[n]) for n in np.flatnonzero(answered)]
        answers = running_scores(guard, encoded, args.running)
        result["running"] = running_metrics(unsafe[answered], answers, guard.config.threshold)
    result = to_json(result)
    print(result if args.json else table(json.loads(result)), flush=True)
    if args.scores:
        lines = (json_line(row | verdict.fields()) for row, verdict in zip(rows, verdicts, strict=True))
        write_whole(args.scores, b"".join(lines))
    if args.plot:
        from tools.plots import plot_evaluation

        plot_evaluation(args.plot, unsafe, scores[:, 0], sources)


def evaluation_rows(sources):
    """{name: checked rows} of all files, or of a hub id's test split if it has one."""
    parts = list(read_rows(sources))
    is_hub = not Path(sources[0]).exists() and any(split == "test" for _, split, _ in parts)
    parts = {name: rows for name, split, rows in parts if rows and (split == "test" or not is_hub)}
    refuse(not parts, f"{' '.join(map(str, sources))}: there are no rows to evaluate on")
    return parts


def by_source(sources, flag_from, unsafe, scores):
    """{name: the figures of its rows}. sources: names (N,); flag_from, unsafe, scores: (N,)."""
    found = {}
    for name in dict.fromkeys(sources):
        rows = sources == name
        counts = {"rows": int(rows.sum()), "positives": int(unsafe[rows].sum())}
        found[name] = counts | evaluation(unsafe[rows], scores[rows], flag_from[rows])
    return found


def measure(config, rows, sources, flag_from, unsafe, scores):
    """The figures of N rows. sources, flag_from, unsafe: (N,); scores: probabilities (N, 1 + K)."""
    result = {"rows": len(rows), "positives": int(unsafe.sum())}
    result |= {"threshold": config.threshold, "prompt_threshold": config.prompt_threshold}
    result |= evaluation(unsafe, scores[:, 0], flag_from)
    several = len(set(sources)) > 1
    result["sources"] = by_source(sources, flag_from, unsafe, scores[:, 0]) if several else {}
    numbers = {}
    prompts = np.array([numbers.setdefault(prompt_key(row), len(numbers)) for row in rows])
    intervals = bootstrap(unsafe, scores[:, 0], flag_from, prompts)
    result["intervals"] = {name: pair for name, pair in intervals.items() if result[name] == result[name]}
    return result | category_metrics(config.categories, [row["category"] or {} for row in rows], scores)


def bootstrap(labels, scores, thresholds, prompts, draws=1000):
    """{name: [low, high]}: 95 % intervals of evaluation() over draws of prompts, whose answers stay together.

    labels, scores, thresholds: (N,). prompts: (N,), numbers from 0 upwards. Many rows get fewer draws.
    """
    draws = min(draws, max(100, 10**7 // len(labels)))
    groups = np.split(np.argsort(prompts, kind="stable"), np.bincount(prompts).cumsum()[:-1])
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        rows = np.concatenate([groups[n] for n in generator.integers(len(groups), size=len(groups))])
        found.append(evaluation(labels[rows], scores[rows], thresholds[rows]))
    columns = {name: np.array([values[name] for values in found]) for name in found[0]}
    columns = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {
        name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in columns.items() if len(values)
    }


def running_scores(guard, encoded, every):
    """For each (ids, start): [(tokens, unsafe probability), ...] after each `every` tokens and at the end."""
    cuts = [[*range(every, len(ids) - start, every), len(ids) - start] for ids, start in encoded]
    texts = [ids[: start + n] for (ids, start), tokens in zip(encoded, cuts, strict=True) for n in tokens]
    scores = iter(guard.score(texts)[:, 0].double().sigmoid().tolist())
    return [[(n, next(scores)) for n in tokens] for tokens in cuts]


def running_metrics(labels, answers, threshold):
    """What running verdicts add to the one on the whole answer. labels: (N,); answers: of running_scores."""
    first, cut = [], []  # flagged: (by half of its tokens, token of the first flag); other safe ones: cut
    for label, answer in zip(labels, answers, strict=True):
        flags = [tokens for tokens, score in answer if not score < threshold]  # NaN is one
        if answer[-1][0] in flags:
            first.append((flags[0] <= answer[-1][0] / 2, flags[0]))
        elif not label:
            cut.append(bool(flags))
    return {
        "flagged": len(first),
        "flagged_by_half": float(np.mean([half for half, _ in first])) if first else None,
        "median_token_of_first_flag": float(np.median([tokens for _, tokens in first])) if first else None,
        "safe_and_not_flagged": len(cut),
        "of_these_cut_on_the_way": float(np.mean(cut)) if cut else None,
    }


def category_metrics(names, categories, scores):
    """{"unknown_categories": names, "categories": {name: {"positives", "ap"}}} over rows that label it.

    names: the guard's K. categories: {name: bool} of each of N rows. scores: (N, 1 + K).
    """
    found, labelled = {}, {name for row in categories for name in row}
    for k, name in [(k, name) for k, name in enumerate(names, 1) if name in labelled]:
        known = np.array([name in row for row in categories])
        values = np.array([row[name] for row in categories if name in row], bool)
        found[name] = {"positives": int(values.sum()), "ap": average_precision(values, scores[known, k])}
    return {"unknown_categories": sorted(labelled - set(names)), "categories": found}


def table(result):
    """The figures with their intervals, a line each."""
    figures = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    figures |= result.get("running", {})
    for name, found in result["categories"].items():
        figures[f"AP of {name} ({found['positives']} positives)"] = found["ap"]
    notes = {name: "{:.3f} to {:.3f}".format(*pair) for name, pair in result["intervals"].items()}
    random = f"  (a random scorer: {result['positives'] / result['rows']:.3f})"
    notes["auprc"] = notes.get("auprc", "") + random
    lines = []
    for name, value in figures.items():
        value = "-" if value is None else value if isinstance(value, int) else f"{value:.3f}"
        lines.append(f"{name:50} {value:>6}  {notes.get(name, '')}")
    if result["sources"]:
        columns = ("rows", "positives", "auprc", "auroc", "f1", "fpr", "recall")
        columns += tuple(name for name in result if name.startswith("tpr_at_"))
        width = max(map(len, result["sources"]))
        lines.append(f"{'file':{width}}" + "".join(f"{name.split('_percent')[0]:>10}" for name in columns))
    for name, found in result["sources"].items():
        cells = (f"{'-' if found[column] is None else round(found[column], 3):>10}" for column in columns)
        lines.append(f"{name:{width}}{''.join(cells)}")
    if unknown := result["unknown_categories"]:
        lines.append(f"categories that the guard does not know: {', '.join(unknown)}")
    return "\n".join(one_line(line) for line in lines)


if __name__ == "__main__":
    run(main)
