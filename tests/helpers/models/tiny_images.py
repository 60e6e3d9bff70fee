"""Tiny pipelines of the models that draw pictures."""

from __future__ import annotations

import re
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from helpers.models.tiny_parts import WORDS, qwen_tokenizer, shaken
from xdit_core.testing.models import clip_tokenizer, tiny_clip, tiny_pixart, tiny_sd3, tiny_t5, tiny_vae


def sd3() -> Any:
    """Without a T5."""
    return tiny_sd3()


def pixart_alpha() -> Any:
    """With learned sigma."""
    return tiny_pixart(sigma=False)


def pixart_sigma() -> Any:
    """With learned sigma."""
    return tiny_pixart()


def flux(dev: bool = True) -> FluxPipeline:
    """2 double and 3 single blocks, 4 heads x 8; packed latents."""
    clip = clip_tokenizer([" ".join(WORDS)], length=12, vocab_size=600)
    t5, tokenizer = tiny_t5(16, WORDS)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=dev,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dev),
        vae=tiny_vae(16),
        text_encoder=tiny_clip(clip, 12, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
        transformer=shaken(transformer),
    )


def dit(layers: int = 4) -> DiTPipeline:
    """4 heads x 8 over 8 x 8 tokens; the pipeline counts on 1,000 classes."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    labels = {i: f"class {i}, number {i}" for i in range(1000)} | {207: "golden retriever"}
    return DiTPipeline(
        transformer=shaken(transformer), vae=tiny_vae(16), scheduler=DDIMScheduler(beta_end=0.005), id2label=labels
    )


def hunyuandit(layers: int = 6) -> HunyuanDiTPipeline:
    """As v1.2: no style, no size conditions. The pipeline counts on a VAE that divides sides by 8."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    encoder = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    t5, tokenizer = tiny_t5(16, WORDS)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=layers,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=False,
        activation_fn="gelu-approximate",
    )
    return HunyuanDiTPipeline(
        vae=tiny_vae(16, levels=4),
        text_encoder=BertModel(encoder).eval(),
        tokenizer=BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77),
        transformer=shaken(transformer),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_end=0.03,
            prediction_type="v_prediction",
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5,
        tokenizer_2=tokenizer,
    )


def qwen_image(layers: int = 4) -> QwenImagePipeline:
    """4 heads x 8; latents of 4 channels, packed by two a side."""
    tokenizer = qwen_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 10000.0}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=510, video_token_id=511)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=shaken(transformer),
    )
    # A token for each word, as in the published vocabulary: the pipeline drops 34, which is how the template begins.
    tokenizer.add_tokens(sorted(set(re.findall(r"<\|\w+\|>| ?\w+", pipe.prompt_template_encode))))
    assert len(tokenizer(pipe.prompt_template_encode.split("{}")[0]).input_ids) == pipe.prompt_template_encode_start_idx
    return pipe


def z_image(layers: int = 3, refiners: int = 2) -> ZImagePipeline:
    """4 heads x 12."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
        axes_lens=[512, 64, 64],
    )
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(16),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=tokenizer,
        transformer=shaken(transformer, std=0.1),
    )


def sdxl(levels: int = 2) -> StableDiffusionXLPipeline:
    """Three levels, attention in the two lower ones; ``levels`` of the VAE."""
    clip = clip_tokenizer([" ".join(WORDS)], length=12, vocab_size=600)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 4),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
        use_linear_projection=True,
        norm_num_groups=4,
    )
    with torch.no_grad():
        for p in unet.parameters():
            p.mul_(1.5 if p.dim() > 1 else 1.0)
    return StableDiffusionXLPipeline(
        vae=tiny_vae(16, levels),
        text_encoder=tiny_clip(clip, 12, CLIPTextModel),
        text_encoder_2=tiny_clip(clip, 12),
        tokenizer=clip,
        tokenizer_2=clip,
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
    )
