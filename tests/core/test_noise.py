"""Every picture draws from its own stream, whoever shares its batch and on whatever rank it is drawn."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusion3Pipeline

from xdit_core import UnsupportedCall
from xdit_core.engine.noise import PictureStreams
from xdit_core.testing.models import save_tiny_pixart, save_tiny_sd3
from xdit_core.testing.runs import generate

OWN = {"use_resolution_binning": False, "clean_caption": False}
PIXART = {"model": "pixart_sigma", "guidance": 4.5, **{f"call.{k}": v for k, v in OWN.items()}}
# those that draw at every step: what a scheduler is given by its pipeline (PixArt) or takes from the default generator
# (SD3)
SD3_SCHEDULERS = ["FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler:stochastic_sampling"]
PIXART_SCHEDULERS = [
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "KDPM2AncestralDiscreteScheduler",
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder of a tiny model whose scheduler has a switch on."""
    made = {}

    def find(model, switch):
        if (model, switch) not in made:
            folder = tmp_path_factory.mktemp("noise") / model
            (save_tiny_sd3 if model == "sd3" else save_tiny_pixart)(folder)
            if switch:
                file = folder / "scheduler/scheduler_config.json"
                file.write_text(json.dumps({**json.loads(file.read_text()), switch: True}))
            made[model, switch] = str(folder)
        return made[model, switch]

    return find


def alone(model, folder, scheduler, seed):
    """One picture by diffusers, its streams seeded with its seed."""
    import diffusers

    if model == "sd3":
        pipe, more = (
            StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None),
            {"max_sequence_length": 5},
        )
    else:
        pipe, more = PixArtSigmaPipeline.from_pretrained(folder), {"max_sequence_length": 5, **OWN}
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        guidance = 7.0 if model == "sd3" else 4.5
        return pipe(
            "a red fox",
            num_inference_steps=3,
            guidance_scale=guidance,
            generator=generator,
            output_type="latent",
            **more,
        )[0]


def close(mine, other):
    """Equal but for rounding, which differs a little between a batch and a single picture."""
    torch.testing.assert_close(mine, other, rtol=0, atol=5e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("name", [*SD3_SCHEDULERS, *PIXART_SCHEDULERS])
def test_pictures_do_not_depend_on_their_batch(gloo, folder_of, name):
    model = "sd3" if name in SD3_SCHEDULERS else "pixart_sigma"
    scheduler, _, switch = name.partition(":")
    folder = folder_of(model, switch)
    settings = {
        **({} if model == "sd3" else PIXART),
        "scheduler": scheduler,
        "seed": 4,
        "images": 3,
        "steps": 3,
        "max_sequence_length": 5,
    }
    want = torch.cat([alone(model, folder, scheduler, seed) for seed in (4, 5, 6)])
    close(generate([], folder, settings)[0], want)
    for latents, _ in gloo.run(generate, ["dp"], folder, {**settings, "dp.degree": 2}, world=2):
        close(latents, want)


def test_lazy_patches_draw_the_same_noise(gloo, folder_of):
    folder = folder_of("sd3", "stochastic_sampling")
    late = {"pipefusion.patches": 3, "images": 2, "seed": 4}
    one = [
        generate(["pipefusion"], folder, {**late, "pipefusion.stages": 1, "images": 1, "seed": seed})[0]
        for seed in (4, 5)
    ]
    for latents, _ in gloo.run(generate, ["pipefusion"], folder, {**late, "pipefusion.stages": 2}, world=2):
        close(latents, torch.cat(one))


def test_streams_of_single_draws():
    """Shapes as one argument or several, `like` another tensor, and what is not of the pictures."""
    streams = PictureStreams([3, 8], torch.device("cpu"))
    with streams:
        drawn = [
            torch.randn(2, 3),
            torch.rand((2, 1)),
            torch.randn_like(torch.zeros(2, 4)),
            torch.rand_like(torch.zeros(2, 2)),
        ]
    for i, seed in enumerate((3, 8)):
        generator = torch.Generator().manual_seed(seed)
        alone = [torch.randn(1, 3, generator=generator), torch.rand(1, 1, generator=generator)]
        alone += [torch.randn(1, 4, generator=generator), torch.rand(1, 2, generator=generator)]
        assert all(torch.equal(batch[i : i + 1], single) for batch, single in zip(drawn, alone, strict=True))
    with streams:
        torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "draw", [lambda: torch.randn(3, 3), lambda: torch.empty(2, 2).normal_(), lambda: torch.randperm(4)]
)
def test_draws_that_belong_to_no_picture_are_refused(draw):
    with (
        pytest.raises(UnsupportedCall, match=r"draws random numbers for 2 pictures at once.*images=1"),
        PictureStreams([1, 2], torch.device("cpu")),
    ):
        draw()
