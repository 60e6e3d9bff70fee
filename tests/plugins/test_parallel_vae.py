"""The parallel VAE: what the ranks of a picture decode together equals what one decodes alone."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from xdit_core import Axis, Plan, PlanRefused, Traffic, UsageError
from xdit_core.testing.runs import plan_for

# A tiny model of each class, the latents' channels and dims, and pixels a side of a latent element.
VAES = {
    "AutoencoderKL": (4, 4, 2),
    "AutoencoderKLTemporalDecoder": (4, 4, 2),
    "AutoencoderKLWan": (4, 5, 8),
    "AutoencoderKLQwenImage": (4, 5, 8),
    "AutoencoderKLFlux2": (4, 4, 2),
    "AutoencoderKLHunyuanVideo": (4, 5, 8),
    "AutoencoderKLCogVideoX": (4, 5, 8),
    "AutoencoderDC": (4, 4, 2),
    "AutoencoderTiny": (4, 4, 2),
}
WINDOWS = {
    "AutoencoderDC": (12, 12, 8, 8),
    "AutoencoderKLWan": (64, 64, 48, 48),
    "AutoencoderKLQwenImage": (64, 64, 48, 48),
}
ROWS = [kind for kind in VAES if kind not in ("AutoencoderKLCogVideoX", "AutoencoderDC", "AutoencoderTiny")]


def tiny(kind, dtype=torch.float32):
    """The same random VAE on every rank."""
    import diffusers

    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4}
    two_d = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
    }
    wan = {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": [1, 2, 2, 2],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    four = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    tiles = {"sample_size": 16}
    options = {
        "AutoencoderKL": {**blocks, **two_d, **tiles},
        "AutoencoderKLFlux2": {**blocks, **two_d, **tiles},
        "AutoencoderKLTemporalDecoder": {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
        | {"down_block_types": ("DownEncoderBlock2D",) * 2},
        "AutoencoderKLWan": {**wan, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "AutoencoderKLQwenImage": {**wan, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        "AutoencoderKLHunyuanVideo": four,
        "AutoencoderKLCogVideoX": {**four, "sample_height": 96, "sample_width": 80, "temporal_compression_ratio": 4},
        "AutoencoderTiny": {"encoder_block_out_channels": (8,) * 2, "decoder_block_out_channels": (8,) * 2}
        | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4},
        "AutoencoderDC": {
            "latent_channels": 4,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "ResBlock"),
            "decoder_block_types": ("ResBlock", "ResBlock"),
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
        },
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = getattr(diffusers, kind)(**options).eval()
        for p in vae.parameters():  # what the defaults set to zero or one would hide errors
            torch.nn.init.normal_(p, std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
        if kind in ("AutoencoderKLWan", "AutoencoderKLQwenImage"):  # they clamp to -1 .. 1
            for p in vae.decoder.conv_out.parameters():
                p.data *= 0.02
    if kind in WINDOWS:
        vae.enable_tiling(*WINDOWS[kind])
        vae.disable_tiling()
    return vae if dtype == torch.float32 else vae.to(dtype)


def inputs(kind, height, width, batch, frames=3):
    """Latents of that class, and the further arguments of ``decode``."""
    channels, dims, _ = VAES[kind]
    shape = (batch, channels, height, width) if dims == 4 else (batch, channels, frames, height, width)
    more = {"num_frames": batch} if kind == "AutoencoderKLTemporalDecoder" else {}
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)), more


class AxesOnly(SimpleNamespace):
    """Of a plan what the strategy reads."""

    degree, picture_axes, ranks_of_a_picture = Plan.degree, Plan.picture_axes, Plan.ranks_of_a_picture


@contextmanager
def divided(vae, settings=None, kinds=("x",), run=None):
    """The strategy around a VAE on the ranks of the current group; ``kinds``: names of the mesh axes, ``own`` makes
    other pictures."""
    import torch.distributed as dist

    from xdit_core import Mesh, Rank
    from xdit_parallel_vae.strategy import ParallelVae

    torch.set_num_threads(1)
    world = dist.get_world_size()
    axes = tuple(
        Axis(
            k,
            world // 2 if len(kinds) > 1 and i else 2 if len(kinds) > 1 else world,
            Traffic(i),
            own_outputs=k == "own",
        )
        for i, k in enumerate(kinds)
    )
    run = SimpleNamespace(**{"height": None, "width": None, "output_type": "image", **(run or {})})
    rank = Rank(AxesOnly(axes=axes, run=run), None, Mesh(axes, "cpu"), torch.device("cpu"), torch.float32)
    strategy = ParallelVae((settings or {}).get("degree"), (settings or {}).get("tiling", False), rank)
    strategy.prepare(SimpleNamespace(vae=vae))
    inner = vae.decode
    vae.decode = lambda *args, **kwargs: strategy.decode(inner, *args, **kwargs)
    with torch.no_grad():
        yield rank
    rank.mesh.close()


def decoded(kind, height, width, batch, settings=None, dtype=torch.float32, run=None):
    """On each rank: the sample, and the bytes sent."""
    vae = tiny(kind, dtype)
    latents, more = inputs(kind, height, width, batch)
    with divided(vae, settings, run=run) as rank:
        out = vae.decode(latents.to(dtype), return_dict=False, **more)
        return None if out is None else out[0], rank.sent["vae"]


def serial(kind, height, width, batch, dtype=torch.float32, tiled=False):
    vae = tiny(kind, dtype)
    if tiled:
        vae.enable_tiling()
    latents, more = inputs(kind, height, width, batch)
    with torch.no_grad():
        return vae.decode(latents.to(dtype), return_dict=False, **more)[0]


def close(a, b, times=1e-5):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert float((a - b).abs().max()) <= times * float(b.abs().max())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("world", "height", "width", "batch"), [(2, 8, 6, 1), (3, 7, 9, 2), (4, 4, 5, 1)])
def test_rows_equal_serial(gloo, kind, world, height, width, batch):
    """Rows that do not divide, one row a rank, two pictures; every rank has the whole."""
    whole = serial(kind, height, width, batch)
    assert float(whole.abs().max()) < 0.999 or kind not in WINDOWS  # nothing was clamped
    for sample, sent in gloo.run(decoded, kind, height, width, batch, world=world):
        close(sample, whole)
        assert sent > 0


TILES = [
    "AutoencoderKLCogVideoX",
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLWan",
    "AutoencoderKLQwenImage",
]


@pytest.mark.parametrize("kind", TILES)
@pytest.mark.parametrize(("world", "height", "width", "batch"), [(2, 13, 11, 1), (3, 12, 17, 2)])
def test_tiles_equal_those_of_diffusers(gloo, kind, world, height, width, batch):
    tiles, whole = serial(kind, height, width, batch, tiled=True), serial(kind, height, width, batch)
    assert tiles.shape != whole.shape or not torch.allclose(tiles, whole, atol=1e-3)
    results = gloo.run(decoded, kind, height, width, batch, {"tiling": True}, world=world)
    close(results[0][0], tiles)
    assert sum(sent for _, sent in results) > 0


def test_bytes_of_tiles(gloo):
    """Of 3 x 2 tiles the second rank has the right ones, of 2 columns of pixels, 3 channels, 4 bytes."""
    results = gloo.run(decoded, "AutoencoderDC", 9, 5, 1, {"tiling": True}, world=2)
    assert [sent for _, sent in results] == [0, (12 + 10 + 2) * 2 * 3 * 4]


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderKLWan"])
def test_half_precision(gloo, kind):
    """As far from the serial result in float32 as serial bfloat16 is, about."""
    exact, half = serial(kind, 7, 6, 2), serial(kind, 7, 6, 2, torch.bfloat16)
    ours = gloo.run(decoded, kind, 7, 6, 2, None, torch.bfloat16, world=2)[0][0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= 2 * (half - exact).abs().mean()


def test_fewer_ranks_than_there_are(gloo):
    results = gloo.run(decoded, "AutoencoderKL", 7, 6, 1, {"degree": 2}, world=3)
    for sample, _ in results[:2]:
        close(sample, serial("AutoencoderKL", 7, 6, 1))
    assert results[2] == (None, 0)
    alone = gloo.run(decoded, "AutoencoderKL", 7, 6, 1, {"degree": 1}, world=2)
    close(alone[0][0], serial("AutoencoderKL", 7, 6, 1), 0)
    assert alone[0][1] == 0 and alone[1] == (None, 0)


def own_pictures(degree):
    """Two pairs of ranks, each with a picture of its own."""
    import torch.distributed as dist

    vae, first = tiny("AutoencoderKL"), dist.get_rank() // 2
    latents, _ = inputs("AutoencoderKL", 6, 6, 2)
    with divided(vae, {"degree": degree}, kinds=("own", "x")):
        out = vae.decode(latents[first : first + 1], return_dict=False)
    return out[0]


def test_ranks_with_other_pictures(gloo):
    whole = serial("AutoencoderKL", 6, 6, 2)
    for rank, sample in enumerate(gloo.run(own_pictures, None, world=4)):
        close(sample, whole[rank // 2 : rank // 2 + 1])


def encoded(kind, height, width, batch, degree):
    """On each rank: the mean of the latents of a picture, and the bytes sent."""
    vae = tiny(kind)
    with divided(vae, {"degree": degree}) as rank:
        return vae.encode(pixels(kind, height, width, batch)).latent_dist.mean, rank.sent["vae"]


def pixels(kind, height, width, batch):
    _, dims, factor = VAES[kind]
    frames = (5,) if dims == 5 else ()
    return torch.randn((batch, 3, *frames, height * factor, width * factor), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", [k for k in ROWS if k != "AutoencoderKLFlux2"])
@pytest.mark.parametrize(("world", "height", "batch"), [(2, 6, 1), (3, 7, 2)])
def test_encoding_equals_serial(gloo, kind, world, height, batch):
    with torch.no_grad():
        whole = tiny(kind).encode(pixels(kind, height, 5, batch)).latent_dist.mean
    for latents, sent in gloo.run(encoded, kind, height, 5, batch, None, world=world):
        close(latents, whole)
        assert sent > 0


def test_encoding_is_left_alone_where_some_ranks_would_wait_for_it(gloo):
    """With a part of the ranks the others encode alone, so nothing is won."""
    assert [sent for _, sent in gloo.run(encoded, "AutoencoderKL", 6, 5, 1, 2, world=3)] == [0, 0, 0]


def refused(kind, settings, height, run=None, encode=False):
    """The sentence on each rank."""
    try:
        if encode:
            vae = tiny(kind)
            with divided(vae, settings):
                vae.encode(pixels(kind, height, 5, 1))
        else:
            decoded(kind, height, 6, 1, settings, run=run)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "settings", "height", "run", "encode", "sentence"),
    [
        ("AutoencoderKL", {}, 1, None, False, "latents of 1 rows cannot be decoded by 2 ranks; draw a larger picture"),
        ("AutoencoderKL", {}, 1, None, True, "divided among 2 ranks (Cannot split 2 rows"),
        (
            "AutoencoderKLCogVideoX",
            {},
            8,
            None,
            False,
            "the rows of a AutoencoderKLCogVideoX cannot be divided among ranks; write parallel_vae.tiling=yes",
        ),
        (
            "AutoencoderKLCogVideoX",
            {"tiling": True},
            8,
            {"height": 48, "width": 40},
            False,
            "covers 40 x 48 pixels, which leaves nothing to divide in a picture of 40 x 48; draw a larger one, or "
            "leave out parallel_vae.tiling.",
        ),
        ("AutoencoderKL", {"tiling": True}, 8, {"height": 16, "width": 16}, False, "or leave out parallel_vae.tiling."),
        (
            "AutoencoderTiny",
            {"tiling": True},
            8,
            None,
            False,
            "the tiles of a AutoencoderTiny cannot be dealt out to ranks; drop parallel_vae.",
        ),
    ],
)
def test_refused_by_every_rank(gloo, kind, settings, height, run, encode, sentence):
    for text in gloo.run(refused, kind, settings, height, run, encode, world=2):
        assert sentence in text


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (["parallel_vae"], {}, "parallel_vae has one rank to decode a picture on; add a plugin that brings more"),
        (
            ["parallel_vae", "usp"],
            {"usp.ulysses": 1, "usp.ring": 1},
            "has one rank to decode a picture on; add a plugin",
        ),
        (["parallel_vae", "dp"], {"dp.degree": 2}, "since each of the 2 draws pictures of its own"),
        (
            ["parallel_vae", "usp"],
            {"usp.ulysses": 2, "parallel_vae.degree": 0},
            "parallel_vae.degree=0 is below 1; give 1 or more",
        ),
        (
            ["parallel_vae", "usp", "dp"],
            {"usp.ulysses": 2, "dp.degree": 2, "parallel_vae.degree": 4},
            "parallel_vae.degree=4 but 2 ranks make a picture; give 1 to 2",
        ),
        (
            ["parallel_vae", "usp"],
            {"usp.ulysses": 4, "height": 12},
            "3 rows of tokens are too few to be decoded by 4 ranks",
        ),
    ],
)
def test_what_is_refused(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(plugins, str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)


def drawn(plugins, folder, settings):
    """On each rank: the pictures of two requests (None where there are none), bytes sent, groups made after set-up, and
    waits."""
    import numpy as np
    import torch.distributed as dist

    from xdit_core import Engine, Observer

    torch.set_num_threads(1)
    told, made, make = [], [], dist.new_group

    class Waits(Observer):
        def waiting(self, awaited):
            told.append(awaited.what)
            return super().waiting(awaited)

    engine = Engine(plan_for(plugins, folder, {"output_type": "image", "images": 2, **settings}), observer=Waits())
    dist.new_group = lambda *args, **kwargs: made.append(1) or make(*args, **kwargs)
    try:
        outputs = [engine.generate("a red fox", seed=seed).images for seed in (0, 5)]
    finally:
        dist.new_group = make
        engine.close()
    shown = [None if images is None else [np.asarray(i).astype(int) for i in images] for images in outputs]
    return shown, engine.rank.sent["vae"], len(made), [t for t in told if t.endswith("to decode")]


@pytest.mark.parametrize(
    ("plugins", "settings", "reference"),
    [
        (["usp"], {"usp.ulysses": 2, "usp.ring": 2, "height": 36}, {}),
        (["cfg", "usp", "dp"], {"usp.ulysses": 2, "dp.degree": 2, "parallel_vae.degree": 3}, {}),
        (
            ["pipefusion"],
            {"pipefusion.stages": 2, "pipefusion.patches": 2},
            {"pipefusion.stages": 1, "pipefusion.patches": 2},
        ),
    ],
)
def test_with_others(gloo, tiny_sd3_folder, plugins, settings, reference):
    folder = str(tiny_sd3_folder)
    plan = plan_for(["parallel_vae", *plugins], folder, settings)
    serial_settings = {**reference, **{k: v for k, v in settings.items() if k == "height"}}
    whole, *_ = drawn(["pipefusion"] if reference else [], folder, serial_settings)
    results = gloo.run(drawn, ["parallel_vae", *plugins], folder, settings, world=plan.world)
    assert results[0][0][0] is not None and [made for _, _, made, _ in results] == [0] * plan.world
    for mine, theirs in zip(results[0][0], whole, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.shape == b.shape and abs(a - b).max() <= 1
    members = [sent > 0 for _, sent, _, _ in results]
    assert members == ([True, True, True, False] * 2 if "dp" in plugins else [True] * plan.world)
    assert all(waits for _, sent, _, waits in results if sent)


def changed(folder, plugins, settings):
    """Picture to picture: the VAE encodes too."""
    import numpy as np
    from diffusers import StableDiffusion3Img2ImgPipeline
    from PIL import Image

    from xdit_core import Engine

    torch.set_num_threads(1)
    pipe = StableDiffusion3Img2ImgPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    plan = plan_for(plugins, folder, {"output_type": "image", **settings})
    engine = Engine(plan, pipe=pipe)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    images = engine.generate("a red fox", call={"image": picture, "strength": 0.5}).images
    engine.close()
    return (None if images is None else np.asarray(images[0]).astype(int)), dict(engine.rank.sent)


def test_picture_to_picture(gloo, tiny_sd3_folder):
    whole, _ = changed(str(tiny_sd3_folder), [], {})
    results = gloo.run(changed, str(tiny_sd3_folder), ["parallel_vae", "usp"], {"usp.ulysses": 2}, world=2)
    assert abs(results[0][0] - whole).max() <= 1
    decoding = gloo.run(drawn, ["parallel_vae", "usp"], str(tiny_sd3_folder), {"usp.ulysses": 2, "images": 1}, world=2)
    assert results[0][1]["vae"] > decoding[0][1] // 2  # of two requests
