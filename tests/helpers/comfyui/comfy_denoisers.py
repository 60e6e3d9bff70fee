"""A script for ComfyUI's Python: ComfyUI's own denoisers against those of diffusers with the same weights, which get
the arguments that our node makes.

Run it with ``--cpu``, ComfyUI and our nodes being in PYTHONPATH. It prints for each family the largest difference and
the largest value.
"""

import json

import comfy.options
import torch


def randomized(model):
    """The model with small random weights."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def made():
    """How ComfyUI makes a denoiser."""
    import comfy.ops

    return {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}


def compare_flux():
    import comfy.ldm.flux.model
    import comfy.utils
    from diffusers import FluxTransformer2DModel

    from xdit_comfyui.arguments import flux, from_flux

    theirs = randomized(
        FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    )
    sizes = {"hidden_size": 64, "depth": 2, "depth_single_blocks": 2}
    own = comfy.ldm.flux.model.Flux(
        **{"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 20, **sizes},
        **{"context_in_dim": 24, "mlp_ratio": 4.0, "num_heads": 4, "axes_dim": [4, 6, 6], "theta": 10000},
        **{"qkv_bias": True, "guidance_embed": True, **made()},
    )
    weights, target = theirs.state_dict(), own.state_dict()
    for name, place in comfy.utils.flux_to_diffusers(sizes, output_prefix="").items():
        if name in weights:
            key, part, *change = (place, None) if isinstance(place, str) else place
            value = change[0](weights[name]) if change else weights[name]
            (target[key] if part is None else target[key].narrow(*part)).copy_(value)
    x, t, context = torch.randn(2, 16, 11, 14), torch.tensor([0.3, 0.8]), torch.randn(2, 9, 24)
    given = {"y": torch.randn(2, 20), "guidance": torch.tensor([3.5])}
    arguments, _ = flux(x, t, context, given)
    return own.eval()(x, t, context, **given), from_flux(theirs(**arguments, return_dict=False)[0], x)


def compare_wan():
    import comfy.ldm.wan.model
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    from xdit_comfyui.arguments import from_wan, wan

    own = randomized(
        comfy.ldm.wan.model.WanModel(
            **{"model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 9, "in_dim": 16, "dim": 48, "ffn_dim": 64},
            **{"freq_dim": 32, "text_dim": 24, "out_dim": 16, "num_heads": 4, "num_layers": 2, **made()},
        )
    )
    theirs = WanTransformer3DModel(
        **{"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 24},
        **{"freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64},
    )
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(dict(own.state_dict())))
    x, t, context = torch.randn(2, 16, 3, 7, 10), torch.tensor([300.0, 871.0]), torch.randn(2, 9, 24)
    arguments, _ = wan(x, t, context, {})
    return own(x, t, context), from_wan(theirs.eval()(**arguments, return_dict=False)[0], x)


comfy.options.enable_args_parsing()
torch.manual_seed(0)
with torch.no_grad():
    pairs = {"flux": compare_flux(), "wan": compare_wan()}
print(json.dumps({name: [float((a - b).abs().max()), float(a.abs().max())] for name, (a, b) in pairs.items()}))
