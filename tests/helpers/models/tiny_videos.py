"""Tiny pipelines of the models that make videos."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    LattePipeline,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from helpers.models.tiny_parts import WORDS, shaken
from xdit_core.testing.models import tiny_t5, tiny_vae


def latte(layers: int = 4, frames: int = 4) -> LattePipeline:
    """Pairs of a spatial and a temporal block; 4 heads x 8."""
    t5, tokenizer = tiny_t5(16, WORDS)
    transformer = LatteTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        cross_attention_dim=32,
        attention_bias=True,
        sample_size=16,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=frames,
    )
    return LattePipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=tiny_vae(16),
        transformer=shaken(transformer),
        scheduler=DDIMScheduler(beta_end=0.005, clip_sample=False),
    )


def cogvideox(kind: str = "2b", layers: int = 4) -> CogVideoXPipeline:
    """2b with sines as positions, 5b with rotary tables, 1.5 with two frames a token."""
    t5, tokenizer = tiny_t5(16, WORDS)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 2,
        up_block_types=("CogVideoXUpBlock3D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=2,
        sample_height=48,  # tiles whose overlaps are whole numbers
        sample_width=40,
    )
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=layers,
        sample_width=32,
        sample_height=32,
        sample_frames=5,
        patch_size=2,
        patch_size_t=2 if kind == "1.5" else None,
        patch_bias=kind != "1.5",
        temporal_compression_ratio=2,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=kind != "2b",
    )
    scheduler = CogVideoXDDIMScheduler if kind == "2b" else CogVideoXDPMScheduler
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=vae.eval(),
        transformer=shaken(transformer),
        scheduler=scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    )


def wan(kind: str = "2.1", layers: int = 4) -> WanPipeline:
    """2.1 with one transformer, 2.2 with one for the first steps and one for the last, 5b with a time for each
    token."""
    _, tokenizer = tiny_t5(16, WORDS)
    encoder = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )

    def transformer() -> WanTransformer3DModel:
        return shaken(
            WanTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=16,
                ffn_dim=32,
                num_layers=layers,
                cross_attn_norm=True,
                rope_max_seq_len=64,
            )
        )

    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(encoder).eval(),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if kind == "2.2" else None,
        boundary_ratio=0.7 if kind == "2.2" else None,
        expand_timesteps=kind == "5b",
    )
