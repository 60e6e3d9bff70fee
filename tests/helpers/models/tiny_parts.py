"""What several tiny pipelines need."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

WORDS = ["a", "red", "fox", "in", "the", "snow"]


def shaken(module: Any, std: float = 0.15) -> Any:
    """Defaults start some layers at zero, which would hide errors."""
    for p in module.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=std)
    return module.eval()


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A token for every byte, and a template for one turn of a conversation."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {word: i for i, word in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    return tokenizer
