"""Guards for other software, and the client of those that vLLM serves. Each test names what it kills."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from conftest import KINDS, PATHS, make_guard, make_model, make_rows, score, write

from checkpoint import start_accelerator
from data import encode_row
from errors import UserError
from moderate import score_file
from tools import client
from tools.export import CLASSIFIERS, export

IDS = [5, 6, 7, 8, 9, 10]


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("path", PATHS)
def test_peft_opens_an_exported_guard(path, tmp_path):
    """Kills: names that PEFT does not know, another scale, other tokens, a head in the LoRA file."""
    peft = pytest.importorskip("peft")
    guard, folder = make_guard(guard_path=path), tmp_path / "new/folder"
    export(guard, folder, "peft")
    theirs = peft.PeftModel.from_pretrained(make_model(), folder).eval()
    ids = torch.tensor([IDS + guard.guard_prompt_ids[0].tolist()])
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True).hidden_states[-1][:, -1]
    files = ("adapter_model.safetensors", "guard_head.safetensors")
    lora, head = (safetensors.torch.load_file(folder / file) for file in files)
    assert all("lora_" in name for name in lora)  # PEFT ignores other names in silence
    assert torch.allclose(hidden @ head["weight"].T + head["bias"], score(guard, [IDS]), atol=1e-5)
    assert json.loads((folder / "guard.json").read_text())["categories"] == ["theft", "hate"]
    assert "alora_invocation_tokens" in (folder / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("unsafe_head", [True, False])
@pytest.mark.parametrize("kind", [k for k in KINDS if type(make_model(k)).__name__ in CLASSIFIERS])
def test_a_classifier_has_the_outputs_of_its_guard(kind, unsafe_head, tmp_path):
    """Kills: no update, no scale, a head without bias or in 16 bits, names of another class."""
    settings = {"guard_path": "full", "guard_prompt": "", "unsafe_head": unsafe_head, "lora_alpha": 12.0}
    guard = make_guard(kind, **settings)
    cuts = list(range(1, len(IDS) + 1))
    wanted = guard([IDS], [cuts])[0, :, 0 if unsafe_head else 1 :]  # (T, outputs)
    export(guard, tmp_path / "out", "vllm")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    model = getattr(transformers, config.architectures[0])(config).eval()
    tensors = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    bias = tensors.pop("score.bias")
    model.load_state_dict(tensors)
    logits = model.score(model.model(torch.tensor([IDS])).last_hidden_state)[0] + bias
    assert torch.allclose(logits, wanted, atol=1e-5)
    assert list(config.id2label.values()) == (
        ["unsafe", "theft", "hate"] if unsafe_head else ["theft", "hate"]
    )
    assert (config.problem_type, config.pad_token_id) == ("multi_label_classification", 2)
    assert config.guard["threshold"] == guard.config.threshold
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    with pytest.raises(OSError, match="no file named"):  # it would drop the bias
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "to", "reason"),
    [
        ({}, "vllm", "activated path"),
        (
            {"kind": "opt", "guard_path": "full", "guard_prompt": ""},
            "vllm",
            "no classifier for a OPTForCausalLM",
        ),
        ({"lora_targets": []}, "peft", "no LoRA layers"),
    ],
)
def test_what_others_would_misread_is_not_written(settings, to, reason, tmp_path):
    """Kills: a folder that another program opens and that gives wrong verdicts, a folder half written."""
    with pytest.raises(UserError, match=reason):
        export(make_guard(**settings), tmp_path / "out", to)
    assert not names(tmp_path)


@pytest.mark.parametrize("to", ["vllm", "peft"])
def test_a_full_disk_leaves_nothing(to, tmp_path, monkeypatch):
    """Kills: a folder that looks whole, a temporary folder left behind, a traceback."""

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        export(make_guard(guard_path="full", guard_prompt=""), tmp_path / "out", to)
    assert not names(tmp_path)


# ---------------------------------------------------------------- the client


@pytest.fixture
def serve():
    """Start a server with vLLM's protocol. answer(number, ids) -> a status and the outputs at each token."""
    servers = []

    def start(answer, room=10**6):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                assert self.path == "/v1/models"
                self.reply(200, [{"max_model_len": room}])

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/pooling" and request["task"] == "token_classify"
                assert request["use_activation"] is False
                seen.append(request["input"])
                status, outputs = answer(len(seen), request["input"])
                self.reply(status, [{"data": outputs}])

            def reply(self, status, data):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps({"data": data}).encode())

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("localhost", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://localhost:{servers[-1].server_port}", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def served(tmp_path, **settings):
    """(guard, its folder, answer for `serve`)."""
    settings = {"guard_path": "full", "guard_prompt": "", "verdict_every": 8, "threshold": 0.6} | settings
    guard, lock = make_guard(**settings), threading.Lock()
    export(make_guard(**settings), tmp_path / "served", "vllm")

    def answer(number, ids):
        with lock, torch.no_grad():
            logits = guard([ids], [list(range(1, len(ids) + 1))])[0]
        return 200, logits[:, 0 if guard.config.unsafe_head else 1 :].tolist()

    return guard, tmp_path / "served", answer


ROWS = [*make_rows(5), {"prompt": "bread? " * 300, "id": 7}, {"prompt": 3}, {"prompt": "Hi"}]


@pytest.mark.parametrize("room", [10**6, 100])
@pytest.mark.parametrize("unsafe_head", [True, False])
def test_the_client_writes_what_moderate_writes(unsafe_head, room, serve, tmp_path, monkeypatch):
    """Kills: the last token alone, parts of a long text left out, another order, no retry."""
    monkeypatch.setattr(client, "PAUSES", (0,) * 5)
    guard, folder, answer = served(tmp_path, unsafe_head=unsafe_head)
    guard.max_tokens = min(guard.max_tokens, room)
    url, seen = serve(lambda number, ids: (503, []) if number == 1 else answer(number, ids), room)
    source, wanted, found = (tmp_path / name for name in ("rows.jsonl", "wanted.jsonl", "found.jsonl"))
    write(source, ROWS)
    for judge, target in ((guard, wanted), (client.ServedGuard(folder, [url, "http://localhost:9"]), found)):
        with pytest.raises(UserError, match="1 rows cannot be judged"):
            score_file(judge, source, target, start_accelerator())
    theirs, ours = ([json.loads(line) for line in path.read_text().splitlines()] for path in (found, wanted))
    for their, our in zip(theirs, ours, strict=True):
        probabilities = [row.pop("unsafe_probability") for row in (their, our)]
        kinds = [row.pop("categories") for row in (their, our)]
        assert their == our and probabilities[0] == pytest.approx(probabilities[1], abs=1e-5)
        assert kinds[0] == pytest.approx(kinds[1], abs=1e-5)
    assert max(map(len, seen)) == guard.max_tokens
    texts = [encode_row(guard.tokenizer, row) for row in ROWS[4:6]]
    pairs = zip(client.ServedGuard(folder, [url]).judge(texts), guard.judge(texts), strict=True)
    assert all(torch.equal(their_cuts, our_cuts) for (their_cuts, _), (our_cuts, _) in pairs)
    size = len(seen)
    with pytest.raises(UserError, match="1 rows cannot be judged"):  # a second run asks for nothing
        score_file(client.ServedGuard(folder, [url]), source, found, start_accelerator())
    assert len(seen) == size


def test_a_server_that_refuses_or_is_dead_ends_the_run_in_one_line(serve, tmp_path, monkeypatch):
    """Kills: a request that no retry helps sent again, an endless retry, a row without a verdict."""
    monkeypatch.setattr(client, "PAUSES", (0,) * 3)
    _, folder, _ = served(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}])
    for status, requests in ((400, 1), (500, 3)):
        url, seen = serve(lambda number, ids, status=status: (status, "too long"))
        guard, out = client.ServedGuard(folder, [url]), tmp_path / "out.jsonl"
        with pytest.raises(UserError, match=f"{url} gives no verdict"):
            score_file(guard, tmp_path / "rows.jsonl", out, start_accelerator())
        assert len(seen) == requests and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("outputs", [[[0.0]], [[0.0, 0.0, 0.0]], "text", None])
