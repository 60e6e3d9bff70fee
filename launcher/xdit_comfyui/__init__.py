"""Nodes for ComfyUI that have an xdit server draw, which need nothing beside what ComfyUI has, and one that runs a
model's denoiser in a gang.

Copy or link this folder into ``custom_nodes``, see docs/use/comfyui.md.
"""

from types import MappingProxyType

from .nodes import Edit, Generate, LoadModel, Video

NODE_CLASS_MAPPINGS = MappingProxyType(
    {"XditGenerate": Generate, "XditEdit": Edit, "XditVideo": Video, "XditLoadModel": LoadModel}
)
NODE_DISPLAY_NAME_MAPPINGS = MappingProxyType(
    {
        "XditGenerate": "xdit Generate (server)",
        "XditEdit": "xdit Edit (server)",
        "XditVideo": "xdit Video (server)",
        "XditLoadModel": "xdit Load Model",
    }
)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
