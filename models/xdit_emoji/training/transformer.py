"""Train the text encoders and the SD3 transformer of the emoji model, and save the diffusers pipeline.

Rectified flow (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3): predict ``noise - latent`` at
``x = (1 - s) latent + s noise``; 10 % of the prompts are empty, for classifier-free guidance.

    python -m xdit_emoji.training.transformer --vae build/emoji/vae --out build/emoji/pipeline --minutes 100
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from xdit_core.testing.models import clip_tokenizer
from xdit_emoji.training.data import chosen_names, load, read_names
from xdit_emoji.training.vae import encode_all

TEXT_TOKENS = 16
TEXT_WIDTH = 96


class Denoiser(nn.Module):
    """Two CLIP text encoders and the transformer, called as StableDiffusion3Pipeline calls them without a T5."""

    def __init__(self, vocab_size: int, bos: int, eos: int, layers: int, heads: int, head_dim: int) -> None:
        super().__init__()
        config = CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        self.text_encoders = nn.ModuleList(CLIPTextModelWithProjection(config) for _ in range(2))
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=layers,
            attention_head_dim=head_dim,
            num_attention_heads=heads,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=heads * head_dim,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Velocity at ``x [B, 8, 16, 16]``, noise level ``sigma [B]`` in [0, 1], for token ids ``[B, 16]``."""
        texts = [encoder(ids, output_hidden_states=True) for encoder in self.text_encoders]
        velocity: torch.Tensor = self.transformer(
            hidden_states=x,
            timestep=1000 * sigma,
            encoder_hidden_states=torch.cat([t.hidden_states[-2] for t in texts], dim=-1),
            pooled_projections=torch.cat([t[0] for t in texts], dim=-1),
            return_dict=False,
        )[0]
        return velocity


def draw_sigma(n: int, device: str) -> torch.Tensor:
    """Half logit-normal (Esser et al., section 3.1), half uniform: the ends of the path are trained too."""
    logit_normal = torch.randn(n, device=device).sigmoid()
    return torch.where(torch.rand(n, device=device) < 0.5, logit_normal, torch.rand(n, device=device))


def train(
    model: Denoiser, latents: torch.Tensor, ids: torch.Tensor, empty: torch.Tensor, args: argparse.Namespace
) -> Denoiser:
    """Train for ``args.minutes`` of wall time; returns the moving average of the weights."""
    device = args.device
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    forward = torch.compile(model) if args.compile else model
    latents, ids, empty = latents.to(device), ids.to(device), empty.to(device)
    started, step, smooth, order = time.monotonic(), 0, None, torch.empty(0, dtype=torch.long)
    while (done := (time.monotonic() - started) / (60 * args.minutes)) < 1:
        warm = min(1.0, (step + 1) / 200)
        for group in optimizer.param_groups:  # flat for 60 % of the time, then down to 2 %
            group["lr"] = args.lr * warm * (1.0 if done < 0.6 else 0.02 + 0.98 * (1 - done) / 0.4)
        if len(order) < args.batch:  # every picture equally often
            order = torch.cat([order, torch.randperm(len(latents))])
        which, order = order[: args.batch].to(device), order[args.batch :]
        text = torch.where(torch.rand(args.batch, 1, device=device) < 0.1, empty, ids[which])
        x, noise, sigma = latents[which], torch.randn_like(latents[which]), draw_sigma(args.batch, device)
        s = sigma.view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):
            velocity = forward((1 - s) * x + s * noise, sigma, text)
        loss = F.mse_loss(velocity.float(), noise - x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        step += 1
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 0:
            print(
                f"transformer step {step}  loss {smooth:.4f}  {(time.monotonic() - started) / step:.3f} s/step",
                flush=True,
            )
            if step % 1000 == 0:
                torch.save(averaged.module.state_dict(), Path(args.out).with_suffix(".pt"))
    print(
        f"transformer: {step} steps of {args.batch} in {(time.monotonic() - started) / 60:.1f} minutes on {device}",
        flush=True,
    )
    result: Denoiser = averaged.module.eval()  # type: ignore[assignment]
    return result


def save(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, out: str) -> None:
    """Write the pipeline in diffusers format, fp16."""
    vae.register_to_config(_name_or_path="")  # else the folder it was trained in goes into the package
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=model.text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipe.to(dtype=torch.float16).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", default="build/emoji/vae")
    parser.add_argument(
        "--names", default=None, help="a file of names, one a line; 'all' for every picture; default: names.txt"
    )
    parser.add_argument("--out", default="build/emoji/pipeline")
    parser.add_argument("--minutes", type=float, default=100)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=24)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    names, pictures = load(None if args.names == "all" else chosen_names(args.names))
    vae = AutoencoderKL.from_pretrained(args.vae).eval()
    latents = (encode_all(vae, pictures) - vae.config.shift_factor) * vae.config.scaling_factor
    tokenizer = clip_tokenizer([emoji.name for emoji in read_names()], length=TEXT_TOKENS)
    ids = tokenizer(names, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids
    empty = tokenizer("", padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    model = Denoiser(
        len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, args.layers, args.heads, args.head_dim
    )
    print(f"{len(names)} pictures, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters", flush=True)
    save(train(model, latents, ids, empty, args).cpu(), vae, tokenizer, args.out)


if __name__ == "__main__":
    main()
