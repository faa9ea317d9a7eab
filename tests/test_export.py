"""Guards for other software, and the client of those that vLLM serves."""

import json
from io import BytesIO
from urllib import request
from urllib.error import HTTPError, URLError

import pytest
import safetensors.torch
import torch
import transformers
from conftest import KINDS, PATHS, make_guard, make_model, make_rows, score, write

from checkpoint import start_accelerator
from errors import UserError
from moderate import score_file
from tools import client
from tools.export import CLASSIFIERS, export

IDS = [5, 6, 7, 8, 9, 10]
URL = "http://host:8000"


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
@pytest.mark.parametrize("kind", [k for k in KINDS if type(make_model(k)).__name__ in CLASSIFIERS])
def test_a_classifier_has_the_outputs_of_its_guard(kind, tmp_path):
    """Kills: no update, no scale, a head without bias or in 16 bits, names of another class."""
    guard = make_guard(kind, guard_path="full", guard_prompt="", lora_alpha=12.0)
    wanted = guard([IDS], [[1, 2, 3, 4, 5, 6]])[0]  # (T, 1 + K)
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
    assert list(config.id2label.values()) == ["unsafe", "theft", "hate"]
    assert (config.problem_type, config.pad_token_id) == ("multi_label_classification", 2)
    with pytest.raises(OSError, match="no file named"):  # it would drop the bias
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def test_what_others_would_misread_is_not_written(tmp_path):
    """Kills: a folder that another program opens and that gives wrong verdicts, a folder half written."""
    for to, reason, settings in (
        ("vllm", "activated path", {}),
        ("vllm", "no classifier for a OPT", {"kind": "opt", "guard_path": "full", "guard_prompt": ""}),
        ("peft", "no LoRA layers", {"lora_targets": []}),
    ):
        with pytest.raises(UserError, match=reason):
            export(make_guard(**settings), tmp_path / "out", to)
        assert not list(tmp_path.iterdir())


@pytest.fixture
def serve(monkeypatch):
    """A server with vLLM's protocol at URL. answer(number, ids) -> a status and the outputs at each token."""
    monkeypatch.setattr(client, "PAUSES", (0,) * 4)

    def start(answer, room=10**6):
        seen = []

        def urlopen(asked, timeout):
            if not asked.full_url.startswith(URL):
                raise URLError("refused")
            status, data = 200, {"max_model_len": room}
            if asked.full_url != f"{URL}/v1/models":
                body = json.loads(asked.data)
                assert asked.full_url == f"{URL}/pooling" and body["task"] == "token_classify"
                assert body["use_activation"] is False
                seen.append(body["input"])
                status, outputs = answer(len(seen), body["input"])
                data = {"data": outputs}
            if status != 200:
                raise HTTPError(asked.full_url, status, "no", {}, None)
            return BytesIO(json.dumps({"data": [data]}).encode())

        monkeypatch.setattr(request, "urlopen", urlopen)
        return seen

    return start


def served(tmp_path, **settings):
    """(guard, its folder, answer for `serve`)."""
    settings = {"guard_path": "full", "guard_prompt": "", "verdict_every": 8, "threshold": 0.6} | settings
    guard = make_guard(**settings)
    export(make_guard(**settings), tmp_path / "served", "vllm")

    def answer(number, ids):
        with torch.no_grad():
            logits = guard([ids], [list(range(1, len(ids) + 1))])[0]
        return 200, logits[:, 0 if guard.config.unsafe_head else 1 :].tolist()

    return guard, tmp_path / "served", answer


@pytest.mark.parametrize(("unsafe_head", "room"), [(True, 10**6), (False, 100)])
def test_the_client_writes_what_moderate_writes(unsafe_head, room, serve, tmp_path):
    """Kills: the last token alone, parts of a long text left out, another order, no retry, no resume."""
    guard, folder, answer = served(tmp_path, unsafe_head=unsafe_head)
    guard.max_tokens = min(guard.max_tokens, room)
    seen = serve(lambda number, ids: (503, []) if number == 1 else answer(number, ids), room)
    theirs = client.ServedGuard(folder, [URL, "http://nobody"])
    source, wanted, found = (tmp_path / name for name in ("rows.jsonl", "wanted.jsonl", "found.jsonl"))
    write(source, [*make_rows(5), {"prompt": "bread? " * 300, "id": 7}, {"prompt": 3}, {"prompt": "Hi"}])
    for judge, target in ((guard, wanted), (theirs, found), (theirs, found)):
        asked = len(seen)
        with pytest.raises(UserError, match="1 rows cannot be judged"):
            score_file(judge, source, target, start_accelerator())
    assert len(seen) == asked  # the second run finds all rows judged
    assert max(map(len, seen)) == guard.max_tokens
    pairs = zip(found.read_text().splitlines(), wanted.read_text().splitlines(), strict=True)
    for their, our in (map(json.loads, pair) for pair in pairs):
        assert their.pop("unsafe_probability") == pytest.approx(our.pop("unsafe_probability"), abs=1e-5)
        assert their.pop("categories") == pytest.approx(our.pop("categories"), abs=1e-5)
        assert their == our


def test_a_server_an_address_or_a_folder_of_something_else_is_named(serve, model_folder, tmp_path):
    """Kills: a retry that cannot help, an endless one, a traceback, verdicts of another guard or of none."""
    _, folder, _ = served(tmp_path)
    write(tmp_path / "rows.jsonl", [{"prompt": "Hi"}])
    for status, outputs, reason, requests in (
        (400, "too long", "gives no verdict", 1),
        (500, "starting", "gives no verdict", 4),
        (200, [[0.0]], "serves another guard", 1),
        (200, "text", "does not serve this guard", 1),
    ):
        seen = serve(lambda number, ids, reply=(status, outputs): reply)
        guard = client.ServedGuard(folder, [URL])
        with pytest.raises(UserError, match=f"{URL} {reason}"):
            score_file(guard, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", start_accelerator())
        assert len(seen) == requests and not (tmp_path / "out.jsonl").exists()
    for url, reason in (("host1", "is no address"), ("http://nobody", "gives no verdict")):
        with pytest.raises(UserError, match=f"{url} {reason}"):
            client.ServedGuard(folder, [url])
    for name in (model_folder, tmp_path / "none"):
        with pytest.raises(UserError, match="is no folder that tools"):
            client.ServedGuard(name, [])
