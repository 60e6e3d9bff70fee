"""Data parallelism: picture i is the same for every degree, and outputs keep their order."""

from __future__ import annotations

import pytest
import torch

from xdit_core import Engine, Observer
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

PROMPTS = ["a red fox", "blue heart", "snow"]


@pytest.mark.parametrize(("degree", "images"), [(2, 3), (3, 5), (4, 3)])
def test_every_picture_is_that_of_a_single_rank(gloo, tiny_sd3_folder, degree, images):
    serial = diffusers_latents(str(tiny_sd3_folder), num_images_per_prompt=images)
    results = gloo.run(generate, ["dp"], str(tiny_sd3_folder), {"dp.degree": degree, "images": images}, world=degree)
    for latents, _ in results:
        torch.testing.assert_close(latents, serial, atol=1e-4, rtol=1e-5)


def drawn(folder, settings, output_type):
    """All outputs of three prompts on this rank, and what was finished here."""
    torch.set_num_threads(1)
    done = []

    class Finished(Observer):
        def output_done(self, output):
            done.append((output.index, list(output.numbers)))

    engine = Engine(plan_for(["dp"], folder, {**settings, "output_type": output_type}), observer=Finished())
    outputs = engine.generate_all(PROMPTS)
    engine.close()
    if output_type == "latent":
        return [(o.prompt, o.latents) for o in outputs], done
    return [(o.prompt, None if o.images is None else [im.tobytes() for im in o.images]) for o in outputs], done


@pytest.mark.parametrize("degree", [2, 4])
def test_prompts_are_divided_and_come_back_in_order(gloo, tiny_sd3_folder, degree):
    results = gloo.run(drawn, str(tiny_sd3_folder), {"dp.degree": degree, "images": 2}, "latent", world=degree)
    for outputs, _ in results:
        assert [prompt for prompt, _ in outputs] == PROMPTS
        for prompt, latents in outputs:
            serial = diffusers_latents(str(tiny_sd3_folder), prompt, num_images_per_prompt=2)
            torch.testing.assert_close(latents, serial, atol=1e-4, rtol=1e-5)
    finished = [pair for _, done in results for pair in done]
    assert sorted((index, n) for index, numbers in finished for n in numbers) == [
        (p, n) for p in range(3) for n in range(2)
    ]


def test_pictures_come_to_rank_0(gloo, tiny_sd3_folder):
    one = drawn(str(tiny_sd3_folder), {"dp.degree": 1, "images": 2}, "image")[0]
    two = gloo.run(drawn, str(tiny_sd3_folder), {"dp.degree": 2, "images": 2}, "image", world=2)[0][0]
    assert [prompt for prompt, _ in two] == PROMPTS and all(len(images) == 2 for _, images in two)
    for (_, mine), (_, other) in zip(two, one, strict=True):
        for a, b in zip(mine, other, strict=True):  # a batch of another size rounds differently: one grey level
            difference = (
                torch.frombuffer(bytearray(a), dtype=torch.uint8).int()
                - torch.frombuffer(bytearray(b), dtype=torch.uint8).int()
            )
            assert difference.abs().max() <= 1


def test_more_ranks_than_pictures(gloo, tiny_sd3_folder):
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, _ in gloo.run(generate, ["dp"], str(tiny_sd3_folder), {"dp.degree": 3}, world=3):
        torch.testing.assert_close(latents, serial, atol=1e-4, rtol=1e-5)


def test_around_other_strategies(gloo, tiny_sd3_folder):
    serial = diffusers_latents(str(tiny_sd3_folder), num_images_per_prompt=3)
    settings = {"dp.degree": 2, "usp.ulysses": 2, "usp.ring": 1, "images": 3}
    for latents, _ in gloo.run(generate, ["dp", "usp"], str(tiny_sd3_folder), settings, world=4):
        torch.testing.assert_close(latents, serial, atol=1e-4, rtol=1e-5)
