"""Tiny pipelines made from the real diffusers and transformers classes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


def clip_tokenizer(texts: Iterable[str], length: int, vocab_size: int = 4096) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from ``texts``.

    Args:
        texts: what to learn from; every word that occurs becomes one token while ``vocab_size`` lasts.
        length: ``model_max_length`` in tokens, start and end tokens included.
        vocab_size: the most tokens it may have.
    """
    blank = CLIPTokenizer()
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[str(blank.bos_token), str(blank.eos_token)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = dict(model["vocab"])
    for byte in pre_tokenizers.ByteLevel.alphabet():  # a word may end in a byte that no text ended in
        vocab.setdefault(byte + "</w>", len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def tiny_clip(tokenizer: CLIPTokenizer, length: int, cls: type[Any] = CLIPTextModelWithProjection) -> Any:
    """A CLIP text encoder with random weights, 16 wide, for at most ``length`` tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return cls(config).eval()


def tiny_vae(sample_size: int, levels: int = 2) -> AutoencoderKL:
    """A decoder that doubles the latents' sides at every level but one, 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=2 * sample_size,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
    ).eval()


def tiny_sd3(
    *,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 8,
    sample_size: int = 16,
    text_tokens: int = 12,
    dual: tuple[int, ...] = (),
    qk_norm: str | None = "rms_norm",
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline with random weights, every component real; a second or two of CPU a picture at most.

    Args:
        layers, heads, head_dim: of the transformer.
        sample_size: side of the latents; pictures have twice that, tokens half.
        text_tokens: of each CLIP encoder; there is no T5.
        dual: blocks with a second attention over the picture alone, as SD3.5 has.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(["a red fox in the snow", "blue heart"], length=text_tokens, vocab_size=600)
        transformer = SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=32,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=32,
            pos_embed_max_size=sample_size,
            dual_attention_layers=dual,
            qk_norm=qk_norm,
        )
        for p in transformer.parameters():  # the defaults start some layers at zero, which would hide errors
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)
        return StableDiffusion3Pipeline(
            transformer=transformer.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(sample_size),
            text_encoder=tiny_clip(tokenizer, text_tokens),
            tokenizer=tokenizer,
            text_encoder_2=tiny_clip(tokenizer, text_tokens),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )


def tiny_t5(width: int, words: Iterable[str]) -> tuple[T5EncoderModel, T5TokenizerFast]:
    """A T5 encoder with random weights and a tokenizer that knows ``words``."""
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((f"\u2581{word}", -float(i)) for i, word in enumerate(words)),
    ]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    fast = T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)
    config = T5Config(
        vocab_size=len(vocab),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval(), fast


def tiny_pixart(
    *,
    sigma: bool = True,
    layers: int = 4,
    heads: int = 4,
    head_dim: int = 8,
    sample_size: int = 16,
    learned_sigma: bool = True,
    seed: int = 0,
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """A PixArt pipeline with random weights: text enters by cross-attention, with a mask."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder, tokenizer = tiny_t5(16, ["a", "red", "fox", "in", "the", "snow"])
        transformer = PixArtTransformer2DModel(
            sample_size=sample_size,
            num_layers=layers,
            patch_size=2,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            in_channels=4,
            out_channels=8 if learned_sigma else 4,
            caption_channels=16,
            cross_attention_dim=heads * head_dim,
            use_additional_conditions=False,
        )
        for p in transformer.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.15)
        parts = {
            "transformer": transformer.eval(),
            "scheduler": DPMSolverMultistepScheduler(beta_end=0.005),  # random weights and much noise would overflow
            "vae": tiny_vae(sample_size),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
        }
        return PixArtSigmaPipeline(**parts) if sigma else PixArtAlphaPipeline(**parts)


def save_tiny_pixart(folder: str | Path, **options: Any) -> Path:
    """``tiny_pixart`` in diffusers format on disk; takes its options."""
    tiny_pixart(**options).save_pretrained(folder)
    return Path(folder)


def save_tiny_sd3(folder: str | Path, **options: Any) -> Path:
    """``tiny_sd3`` in diffusers format on disk; takes its options."""
    tiny_sd3(**options).save_pretrained(folder)
    return Path(folder)
