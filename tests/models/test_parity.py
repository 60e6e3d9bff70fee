"""Every model under every strategy that its architecture allows, against serial diffusers or the displaced
reference."""

from __future__ import annotations

import functools
import shutil

import numpy as np
import pytest
import torch

from helpers.models.families import FAMILIES, Family, serial, settings
from helpers.models.matrix import DISPLACED, EXACT, ODD, USP, WARMUPS, cases
from helpers.models.tiny import saved
from xdit_core import Engine
from xdit_core.testing import assert_close
from xdit_core.testing.runs import generate, plan_for


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Name of a family to the folder of its tiny pipeline."""

    @functools.cache
    def find(name):
        family = FAMILIES[name]
        return saved(family.model, tmp_path_factory.mktemp("families") / name, **family.options)

    return find


@pytest.fixture(scope="session")
def oracle(folder_of):
    """Latents of the unmodified pipeline; with guidance or without, with the model's scheduler or another."""

    @functools.cache
    def find(name, guided=True, scheduler=""):
        family = FAMILIES[name]
        return serial(folder_of(name), {**family.theirs, **({} if guided else family.plain[1])}, scheduler)

    return find


@pytest.fixture(scope="session")
def displaced(folder_of):
    """Latents of a displaced schedule in one process, by name, plugin and settings beside those of the family."""

    @functools.cache
    def find(name, plugin, more):
        return drawn(name, [plugin], folder_of(name), {**settings(FAMILIES[name]), **dict(more)})[0]

    return find


def drawn(name, plugins, folder, values):
    """Latents of our run, on every rank."""
    return generate(plugins, folder, values, FAMILIES[name].subject)


def guided(family: Family, on: bool):
    """Settings with guidance, or without."""
    return settings(family, **({} if on else family.plain[0]))


@pytest.mark.parametrize("on", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_plugin_it_is_diffusers(folder_of, oracle, name, on):
    family = FAMILIES[name]
    if not on and family.plain is None:
        pytest.skip("always guided")
    assert torch.equal(drawn(name, [], folder_of(name), guided(family, on))[0], oracle(name, on))


@pytest.mark.parametrize(("name", "label"), cases(EXACT))
def test_equals_serial(gloo, folder_of, oracle, name, label):
    plugins, more, world = EXACT[label]
    for latents, _ in gloo.run(
        drawn, name, plugins, folder_of(name), {**settings(FAMILIES[name]), **more}, world=world
    ):
        assert_close(latents, oracle(name))


@pytest.mark.parametrize(
    ("name", "label", "warmup"), [(*c.values, w) for c in cases(DISPLACED) for w in WARMUPS.get(c.values[1], [1])]
)
def test_equals_the_displaced_reference(gloo, folder_of, oracle, displaced, name, label, warmup):
    plugins, more, world = DISPLACED[label]
    family, late = FAMILIES[name], next(n for n in plugins if n in ("pipefusion", "distrifusion"))
    values = {**settings(family), **more, f"{late}.warmup": warmup}
    if late == "pipefusion":
        values["pipefusion.patches"] = family.patches
    reference = displaced(name, late, tuple(sorted(plan_for(plugins, folder_of(name), values).reference.items())))
    assert (reference - oracle(name)).abs().max() > 1e-4 * oracle(name).abs().max()
    for latents, _ in gloo.run(drawn, name, plugins, folder_of(name), values, world=world):
        assert_close(latents, reference)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "pipefusion" in f.strategies])
def test_warmup_is_serial(gloo, folder_of, oracle, name):
    values = {**settings(FAMILIES[name]), "pipefusion.stages": 2, "pipefusion.patches": 2, "pipefusion.warmup": 3}
    for latents, _ in gloo.run(drawn, name, ["pipefusion"], folder_of(name), values, world=2):
        assert torch.equal(latents, oracle(name))


@pytest.mark.parametrize("plugins", [["usp"], ["pipefusion", "usp"]], ids="+".join)
@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "usp" in f.strategies and f.model != "dit"])
def test_odd_sizes(gloo, folder_of, name, plugins):
    """Tokens and rows that do not divide by ranks, patches or stages; one picture."""
    family = FAMILIES[name]
    height, width = ODD.get(family.model, (32, 40))
    values = {
        **settings(family, images=1),
        "height": height,
        "width": width,
        "usp.ulysses": 1,
        "usp.ring": 3 if len(plugins) == 1 else 2,
    }
    if "pipefusion" in plugins:
        values |= {"pipefusion.stages": 2, "pipefusion.patches": 3}
        one = {k: v for k, v in values.items() if not k.startswith("usp.")}
        want = drawn(name, ["pipefusion"], folder_of(name), {**one, "pipefusion.stages": 1})[0]
    else:
        arguments = {**family.theirs, "height": height, "width": width}
        count = {"num_images_per_prompt": 1, "num_videos_per_prompt": 1}
        want = serial(folder_of(name), {k: count.get(k, v) for k, v in arguments.items()}, images=1)
    for latents, _ in gloo.run(drawn, name, plugins, folder_of(name), values, world=3 if len(plugins) == 1 else 4):
        assert_close(latents, want)


