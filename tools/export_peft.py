"""Write a guard as an adapter of PEFT. docs/USAGE.md says what other tools can do with it.

    python tools/export_peft.py CONFIG.json ADAPTER.safetensors OUTPUT_DIR

OUTPUT_DIR gets
    adapter_config.json, adapter_model.safetensors    the LoRA matrices, for PeftModel.from_pretrained
    guard_head.safetensors, guard.json                the head V (1 + K, H) and b, and the guard's settings
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import safetensors.torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import load_guard
from errors import refuse, run, write_whole
from training_run import write_json

LORA = "base_model.model."  # how PEFT names begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--base-model", help="where the chat model is, if it is not where the config says")
    args = parser.parse_args()
    guard = load_guard(args.config, args.adapter, -1, base_model=args.base_model)
    export(guard, args.output_dir)


def export(guard, folder):
    """Write the four files."""
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
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "adapter_model.safetensors", safetensors.torch.save(lora, {"format": "pt"}))
    write_whole(folder / "guard_head.safetensors", safetensors.torch.save(head, {"format": "pt"}))
    write_json(folder / "adapter_config.json", config)
    write_json(folder / "guard.json", asdict(guard.config))


if __name__ == "__main__":
    run(main)
