"""The configurations that were published, built without values: the adapters fit every block, stages are balanced,
sizes can be planned.

``published.json`` holds them, with the number of values that a checkpoint stores (tables of positions included) and
what its authors say.
"""

from __future__ import annotations

import functools
import json
from fnmatch import fnmatch
from pathlib import Path

import pytest
from accelerate import init_empty_weights

from xdit_core import Registry, make_plan
from xdit_core.engine.loading import empty
from xdit_core.points.adapter_check import attention_kinds, check_adapter
from xdit_core.points.attention import AttentionPoint
from xdit_core.points.context import Running
from xdit_core.points.trunk import replace_blocks

CHECKPOINTS = {entry["name"]: entry for entry in json.loads(Path(__file__).with_name("published.json").read_text())}
BLOCKS = {n: e for n, e in CHECKPOINTS.items() if "unet" not in e["components"]}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A folder with the JSON files of a checkpoint and weight files without weights: what a plan reads."""

    @functools.cache
    def find(name):
        entry, folder = CHECKPOINTS[name], tmp_path_factory.mktemp("published")
        index = {c: ["x", part["class"]] for c, part in entry["components"].items()}
        (folder / "model_index.json").write_text(json.dumps({"_class_name": entry["pipeline"], **index}))
        for component, part in entry["components"].items():
            (folder / component).mkdir()
            (folder / component / "config.json").write_text(
                json.dumps({"_class_name": part["class"], **part["config"]})
            )
            header = b"{}      "
            weights = len(header).to_bytes(8, "little") + header
            (folder / component / "diffusion_pytorch_model.safetensors").write_bytes(weights)
        return folder

    return find


def spec_of(name):
    """The adapter of a checkpoint."""
    return Registry().model(CHECKPOINTS[name]["model"])[0]


def denoiser_of(name, folder):
    """Shapes only."""
    spec = spec_of(name)
    part = CHECKPOINTS[name]["components"][spec.checkpoint.denoiser]
    return empty(part["class"], folder / spec.checkpoint.denoiser)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_size(folder_of, name):
    entry = CHECKPOINTS[name]
    stored = sum(x.numel() for x in denoiser_of(name, folder_of(name)).state_dict().values())
    assert stored == entry["parameters"]
    number, unit = entry["published"].split()[:2]
    said = float(number) * {"billion": 1e9, "billion,": 1e9, "million,": 1e6}[unit]
    assert said * 0.84 < stored < said * 1.16


@pytest.mark.parametrize("name", BLOCKS)
def test_the_adapter_fits_every_block(folder_of, name):
    spec, denoiser = spec_of(name), denoiser_of(name, folder_of(name))
    check_adapter(spec, denoiser)
    if not spec.trunk.tp_plan:  # then the class has a plan of its own
        modules = {n for n, _ in denoiser.named_modules()}
        for pattern in type(denoiser)._tp_plan:
            assert any(fnmatch(n, pattern) for n in modules), f"{pattern} names nothing"
    config = CHECKPOINTS[name]["components"][spec.checkpoint.denoiser]["config"]
    with init_empty_weights():
        trunks = replace_blocks(denoiser, spec, Running(), AttentionPoint(Running(), []), [])
    held = [int(i) for trunk in trunks for i in trunk.blocks]
    assert held == list(range(sum(config[part.count] for part in spec.trunk.blocks)))
    for trunk in trunks:
        for block in trunk.blocks.values():
            assert attention_kinds(spec, block)


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_are_balanced(folder_of, name):
    for stages in range(2, 9):
        size = CHECKPOINTS[name]["sizes"][0]
        values = {
            "model": CHECKPOINTS[name]["model"],
            "model.path": str(folder_of(name)),
            "pipefusion.stages": stages,
            **size,
        }
        plan = make_plan(["pipefusion"], {**values, "device": "cpu"}, devices=stages)
        assert len(plan.split) == stages and sum(plan.split) == plan.facts.blocks
        assert max(plan.split) - min(plan.split) <= 1


@pytest.mark.parametrize(
    "plugins", [[], ["usp"], ["usp", "pipefusion"], ["cfg", "dp", "parallel_vae"], ["tp"]], ids="+".join
)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_sizes_that_users_ask_for(folder_of, name, plugins):
    entry = CHECKPOINTS[name]
    if "unet" in entry["components"] and {"usp", "tp"} & set(plugins):
        pytest.skip("no list of blocks")
    for size in entry["sizes"]:
        values = {
            "model": entry["model"],
            "model.path": str(folder_of(name)),
            "device": "cpu",
            "negative": None,
            **size,
        }
        if "cfg" in plugins:
            values |= {"guidance": 4.0}
        if "cfg" in plugins and entry["model"] == "flux":
            values |= {"negative": "blue", "call.true_cfg_scale": 4.0}
        if "cfg" in plugins and entry["model"] == "qwen_image":
            values |= {"negative": " "}
        plan = make_plan(plugins, {k: v for k, v in values.items() if v is not None}, devices=4)
        step = plan.facts.pixels_per_token
        assert plan.facts.rows * step == size["height"] and plan.facts.columns * step == size["width"]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("FLUX.1 dev", 4096),
        ("Z-Image-Turbo", 4096),
        ("CogVideoX-5b", 17550),
        ("Wan2.1 14B", 32760),
        ("Latte-1", 1024),
        ("DiT-XL/2 256", 256),
    ],
)
def test_number_of_tokens(folder_of, name, tokens):
    """Counts that are known from the papers; the frames of Latte are in its batch."""
    size = CHECKPOINTS[name]["sizes"][0]
    values = {"model": CHECKPOINTS[name]["model"], "model.path": str(folder_of(name)), "device": "cpu", **size}
    assert make_plan([], values).facts.tokens == tokens
