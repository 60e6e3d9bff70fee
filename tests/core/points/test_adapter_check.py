"""What the class of a denoiser can confirm of its adapter is looked at when a rank loads it; each mistake has its
sentence."""

from __future__ import annotations

import re

import pytest

from xdit_core import Aligned, Blocks, Engine, ModelError, Registry, Stream
from xdit_core.testing.runs import changed_record, plan_for

BLOCKS = "transformer_blocks"
FITS = "adapter sd3 does not fit SD3Transformer2DModel: "
LAST = "adapter sd3 does not fit JointTransformerBlock: "
NO_ARGUMENT = "is no argument of SD3Transformer2DModel.forward; did you mean"
NO_BLOCK_ARGUMENT = "is no argument of JointTransformerBlock.forward; did you mean"

# A field of the adapter of SD3, another value, and the sentence that follows.
WRONG = {
    "latents": (
        "latents.argument",
        "hidden_state",
        f"{FITS}latents.argument='hidden_state' {NO_ARGUMENT} hidden_states?",
    ),
    "text": (
        "text.input",
        "prompt",
        f"{FITS}text.input='prompt' is no argument of SD3Transformer2DModel.forward; known are",
    ),
    "skipped layers": (
        "trunk.skip_layers",
        "skip_layer",
        f"{FITS}trunk.skip_layers='skip_layer' {NO_ARGUMENT} skip_layers?",
    ),
    "forced argument": ("trunk.forced_args", {"time": 1}, f"{FITS}trunk.forced_args='time' {NO_ARGUMENT} timestep?"),
    "unbatched argument": ("unbatched_args", ("rotary",), f"{FITS}unbatched_args='rotary' is no argument of"),
    "unsupported argument": ("unsupported", {"ip": "no"}, f"{FITS}unsupported='ip' is no argument of"),
    "block list": (
        "trunk.blocks",
        (Blocks("transformer_block", "num_layers"),),
        f"{FITS}trunk.blocks[0].attribute='transformer_block' is no list of blocks; did you mean transformer_blocks?",
    ),
    "second block list": (
        "trunk.blocks",
        (Blocks(BLOCKS, "num_layers", beside=("temporal",)),),
        f"{FITS}trunk.blocks[0].beside='temporal' is no list of blocks; known are transformer_blocks.",
    ),
    "length": (
        "trunk.blocks",
        (Blocks(BLOCKS, "patch_size"),),
        f"{FITS}trunk.blocks[0].count='patch_size' is 2 in its config, and transformer_blocks has 4 blocks; 4 is the "
        "value of in_channels, num_attention_heads, num_layers",
    ),
    "tokens": ("trunk.stream.tokens", "x", f"{FITS}trunk.stream.tokens='x' is no argument of JointTransformerBlock"),
    "text of a block": (
        "trunk.stream.text",
        "encoder_states",
        f"{FITS}trunk.stream.text='encoder_states' {NO_BLOCK_ARGUMENT} encoder_hidden_states?",
    ),
    "skip": ("trunk.stream.skip", "skip", f"{FITS}trunk.stream.skip='skip' is no argument of JointTransformerBlock"),
    "frames": ("trunk.stream.frames", "frames", f"{FITS}trunk.stream.frames='frames' is no argument of"),
    "rotary table": (
        "trunk.stream.image_aligned",
        (Aligned("tem"),),
        f"{FITS}trunk.stream.image_aligned[0].argument='tem' {NO_BLOCK_ARGUMENT} temb?",
    ),
    "stream of a list": (
        "trunk.blocks",
        (Blocks(BLOCKS, "num_layers", stream=Stream("x")),),
        f"{FITS}trunk.blocks[0].stream.tokens='x' is no argument of JointTransformerBlock",
    ),
    "an unknown part": (
        "trunk.stream.returns",
        ("texts", "tokens"),
        f"{FITS}trunk.stream.returns=('texts', 'tokens') has 'texts'; did you mean text?",
    ),
    "no tokens": ("trunk.stream.returns", ("text",), f"{FITS}trunk.stream.returns=('text',) does not name tokens"),
    "text from nowhere": (
        "trunk.stream",
        Stream(returns=("text", "tokens")),
        f"{FITS}trunk.stream.returns=('text', 'tokens') has text, and trunk.stream.text names no argument",
    ),
    "linear layer": (
        "trunk.tp_plan",
        {"transformer_blocks.*.attn.to_qkv": "colwise"},
        f"{FITS}trunk.tp_plan='transformer_blocks.*.attn.to_qkv' names no submodule; did you mean "
        "transformer_blocks.*.attn.to_",
    ),
    "no plan of the class": ("trunk.tp_plan", {}, f"{FITS}trunk.tp_plan={{}} stands for the plan of the class, which"),
    "embedding": (
        "caching.embeddings",
        ("pos_embedding",),
        f"{FITS}caching.embeddings='pos_embedding' names no submodule; did you mean pos_embed?",
    ),
    "conditioning": (
        "caching.conditioning",
        ("nothing_like_it",),
        f"{FITS}caching.conditioning='nothing_like_it' names no submodule; correct it, or leave it out.",
    ),
    "shared submodule": (
        "trunk.shared_submodules",
        ("norm1.embed",),
        f"{FITS}trunk.shared_submodules='norm1.embed' names no submodule",
    ),
    "long skip to an earlier block": (
        "trunk.long_skips",
        lambda blocks: {1: 2},
        f"{FITS}trunk.long_skips={{1: 2}} leads from block 2 to block 1 of 4.",
    ),
    "long skip without an argument": (
        "trunk.long_skips",
        lambda blocks: {3: 0},
        f"{FITS}trunk.long_skips={{3: 0}} needs trunk.stream.skip, the argument that takes the tokens.",
    ),
    "kind of attention": (
        "trunk.attention",
        lambda block: ("joined",),
        f"{LAST}trunk.attention=('joined',) has 'joined'; did you mean joint?",
    ),
    "number of values": (
        "trunk.stream.returns",
        ("tokens",),
        f"{LAST}trunk.stream.returns=('tokens',) names 1, and the block returned 2 values.",
    ),
    "order of values": (
        "trunk.stream.returns",
        ("tokens", "text"),
        f"{LAST}trunk.stream.returns=('tokens', 'text') names tokens where the block returned a value of shape",
    ),
}


