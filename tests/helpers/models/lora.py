"""Random LoRAs of tiny pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def loras_of(folder: str | Path, into: Path, count: int = 2, **options) -> list[str]:
    """Random LoRAs of the pipeline in a folder, made one after the other."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    made = [into / f"lora{seed}" for seed in range(count)]
    return [
        random_lora(DiffusionPipeline.from_pretrained(folder, **absent), path, seed, **options)
        for seed, path in enumerate(made)
    ]


def random_lora(pipe, folder: Path, seed: int = 0, only: str = "", **options) -> str:
    """A LoRA of a pipeline's denoiser, and of its first text encoder where diffusers knows that, with random
    weights; or of one of them only."""
    torch.manual_seed(seed)
    parts = {}
    for name, targets in (
        ("transformer", ["to_q", "to_k", "to_out.0", "add_v_proj", "net.2"]),
        ("text_encoder", ["q_proj"]),
    ):
        if name not in pipe._lora_loadable_modules or only not in ("", name):
            continue
        module = getattr(pipe, name)
        module.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=targets, **options))
        for key, p in module.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p, std=0.2)
        parts[name] = get_peft_model_state_dict(module)
        parts[f"{name}_config"] = module.peft_config["default"]
    words = {f"{n}_lora_layers": v for n, v in parts.items() if not n.endswith("_config")}
    words |= {
        n.replace("_config", "_lora_adapter_metadata"): v.to_dict() for n, v in parts.items() if n.endswith("_config")
    }
    pipe.save_lora_weights(folder, **words)
    return str(folder)
