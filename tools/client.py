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
PAUSES = (1, 2, 4, 8, 16, 32, 64, 0)  # seconds after each try that failed; a server may be starting again
FINAL = (400, 404, 413, 422)  # answers that another try would not change


class ServedGuard(GuardedChat):
    """A guard that judges through servers, and does not chat. folder: what tools/export.py wrote."""

    def __init__(self, folder, urls):
        nn.Module.__init__(self)
        with explain(f"{folder} is no folder that tools/export.py writes for vLLM"):
            model_config = AutoConfig.from_pretrained(folder)
            self.config = GuardConfig(**model_config.guard)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.urls = urls
        self.turns = itertools.count()
        _, answer = self.ask_servers("/v1/models")
        with explain("the server is not vLLM's"):
            room = json.loads(answer)["data"][0]["max_model_len"]
        self.max_tokens = min(context_length(model_config), room)

    def judge(self, texts, progress=None):
        """The same as GuardedChat.judge."""
        with ThreadPoolExecutor(REQUESTS * len(self.urls)) as pool:
            return list(pool.map(self.judge_text, texts))

    def judge_text(self, text):
        """Cuts (C,) and the logits there (C, 1 + K) of one text."""
        found = []
        for start, ids, cuts in self.parts(text):
            cuts = torch.tensor(cuts)
            found.append((cuts + start, self.logits(ids)[cuts - 1]))  # of the logits after each token
        cuts, logits = map(torch.cat, zip(*found, strict=True))
        return cuts, logits if self.config.unsafe_head else torch.cat([logits.amax(1, True), logits], dim=1)

    def logits(self, ids):
        """The outputs of the head after each of T tokens, (T, outputs)."""
        request = {"input": ids, "task": "token_classify", "use_activation": False}
        url, answer = self.ask_servers("/pooling", json.dumps(request).encode())
        with explain(f"{url} does not serve this guard"):
            logits = torch.tensor(json.loads(answer)["data"][0]["data"])
            outputs = self.config.unsafe_head + len(self.config.categories)
            refuse(logits.shape != (len(ids), outputs), f"{url} serves another guard")
        return logits

    def ask_servers(self, path, body=None):
        """(url, answer) of the first server that answers. Raises UserError if all tries fail."""
        turn = next(self.turns)
        for number, pause in enumerate(PAUSES):
            url = self.urls[(turn + number) % len(self.urls)]  # the next try asks the next server
            try:
                request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
                with urllib.request.urlopen(request, timeout=600) as answer:
                    return url, answer.read()
            except (OSError, http.client.HTTPException) as error:
                reason = error
            except ValueError as error:
                raise UserError(f"{url} is no address: {one_line(error)}") from error
            if getattr(reason, "code", None) in FINAL:
                break
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