def test_another_guard_behind_an_address_is_named(outputs, serve, tmp_path):
    """Kills: a traceback, the verdicts of another guard."""
    _, folder, _ = served(tmp_path)
    url, _ = serve(lambda number, ids: (200, outputs))
    write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(UserError, match=f"{url} (does not serve this|serves another) guard"):
        guard = client.ServedGuard(folder, [url])
        score_file(guard, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", start_accelerator())


def test_half_a_file_is_gone_on_with(serve, tmp_path):
    """Kills: rows that are judged twice, or left out, when a killed run starts again."""
    _, folder, answer = served(tmp_path)
    url, seen = serve(answer)
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    source = write(tmp_path / "rows.jsonl", make_rows(6))
    score_file(client.ServedGuard(folder, [url]), Path(source), whole, start_accelerator())
    half.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3]) + b'{"prompt": "que')
    seen.clear()
    score_file(client.ServedGuard(folder, [url]), Path(source), half, start_accelerator())
    assert half.read_bytes() == whole.read_bytes() and len(seen) == 3


@pytest.mark.parametrize("url", ["host1", "http://localhost:9", "http://[bad"])
def test_an_address_without_a_server_is_named(url, tmp_path, monkeypatch):
    """Kills: a traceback, a run that starts without a server."""
    monkeypatch.setattr(client, "PAUSES", (0,) * 3)
    _, folder, _ = served(tmp_path)
    with pytest.raises(UserError, match=r"(is no address|gives no verdict)") as error:
        client.ServedGuard(folder, [url])
    assert url in str(error.value)


def test_a_folder_that_is_no_served_guard_is_named(tmp_path):
    """Kills: a traceback for a chat model's folder, and for one without a config."""
    make_model().save_pretrained(tmp_path / "chat")
    shutil.copytree(tmp_path / "chat", tmp_path / "empty")
    (tmp_path / "empty/config.json").unlink()
    for name in ("chat", "empty", "none"):
        with pytest.raises(UserError, match="is no folder that tools"):
            client.ServedGuard(tmp_path / name, [])
