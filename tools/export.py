"""Write a guard as a folder that other software opens. docs/USAGE.md says what it can do with it.

    python tools/export.py CONFIG.json OUT --to vllm    a sequence classifier, for guards of the `full` path
    python tools/export.py CONFIG.json OUT --to peft    an adapter for PeftModel.from_pretrained

vllm    W + (alpha / r) B A in place of W, the head as score.weight and score.bias, the tokenizer, and the
        guard's settings as "guard" in config.json. tools/client.py asks vLLM for verdicts.
peft    adapter_config.json, adapter_model.safetensors with A and B, guard_head.safetensors with the head
        V (1 + K, H) and b, guard.json with the guard's settings.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from huggingface_hub import split_torch_state_dict_into_shards

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import load_guard, use_fast_dtype
from errors import DTYPES, explain, refuse, run, write_json
from lora import merge_lora

LORA = "base_model.model."  # how PEFT's names begin
CLASSIFIERS = {  # chat models that vLLM serves as classifiers: the name of that class
    "LlamaForCausalLM": "LlamaForSequenceClassification",
    "MistralForCausalLM": "MistralForSequenceClassification",
    "Qwen2ForCausalLM": "Qwen2ForSequenceClassification",
    "Qwen3ForCausalLM": "Qwen3ForSequenceClassification",
    "Gemma2ForCausalLM": "Gemma2ForSequenceClassification",
    "Phi3ForCausalLM": "Phi3ForSequenceClassification",
}
README = {
    "vllm": """tools/client.py of LoRA-Guard says how to serve this guard with vLLM, and asks it for verdicts.

transformers does not find the weight files. Its classifiers have no bias in their head, so their
probabilities would be wrong.
""",
    "peft": """This is the LoRA part of a guard, for PeftModel.from_pretrained.

If adapter_config.json has `alora_invocation_tokens`, only these tokens at the end of a text may be adapted.
Software that does not know this field adapts every token, and its verdicts are wrong.
""",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path, help="folder that is not there yet")
    parser.add_argument("--to", choices=("vllm", "peft"), required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="of vllm's weights; default: as the chat model's")
    parser.add_argument("--adapter", type=Path, help="default: adapter.safetensors beside the config")
    parser.add_argument("--base-model", help="where the chat model is, if it is not where the config says")
    args = parser.parse_args()
    refuse(args.out.exists(), f"{args.out} exists; name a new folder")
    guard = load_guard(args.config, args.adapter, -1, base_model=args.base_model)
    if args.dtype:
        use_fast_dtype(guard, args.dtype)  # before the update is added, which 16 bits would round
    export(guard, args.out, args.to)


def export(guard, out, to):
    """Write the folder, whole or not at all. Raises UserError for a guard that it cannot be made of."""
    write = {"vllm": write_classifier, "peft": write_adapter}[to]
    with explain(f"cannot write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            whole = Path(folder, "whole")
            whole.mkdir()
            write(guard, whole)
            (whole / "README.md").write_text(README[to])
            whole.rename(out)


def write_classifier(guard, folder):
    """Write what vLLM serves. The guard's chat model loses its LoRA layers."""
    model, kind = guard.chat_model, type(guard.chat_model).__name__
    reason = "no engine serves LoRA at the last token alone with such a head; train with --guard-path full"
    refuse(not guard.is_full, f"this guard is of the activated path, and {reason}")
    refuse(kind not in CLASSIFIERS, f"vLLM has no classifier for a {kind}; it has: {', '.join(CLASSIFIERS)}")
    refuse(getattr(model, "is_quantized", False), "the LoRA update cannot be added to quantised weights")
    merge_lora(model)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("model.")}
    tensors |= {f"score.{name}": tensor for name, tensor in guard.head.state_dict().items()}
    # transformers would drop score.bias with a warning. It does not look for files with these names.
    shards = split_torch_state_dict_into_shards(tensors, filename_pattern="guard{suffix}.safetensors")
    for file, names in shards.filename_to_tensors.items():
        shard = {name: tensors[name].contiguous() for name in names}
        safetensors.torch.save_file(shard, folder / file, {"format": "pt"})
    outputs = ["unsafe", *guard.config.categories] if guard.config.unsafe_head else guard.config.categories
    config = model.config.to_dict() | {
        "architectures": [CLASSIFIERS[kind]],
        "dtype": str(model.dtype).removeprefix("torch."),
        "id2label": dict(enumerate(outputs)),
        "label2id": {name: n for n, name in enumerate(outputs)},
        "problem_type": "multi_label_classification",
        "pad_token_id": guard.tokenizer.pad_token_id,
        "guard": asdict(guard.config),
    }
    write_json(folder / "config.json", config)
    guard.tokenizer.save_pretrained(folder)


def write_adapter(guard, folder):
    """Write what PEFT opens, and the head."""
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in guard.adapter().items()}
    lora = {name: tensor for name, tensor in tensors.items() if name.startswith(LORA)}
    refuse(not lora, "this guard has no LoRA layers to export")
    head = {name.removeprefix("guard_head."): tensors[name] for name in tensors.keys() - lora.keys()}
    layers = sorted({name.removeprefix(LORA).partition(".lora_")[0] for name in lora})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": guard.chat_model.name_or_path,
        "inference_mode": True,
        "r": guard.config.lora_r,
        "lora_alpha": guard.config.lora_alpha,
        "target_modules": layers,
        # Activated LoRA starts at these tokens; null is plain LoRA, over the whole text.
        "alora_invocation_tokens": guard.guard_prompt_ids[0].tolist() or None,
    }
    safetensors.torch.save_file(lora, folder / "adapter_model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(head, folder / "guard_head.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "guard.json", asdict(guard.config))


if __name__ == "__main__":
    run(main)
