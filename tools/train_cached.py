"""Keep what the chat path makes of each conversation on disk, so later epochs and runs do not read it again.

`train.py --cache-dir FOLDER` uses this. The activated path needs no gradient through the conversation, so its
KV cache is the same in every epoch.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common import explain, refuse, write_whole


def keep_caches(guard, folder):
    """Let `guard` read each conversation once, into a file below `folder`. Returns the folder of this model.

    Raises UserError for a model whose cache does not hold a whole conversation in one shape.
    """
    device = guard.guard_prompt_ids.device
    layers = [] if guard.is_full else getattr(read(guard, guard.guard_prompt_ids[0].tolist()), "layers", [])
    shapes = {tensor.shape for x in layers if type(x) is DynamicLayer for tensor in (x.keys, x.values)}
    odd = len(shapes) != 1 or any(type(layer) is not DynamicLayer for layer in layers)
    refuse(odd, "the caches of this guard and chat model cannot be kept: leave out --cache-dir")
    folder = Path(folder) / digest(guard.chat_model)
    folder.mkdir(parents=True, exist_ok=True)

    def forward(conversations, ends=None):
        """As GuardedChat.forward: the first `ends` tokens of B lists of token ids -> logits (B, 1 + K)."""
        ends = ends or [len(ids) for ids in conversations]
        rows = [kept(guard, folder, ids)[:, :, :, :end] for ids, end in zip(conversations, ends, strict=True)]
        longest = max(ends)
        mask = torch.tensor([[0] * (longest - end) + [1] * end for end in ends], device=device)  # (B, T)
        rows = torch.stack([F.pad(row, (0, 0, longest - row.shape[3], 0)) for row in rows], dim=2).to(device)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(rows):  # (B, heads, T, width)
            cache.update(keys, values, layer)
        return guard.judge(cache, None if mask.all() else mask)

    guard.forward = forward
    return folder


def kept(guard, folder, ids):
    """The cache of one conversation, (layers, 2, heads, T, width): keys and values.

    It is read alone, so a file is the same whatever batch it was first needed in.
    """
    device = guard.guard_prompt_ids.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    content = json.dumps([ids, str(guard.chat_model.dtype), autocast]).encode()
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    if not path.exists():
        layers = read(guard, ids).layers
        row = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        write_whole(path, safetensors.torch.save({"cache": row.cpu()}))
    with explain(f"{path} is damaged, delete it", (safetensors.SafetensorError, KeyError)):
        return safetensors.torch.load_file(path)["cache"]


@torch.no_grad()
def read(guard, ids):
    ids = torch.tensor([ids], device=guard.guard_prompt_ids.device)
    return guard.chat_model.base_model(input_ids=ids, use_cache=True).get("past_key_values")


def digest(chat_model):
    """Tells one set of frozen weights from another, by the beginning of every tensor."""
    frozen = [p for p in chat_model.parameters() if not p.requires_grad]
    frozen = [p if type(p) is nn.Parameter else p.dequantize() for p in frozen]
    sample = torch.cat([p.detach().flatten()[:64].float().cpu() for p in frozen]).numpy().tobytes()
    return hashlib.sha256(sample + chat_model.config.to_json_string().encode()).hexdigest()[:16]