@pytest.mark.parametrize(("height", "width", "degree"), [(128, 192, 2), (144, 168, 4), (176, 104, 3)])
def test_a_unet_in_patches(gloo, tmp_path, height, width, degree):
    """Sides that do not halve evenly, patches of different sizes; serial in warm-up, near it and equal to the reference
    past it."""
    name, size, folder = "sdxl", {"height": height, "width": width}, saved("sdxl", tmp_path / "sdxl", levels=4)
    want = serial(folder, {**FAMILIES[name].theirs, **size})
    values = {**settings(FAMILIES[name]), **size, "distrifusion.degree": degree}
    for latents, _ in gloo.run(
        drawn, name, ["distrifusion"], folder, {**values, "distrifusion.warmup": 3}, world=degree
    ):
        assert_close(latents, want)
    one = {**values, "distrifusion.degree": 1, "distrifusion.patches": degree}
    reference = drawn(name, ["distrifusion"], folder, one)[0]
    assert 1e-4 < (reference - want).abs().max() / want.abs().max() < 0.5
    for latents, _ in gloo.run(drawn, name, ["distrifusion"], folder, values, world=degree):
        assert_close(latents, reference)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.plain and "usp" in f.strategies and not f.brief])
def test_without_guidance(gloo, folder_of, oracle, name):
    values = {**guided(FAMILIES[name], False), **USP}
    for latents, _ in gloo.run(drawn, name, ["usp"], folder_of(name), values, world=2):
        assert_close(latents, oracle(name, False))


@pytest.mark.parametrize(
    ("name", "plugins"),
    [(n, ["usp"] if "usp" in f.strategies else ["cfg"]) for n, f in FAMILIES.items() if not f.brief],
)
def test_another_scheduler(gloo, folder_of, oracle, name, plugins):
    family = FAMILIES[name]
    values = {**settings(family), **(USP if plugins == ["usp"] else {}), "scheduler": family.scheduler}
    for latents, _ in gloo.run(drawn, name, plugins, folder_of(name), values, world=2):
        assert_close(latents, oracle(name, True, family.scheduler))


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if "pipefusion" in f.strategies and not f.brief])
def test_another_scheduler_displaced(gloo, folder_of, name):
    family = FAMILIES[name]
    more = {"pipefusion.stages": 2, "pipefusion.patches": family.patches, "pipefusion.warmup": 1}
    values = {**settings(family), **more, "scheduler": family.scheduler}
    reference = drawn(name, ["pipefusion"], folder_of(name), {**values, "pipefusion.stages": 1})[0]
    for latents, _ in gloo.run(drawn, name, ["pipefusion"], folder_of(name), values, world=2):
        assert_close(latents, reference)


def frames_of(images):
    """Pictures or videos as one array, 0 to 255."""
    return np.stack(
        [np.asarray(frame, dtype=np.int16) for item in images for frame in (item if isinstance(item, list) else [item])]
    )


def decoded(name, plugins, folder, values, tiles=False):
    """Pictures or videos of our run, on the rank that owns them."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, values))
    try:
        if tiles:
            engine.pipe.vae.enable_tiling()
        images = engine.generate(FAMILIES[name].subject).images
        return None if images is None else frames_of(images)
    finally:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_decoded_together(gloo, folder_of, name):
    """The VAE on two ranks; Latte's pipeline decodes in parts, one call after the other."""
    family = FAMILIES[name]
    more = {"call.decode_chunk_size": 3} if name == "latte" else {}
    values = {**settings(family, output_type="image"), **more}
    plugins, tiles = ["cfg", "parallel_vae"], family.model == "cogvideox"  # the rows of its VAE cannot be divided
    divided = {**values, "parallel_vae.tiling": tiles}
    found = gloo.run(decoded, name, plugins, folder_of(name), divided, world=2)
    alone = decoded(name, [], folder_of(name), values, tiles=tiles)
    assert found[1] is None
    assert np.abs(found[0] - alone).max() <= 1
    assert alone.std() > 1


@pytest.mark.parametrize("name", ["dit"])
def test_checkpoints_that_name_an_old_class(folder_of, oracle, tmp_path, name):
    """Those that were published name ``Transformer2DModel``, which diffusers takes for the class of today."""
    folder = tmp_path / "old"
    shutil.copytree(folder_of(name), folder)
    for file in (folder / "model_index.json", folder / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("DiTTransformer2DModel", "Transformer2DModel"))
    assert torch.equal(drawn(name, [], str(folder), settings(FAMILIES[name]))[0], oracle(name))


@pytest.mark.parametrize(("stages", "tensors"), [(2, [2, 0]), (3, [2, 0, 0]), (6, [1, 1, 0, 0, 0, 0])])
def test_long_skips_go_straight_to_the_stage_that_takes_them(gloo, folder_of, stages, tensors):
    """6 blocks of HunyuanDiT: 5 takes what came out of 0, 4 what came out of 1; 60 tokens x 32, batch of 4, 3 steps."""
    values = {**settings(FAMILIES["hunyuandit"]), "pipefusion.stages": stages, "pipefusion.patches": 3}
    found = gloo.run(drawn, "hunyuandit", ["pipefusion"], folder_of("hunyuandit"), values, world=stages)
    assert [sent.get("skips", 0) for _, sent in found] == [n * 60 * 32 * 4 * 4 * 3 for n in tensors]
