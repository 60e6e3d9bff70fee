"""Checkpoint folders that are damaged, odd or dangerous: a sentence that names the file, never numbers from nowhere or
a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from xdit_core import ModelError, PluginError
from xdit_core.engine.engine import Engine
from xdit_core.testing.runs import generate, plan_for

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tiny_sd3_folder, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(tiny_sd3_folder, tmp_path / "m")


def change(file, **values):
    """Other values in a JSON file; None drops a key."""
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps(config))


def plan(folder):
    return plan_for([], str(folder))


def load(folder):
    return Engine(plan(folder))


def sharded(component, stem, tensors):
    """An index and its two files."""
    names = sorted(tensors)
    where = {name: f"{stem}-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n].contiguous() for n in names if where[n] == file}, component / file, {"format": "pt"})
    (component / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_single_file_and_index(folder, component):
    """diffusers takes the shards, transformers the single file; so do we."""
    import diffusers

    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    single = load_file(folder / component / f"{stem}.safetensors")
    sharded(folder / component, stem, {name: tensor * 1.5 for name, tensor in single.items()})
    mine = getattr(load(folder).pipe, component).state_dict()
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    for name, tensor in getattr(theirs, component).state_dict().items():
        assert torch.equal(mine[name], tensor), name


def test_a_pickle_beside_safetensors_is_never_opened(folder):
    want = generate([], str(folder))[0]
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    assert torch.equal(generate([], str(folder))[0], want)


def test_pickles_only(folder):
    """The advice of torch is to switch safety off; ours is to convert the checkpoint."""
    file = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), folder / "text_encoder" / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(
        ModelError, match=r"text_encoder has its weights only as pytorch_model.bin, a pickle.*convert .*save_pretrained"
    ):
        plan(folder)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_no_weights_or_another_variant(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    other = file.rename(file.with_name(file.stem + ".fp16.safetensors"))
    with pytest.raises(ModelError, match=f"{component} holds {other.name} but no {file.name}; rename it"):
        plan(folder)
    other.unlink()
    with pytest.raises(ModelError, match=f"{component} holds no {file.name}; fetch the model again"):
        plan(folder)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "..\\x.safetensors"]
)
def test_an_index_that_points_outside(folder, name):
    (folder / "secret.safetensors").write_bytes((folder / "transformer" / WEIGHTS).read_bytes())
    (folder / "transformer" / (WEIGHTS + ".index.json")).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="which is not a file in its own folder; such an index is not to be trusted"):
        plan(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_files(folder, index):
    (folder / "transformer" / (WEIGHTS + ".index.json")).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="has no weight_map that names the files"):
        plan(folder)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2", "vae"])
def test_a_component_that_lacks_tensors(folder, component):
    """Libraries put random numbers in their place, or leave them without memory."""
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    gone = sorted(name for name in tensors if not name.endswith("position_ids"))[3]
    del tensors[gone]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ModelError, match=rf"{component} lacks 1 tensor that its config.json asks for: {gone}; fetch the model again"
    ):
        load(folder)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae"])
def test_a_tensor_of_the_wrong_shape(folder, component):
    (file,) = (folder / component).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(
        n
        for n, t in tensors.items()
        if (n.endswith("weight") and t.dim() == 2) or (component == "vae" and t.dim() == 4)
    )[0]
    shape = list(tensors[name].shape)
    tensors[name] = torch.zeros(shape[0] + 1, *shape[1:])
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(folder)
    for part in (name, str(file), str([shape[0] + 1, *shape[1:]]), str(shape)):
        assert part in str(error.value)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize(
    ("config", "method"),
    [({"quant_method": "bitsandbytes"}, "bitsandbytes"), ({"bits": 4}, "unnamed"), ("gptq", "unnamed")],
)
def test_quantized_weights(folder, component, config, method):
    """They were read as if they were plain numbers."""
    change(folder / component / "config.json", quantization_config=config)
    with pytest.raises(
        ModelError, match=rf"{component} are quantized \(.*{method}.*\).*pipe.{component}.dequantize\(\)"
    ):
        plan(folder)


ODD = ["4", None, [], {}, True, -1, 0, 1.5, 10**9, 10**30, float("nan")]


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize(
    "key", ["num_layers", "num_attention_heads", "patch_size", "attention_head_dim", "sample_size", "in_channels"]
)
def test_odd_numbers_of_the_denoiser(folder, key, value):
    """A sentence, at the plan or while loading, and soon: a huge number of blocks is not built first."""
    change(folder / "transformer" / "config.json", **{key: value})
    if key in ("num_attention_heads", "patch_size", "attention_head_dim", "in_channels") and value in (10**9, 10**30):
        return  # below
    try:
        load(folder)
    except ModelError as error:
        assert "config.json" in str(error) or "config files" in str(error)
    else:
        assert key == "sample_size"  # the pipeline falls back on its own


@pytest.mark.parametrize("key", ["num_attention_heads", "attention_head_dim", "in_channels"])
def test_huge_numbers_of_the_denoiser(folder, key):
    change(folder / "transformer" / "config.json", **{key: 10**30})
    with pytest.raises(ModelError, match=r"config.json"):
        load(folder)


@pytest.mark.parametrize("value", ["8", None, [], 4, {"a": 1}, [0], ["8", "8"]], ids=str)
def test_odd_numbers_of_the_vae(folder, value):
    change(folder / "vae" / "config.json", block_out_channels=value)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size"])
@pytest.mark.parametrize("value", ["x", None, [], -1], ids=str)
def test_odd_numbers_of_a_text_encoder(folder, key, value):
    change(folder / "text_encoder" / "config.json", **{key: value})
    with pytest.raises((ModelError, PluginError), match=r"text_encoder|config files"):
        load(folder)


@pytest.mark.parametrize(
    "entry", [[], ["diffusers"], ["diffusers", None], ["diffusers", 7], ["diffusers", "A", "B"], [7, "A"]], ids=str
)
def test_odd_entries_of_the_index(folder, entry):
    change(folder / "model_index.json", transformer=entry)
    with pytest.raises(ModelError, match=r"model_index.json has transformer=.*not a library and a class"):
        plan(folder)


@pytest.mark.parametrize("entry", [["diffusers", "Nope"], ["diffusers", "DDIMScheduler"], ["os", "path"]], ids=str)
def test_a_denoiser_of_an_odd_class(folder, entry):
    change(folder / "model_index.json", transformer=entry)
    with pytest.raises(ModelError, match="which is no model of diffusers"):
        load(folder)


def test_deep_json(folder):
    (folder / "transformer" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is not valid JSON"):
        plan(folder)


def test_loading_says_nothing(tiny_sd3_folder, capfd):
    """No bars and no warnings of libraries; what they say at other times is as before."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    plan(tiny_sd3_folder)
    capfd.readouterr()
    load(tiny_sd3_folder)
    assert capfd.readouterr() == ("", "")
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before


def test_the_first_loading_of_a_process_says_nothing(tiny_sd3_folder):
    """diffusers and transformers are imported by it, and tell of what is not installed."""
    code = (
        "from xdit_core import Engine, make_plan\n"
        f"Engine(make_plan([], {{'model': 'sd3', 'model.path': {str(tiny_sd3_folder)!r}, 'device': 'cpu'}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
