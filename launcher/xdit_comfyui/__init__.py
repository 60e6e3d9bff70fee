"""Nodes for ComfyUI that have an xdit server draw. They need nothing beside what ComfyUI has.

Copy or link this folder into ``custom_nodes``, see docs/use/comfyui.md.
"""

from types import MappingProxyType

from .nodes import Edit, Generate, Video

NODE_CLASS_MAPPINGS = MappingProxyType({"XditGenerate": Generate, "XditEdit": Edit, "XditVideo": Video})
NODE_DISPLAY_NAME_MAPPINGS = MappingProxyType(
    {
        "XditGenerate": "xdit Generate (server)",
        "XditEdit": "xdit Edit (server)",
        "XditVideo": "xdit Video (server)",
    }
)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
