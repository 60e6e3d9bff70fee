"""Train the AutoencoderKL of the emoji model: 128 x 128 pictures to 8 x 16 x 16 latents.

python -m xdit_emoji.training.vae --data build/emoji --out build/emoji/vae --minutes 15
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from xdit_emoji.training.data import sheet, to_float


def new_vae() -> AutoencoderKL:
    """8x down, 8 latent channels, about 1 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def loss_of(vae: AutoencoderKL, x: torch.Tensor, kl_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Sharpness (L1, gradients), colour (L1 and L2 of averages over 2 to 16 pixels), a small KL; returns (loss, L1)."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
    l1 = F.l1_loss(y, x)
    edges = F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2))
    error = y - x
    colour = 5 * error.pow(2).mean()
    for k in (2, 4, 8, 16):
        mean = F.avg_pool2d(error, k)
        colour = colour + mean.abs().mean() + 5 * mean.pow(2).mean()
    return l1 + edges + colour + kl_weight * posterior.kl().mean() / x[0].numel(), l1.detach()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """Posterior means of uint8 pictures, unscaled, ``[n, 8, 16, 16]`` float32 on the CPU."""
    parts = [to_float(p.to(vae.device)) for p in torch.split(pictures, batch)]
    return torch.cat([vae.encode(p).latent_dist.mode().float().cpu() for p in parts])


def train(
    vae: AutoencoderKL, pictures: torch.Tensor, minutes: float, batch: int, lr: float, kl_weight: float
) -> AutoencoderKL:
    """Train for ``minutes`` of wall time under a cosine schedule over time; sets shift and scale in the config."""
    device = vae.device
    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)  # type: ignore[no-untyped-call]
    averaged = torch.optim.swa_utils.AveragedModel(vae, multi_avg_fn=average)
    started, step = time.monotonic(), 0
    while (done := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 50) * max(0.02, torch.cos(torch.tensor(done * torch.pi / 2)).item())
            )
        x = pictures[torch.randint(len(pictures), (batch,))].to(device)
        x = to_float(torch.where(torch.rand(batch, 1, 1, 1, device=device) < 0.5, x.flip(-1), x))
        loss, l1 = loss_of(vae, x, kl_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(vae)
        step += 1
        if step % 50 == 0:
            print(f"vae step {step}  L1 {l1.item():.4f}  {(time.monotonic() - started) / step:.2f} s/step", flush=True)
    vae = averaged.module.eval()
    latents = encode_all(vae, pictures)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    print(f"vae: {step} steps of {batch} in {(time.monotonic() - started) / 60:.1f} minutes on {device}", flush=True)
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="build/emoji", help="folder with data.pt")
    parser.add_argument("--out", default="build/emoji/vae")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--resume", default=None, help="folder of a VAE to go on with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pictures = torch.load(Path(args.data) / "data.pt")["pictures"]
    torch.manual_seed(args.seed)
    vae = (AutoencoderKL.from_pretrained(args.resume) if args.resume else new_vae()).to(args.device).train()
    vae = train(vae, pictures, args.minutes, args.batch, args.lr, args.kl)
    vae.save_pretrained(args.out)
    with torch.no_grad():
        some = pictures[:: len(pictures) // 40][:40]
        back = vae.decode(encode_all(vae, some).to(args.device)).sample.float().cpu()
    restored = ((back + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    psnr = -10 * torch.log10(((restored.float() - some.float()) / 255).pow(2).mean())
    sheet(torch.cat([some, restored]), 10).save(Path(args.out) / "restored.png")
    print(f"vae: PSNR of restored pictures {psnr:.1f} dB; see {Path(args.out) / 'restored.png'}")


if __name__ == "__main__":
    main()