def generate(folder, spec):
    """One step with that adapter, through a trunk."""
    models = {"extra_models": {"sd3": spec}}
    plan = plan_for(["pipefusion"], str(folder), {"pipefusion.stages": 1}, **models)
    return Engine(plan, Registry(**models)).generate("a red fox", steps=1)


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_has_its_sentence(tiny_sd3_folder, mistake):
    path, value, sentence = WRONG[mistake]
    spec = changed_record(Registry().model("sd3")[0], path, value)
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)}"):
        generate(tiny_sd3_folder, spec)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trunk.heads", "num_head"),
        ("trunk.blocks", (Blocks(BLOCKS, "num_head"),)),
        ("latents.patch_size", "num_head"),
    ],
)
def test_a_key_that_the_config_lacks(tiny_sd3_folder, path, value):
    field = "trunk.blocks[0].count" if path == "trunk.blocks" else path
    spec = changed_record(Registry().model("sd3")[0], path, value)
    sentence = f"transformer/config.json has no num_head, which adapter sd3 names as {field}; choose the model"
    with pytest.raises(ModelError, match=f"^{re.escape(sentence)}"):
        generate(tiny_sd3_folder, spec)


def test_a_made_block_takes_what_it_is_given(tiny_sd3_folder):
    spec = changed_record(Registry().model("sd3")[0], "trunk.stream.frames", "frames")
    made = (Blocks(BLOCKS, "num_layers", make=lambda denoiser, index, block: block),)
    with pytest.raises(ModelError, match=r"trunk\.stream\.frames='frames' is no argument of JointTransformerBlock"):
        generate(tiny_sd3_folder, changed_record(spec, "trunk.blocks", made))


def test_an_installed_adapter_is_named_with_its_package(tiny_sd3_folder):
    spec = Registry().model("sd3")[0]
    assert re.fullmatch(r"adapter sd3 of xdit \d.*", spec.owner)
    assert generate(tiny_sd3_folder, spec).latents.isfinite().all()
