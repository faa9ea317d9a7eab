"""Train as train.py does, but let the chat path read each conversation once, into a file.

    python tools/train_cached.py [--adapter FILE] CACHE_DIR [all arguments of train.py]

No gradient goes through the conversation, so its KV cache is the same in every epoch and every later run.
With --adapter the training starts from a saved adapter of the same settings and categories. With --resume
it has to be given again.
"""

import argparse
import functools
import hashlib
import json
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from checkpoint import adapter_header, put_adapter, read_adapter
from errors import explain, refuse, run, write_whole
from model import GuardedChat


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, help="start from this adapter.safetensors")
    parser.add_argument("cache_dir", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of train.py")
    args = parser.parse_args()
    sys.argv[1:] = args.arguments
    train.load = functools.partial(load_cached, train.load, args.cache_dir, args.adapter)
    train.main()


def load_cached(load, cache_dir, adapter, *arguments):
    """What `load`, which is train.load, returns, with a guard that keeps caches and starts from `adapter`."""
    guard, splits, config = load(*arguments)
    keep_caches(guard, cache_dir)
    if adapter:
        tensors = read_adapter(adapter, adapter_header(config["base_fingerprint"], guard.config))
        put_adapter(adapter, guard, tensors)
        # In `rows`, because --resume compares these and refuses another start.
        config["rows"]["start"] = f"sha256 {hashlib.sha256(adapter.read_bytes()).hexdigest()}"
    return guard, splits, config


def keep_caches(guard, cache_dir):
    """Replace guard.states by one that keeps caches in a folder of this chat model, which is returned.

    Raises UserError for a model whose cache does not hold a whole conversation in one shape.
    """
    layers = [] if guard.is_full else guard.read(guard.guard_prompt_ids).layers
    shapes = {(type(layer), part.shape) for layer in layers for part in (layer.keys, layer.values)}
    fits = [kind for kind, _ in shapes] == [DynamicLayer] and guard.window == sys.maxsize
    refuse(not fits, "the caches of this guard and chat model cannot be kept; use train.py")
    folder = Path(cache_dir, digest(guard.chat_model))
    folder.mkdir(parents=True, exist_ok=True)
    guard.states = functools.partial(cached_states, guard, folder)
    return folder


def cached_states(guard, folder, conversations, cuts):
    """As GuardedChat.states: B lists of token ids, B lists of cuts -> last hidden states (B, C, H)."""
    rows = [kept(guard, folder, ids) for ids in conversations]
    longest = max(row.shape[3] for row in rows)
    rows = [F.pad(row, (0, 0, 0, longest - row.shape[3])) for row in rows]
    cache, device = DynamicCache(), guard.guard_prompt_ids.device
    for layer, (keys, values) in enumerate(torch.stack(rows, dim=2).to(device)):  # (B, heads, T, width)
        cache.update(keys, values, layer)
    return GuardedChat.states(guard, conversations, cuts, cache)


def kept(guard, folder, ids):
    """The cache of one conversation, (layers, 2, heads, T, width): keys and values.

    It is read alone, so a file is the same whatever batch it was first needed in.
    """
    device = guard.guard_prompt_ids.device.type
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    content = json.dumps([ids, str(guard.chat_model.dtype), autocast]).encode()
    path = folder / f"{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    if not path.exists():
        row = torch.stack(
            [torch.stack([layer.keys[0], layer.values[0]]) for layer in guard.read(guard.tensor(ids)).layers]
        )
        write_whole(path, safetensors.torch.save({"cache": row.cpu()}))
    with explain(f"{path} is damaged, delete it", (safetensors.SafetensorError, KeyError)):
        return safetensors.torch.load_file(path)["cache"]


def digest(chat_model):
    """Tells one set of frozen weights from another, by the beginning of every tensor."""
    frozen = [p for p in chat_model.parameters() if not p.requires_grad]
    frozen = [p if type(p) is nn.Parameter else p.dequantize() for p in frozen]
    sample = torch.cat([p.detach().flatten()[:64].float().cpu() for p in frozen]).numpy().tobytes()
    return hashlib.sha256(sample + chat_model.config.to_json_string().encode()).hexdigest()[:16]


if __name__ == "__main__":
    run(main)
