"""Compiled blocks give what eager ones give, are compiled once for their kind, and compose."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from xdit_core import Engine, PlanRefused, UsageError
from xdit_core.testing import assert_close
from xdit_core.testing.runs import diffusers_latents, generate, plan_for

EAGER = {"compile.backend": "eager"}


@pytest.mark.parametrize(
    "settings",
    [EAGER, {"compile.backend": "aot_eager"}, {**EAGER, "compile.scope": "transformer", "compile.fullgraph": "no"}],
)
def test_equals_serial(tiny_sd3_folder, settings):
    torch._dynamo.reset()
    latents, _ = generate(["compile"], str(tiny_sd3_folder), settings)
    assert_close(latents, diffusers_latents(str(tiny_sd3_folder)))


@pytest.mark.slow
def test_inductor(tiny_sd3_folder):
    torch._dynamo.reset()
    latents, _ = generate(["compile"], str(tiny_sd3_folder))
    assert_close(latents, diffusers_latents(str(tiny_sd3_folder)))


def compiled(folder, plugins, settings, sizes=((32, 32),)):
    """Graphs made, seconds of compiling by request, latents by request."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine, seconds, latents = Engine(plan_for(plugins, folder, {**EAGER, **settings})), [], []
    for height, width in sizes:
        output = engine.generate("a red fox", height=height, width=width)
        seconds.append(output.seconds.get("compile", 0.0))
        latents.append(output.latents)
    engine.close()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], seconds, latents


def test_blocks_of_a_kind_are_compiled_once(tmp_path):
    """Of 6 blocks, 5 are of one kind and the last puts out no text: two graphs."""
    from xdit_core.testing.models import save_tiny_sd3

    folder = str(save_tiny_sd3(tmp_path / "deep", layers=6))
    graphs, seconds, latents = compiled(folder, ["compile"], {}, ((32, 32), (32, 32)))
    assert graphs == 2
    assert seconds[0] > 0 and seconds[1] == 0  # reported apart from the run, and only once
    assert_close(latents[0], diffusers_latents(folder))
    assert torch.equal(latents[0], latents[1])


def test_requests_of_several_sizes(tiny_sd3_folder):
    sizes = ((32, 32), (24, 32), (20, 44), (32, 32))
    graphs, _, latents = compiled(str(tiny_sd3_folder), ["compile"], {}, sizes)
    assert graphs <= 4  # one for the first size, one for any other, of two kinds of block
    for (height, width), mine in zip(sizes, latents, strict=True):
        assert_close(mine, diffusers_latents(str(tiny_sd3_folder), height=height, width=width))


@pytest.mark.parametrize(
    ("plugins", "settings", "world"),
    [
        (["usp"], {"usp.ulysses": 2, "usp.ring": 2}, 4),
        (["cfg"], {}, 2),
        (["tp"], {"tp.degree": 2}, 2),
        (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 8, "pipefusion.warmup": 0}, 2),
        (["pipefusion", "usp"], {"pipefusion.stages": 2, "pipefusion.patches": 3, "usp.ulysses": 2, "usp.ring": 1}, 4),
        (["distrifusion"], {"distrifusion.degree": 3}, 3),
    ],
)
def test_with_others(gloo, tiny_sd3_folder, plugins, settings, world):
    plan = plan_for(plugins, str(tiny_sd3_folder), settings)
    if plan.displaced:
        want, _ = generate(list(plan.displaced), str(tiny_sd3_folder), plan.reference)
    else:
        want = diffusers_latents(str(tiny_sd3_folder))
    for graphs, _, latents in gloo.run(
        compiled, str(tiny_sd3_folder), ["compile", *plugins], settings, world=world, timeout=300
    ):
        assert_close(latents[0], want)
        assert graphs <= 8  # two kinds of block, with and without text, the first size and any


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (["compile"], {"compile.scope": "all"}, "compile.scope=all is unknown; use one of blocks, transformer"),
        (["compile"], {"compile.mode": "fast"}, "compile.mode=fast is unknown; use one of default"),
        (["compile"], {"compile.mode": "default", "compile.backend": "eager"}, "compile.mode belongs to inductor"),
        (
            ["compile", "usp"],
            {"compile.scope": "transformer"},
            "usp works between them; use compile.scope=blocks, or drop usp",
        ),
    ],
)
def test_what_is_refused(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(plugins, str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)


def test_an_unknown_backend(tiny_sd3_folder):
    with pytest.raises(UsageError, match=r"compile.backend=inducto is unknown to torch; did you mean inductor\?"):
        Engine(plan_for(["compile"], str(tiny_sd3_folder), {"compile.backend": "inducto"}))


def sizes_under_tp(folder):
    """Graphs made, and latents of requests of several sizes and numbers of pictures, on divided matrices."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = Engine(plan_for(["compile", "tp"], folder, {**EAGER, "tp.degree": 2}))
    requests = [(2, 32), (1, 48), (1, 16)]
    latents = [engine.generate("a red fox", images=n, height=height, width=32).latents for n, height in requests]
    engine.close()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"], requests, latents


def test_divided_matrices_are_compiled_for_all_sizes(gloo, tiny_sd3_folder):
    for graphs, requests, latents in gloo.run(sizes_under_tp, str(tiny_sd3_folder), world=2):
        assert graphs <= 6  # two kinds of block: the first size, any other, one picture
        for (images, height), found in zip(requests, latents, strict=True):
            assert_close(
                found, diffusers_latents(str(tiny_sd3_folder), height=height, width=32, num_images_per_prompt=images)
            )
