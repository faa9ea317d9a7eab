"""Judge a file of rows by a guard that vLLM serves. The result is that of `moderate.py --input`.

    vllm serve OUT --runner pooling --pooler-config.task token_classify      tools/export.py writes OUT
    python tools/client.py OUT ROWS.jsonl JUDGED.jsonl [--url http://HOST:8000 ...]

Several servers share the rows. A killed run goes on where it stopped.
"""

import argparse
import http.client
import itertools
import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import start_accelerator
from checks import context_length
from data import check_input
from errors import UserError, check_output, explain, one_line, refuse, run
from model import GuardConfig, GuardedChat
from moderate import score_file

REQUESTS = 32  # at once to each server
PAUSES = (1, 2, 4, 8, 0)  # seconds after each try that failed


class ServedGuard(GuardedChat):
    """A guard that judges through servers, and does not chat. folder: what tools/export.py wrote."""

    def __init__(self, folder, urls):
        nn.Module.__init__(self)
        with explain(f"{folder} is no folder that tools/export.py writes for vLLM"):
            model_config = AutoConfig.from_pretrained(folder)
            self.config = GuardConfig(**model_config.guard)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.max_tokens = context_length(model_config)
        self.urls = urls
        self.turns = itertools.count()

    def judge(self, texts, progress=None):
        """The same as GuardedChat.judge."""
        with ThreadPoolExecutor(REQUESTS * len(self.urls)) as pool:
            return list(pool.map(self.judge_text, texts))

    def judge_text(self, text):
        """Cuts (C,) and the logits there (C, 1 + K) of one text."""
        found = []
        for start, ids, cuts in self.parts(text):
            logits = self.logits(ids)[torch.tensor(cuts) - 1]  # of the logits after each token
            found.append((torch.tensor(cuts) + start, logits))
        cuts, logits = map(torch.cat, zip(*found, strict=True))
        return cuts, logits if self.config.unsafe_head else torch.cat([logits.amax(1, True), logits], dim=1)

    def logits(self, ids):
        """The outputs of the head after each of T tokens, (T, outputs)."""
        url, answer = self.ask_servers({"input": ids, "task": "token_classify", "use_activation": False})
        with explain(f"{url} does not serve this guard"):
            logits = torch.tensor(json.loads(answer)["data"][0]["data"])
            outputs = self.config.unsafe_head + len(self.config.categories)
            refuse(logits.shape != (len(ids), outputs), f"{url} serves another guard")
        return logits

    def ask_servers(self, request):
        """(url, answer) of the first server that answers. Raises UserError if all tries fail."""
        turn = next(self.turns)
        for number, pause in enumerate(PAUSES):
            url = self.urls[(turn + number) % len(self.urls)]  # the next try asks the next server
            headers = {"Content-Type": "application/json"}
            post = urllib.request.Request(f"{url}/pooling", json.dumps(request).encode(), headers)
            try:
                with urllib.request.urlopen(post, timeout=600) as answer:
                    return url, answer.read()
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")
                if error.code in (400, 404, 422):  # another try would end like this one
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = error
            time.sleep(pause)
        raise UserError(f"{url} gives no verdict ({one_line(reason)})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("guard", type=Path, help="the folder that tools/export.py wrote")
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--url", nargs="+", default=["http://localhost:8000"])
    args = parser.parse_args()
    check_input(args.input)
    check_output(args.output, ".jsonl", inputs=[args.input])
    score_file(ServedGuard(args.guard, args.url), args.input, args.output, start_accelerator(), 1024)


if __name__ == "__main__":
    run(main)
