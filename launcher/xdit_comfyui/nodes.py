"""The nodes, as ComfyUI describes them: names and types of inputs and outputs, and the method that it calls."""

from __future__ import annotations

from typing import Any

import torch

from . import client
from .arguments import FAMILIES
from .client import Server, ServerError
from .drawing import draw, edit
from .model import load_model
from .pictures import frames_of, image_of, png_of, png_of_mask

MOST_SEED = 2**53 - 1  # a browser counts no further
MOST_PREVIEWS = 20
Inputs = dict[str, Any]


def text(tooltip: str, **more: Any) -> tuple[str, Inputs]:
    """An input for text."""
    return "STRING", {"default": "", "tooltip": tooltip, **more}


def number(tooltip: str, most: int, default: int = 0, **more: Any) -> tuple[str, Inputs]:
    """An input for a whole number from 0 on."""
    return "INT", {"default": default, "min": 0, "max": most, "tooltip": tooltip, **more}


def server_input() -> Inputs:
    """Where the server is."""
    known = client.addresses()
    return {"server": text("address of xdit-launch serve", default=known[0] if known else client.DEFAULT_ADDRESS)}


def drawing_inputs() -> Inputs:
    """What to draw, and how."""
    return {
        "prompt": text("what to draw", multiline=True, dynamicPrompts=True),
        "negative": text("what to keep out of the picture; needs guidance above 1", multiline=True),
        "seed": number("seed of the noise; the next picture has the next one", MOST_SEED, control_after_generate=True),
        "steps": number("denoising steps; 0 is the server's default", 10_000),
        "guidance": (
            "FLOAT",
            {
                **{"default": -1.0, "min": -1.0, "max": 100.0, "step": 0.1},
                "tooltip": "classifier-free guidance scale; -1 is the server's default",
            },
        ),
        "width": number("pixels; 0 is the server's default", 16_384, step=8),
        "height": number("pixels; 0 is the server's default", 16_384, step=8),
    }


def key_input() -> Inputs:
    """Where the key is."""
    tooltip = f"environment variable of ComfyUI with the key; its name begins with {client.OURS}"
    return {"key_variable": text(tooltip, default=client.KEY)}


def watching_inputs() -> Inputs:
    """What is shown meanwhile, the key, and what else the server may have."""
    return {
        "previews": number("how many previews of each picture are shown", MOST_PREVIEWS, 5),
        **key_input(),
        "lora": text("LoRAs of the server with their scales, such as ink:0.8,wash:0.5"),
    }


def images_input() -> dict[str, Any]:
    """How many pictures."""
    return {"images": number("how many pictures", 1000, 1, min=1)}


def settings(guidance: float, **values: Any) -> dict[str, Any]:
    """Fields of a request: those that are 0 or empty are the server's default and left out."""
    chosen = {name: value for name, value in values.items() if value}
    return {**chosen, **({} if guidance < 0 else {"guidance": guidance})}


class Node:
    """What the nodes have in common."""

    CATEGORY = "xdit"
    FUNCTION = "run"


class Drawing(Node):
    """Have a server draw, and show how far it is."""

    VIDEO = False

    @classmethod
    def count(cls) -> dict[str, Any]:
        """The input that says how much is drawn."""
        return images_input()

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Names, types and defaults of the inputs."""
        return {
            "required": {**server_input(), **drawing_inputs(), **cls.count()},
            "optional": watching_inputs(),
            "hidden": {"node": "UNIQUE_ID"},
        }

    def run(
        self,
        server: str,
        prompt: str,
        seed: int,
        previews: int = 0,
        key_variable: str = client.KEY,
        node: str | None = None,
        **values: Any,
    ) -> tuple[Any, ...]:
        """Draw.

        Returns:
            The outputs in ``RETURN_TYPES``.

        Raises:
            ServerError: a sentence that says what to do.
        """
        body = {"prompt": prompt, "seed": seed, "previews": previews, **settings(**values)}
        _, files = draw(Server(server, key_variable), body, self.VIDEO, node)
        return frames_of(files[0]) if self.VIDEO else (image_of(files),)


class Generate(Drawing):
    """Draw pictures on a server."""

    DESCRIPTION = "Draws pictures on a server that xdit-launch serve has started."
    RETURN_TYPES = ("IMAGE",)


class Video(Drawing):
    """Draw a video on a server: a picture for each frame, and frames per second."""

    DESCRIPTION = "Draws a video on a server that xdit-launch serve has started."
    RETURN_TYPES = ("IMAGE", "FLOAT")
    RETURN_NAMES = ("frames", "fps")
    VIDEO = True

    @classmethod
    def count(cls) -> dict[str, Any]:
        """The input that says how much is drawn."""
        return {"frames": number("how many frames; 0 is the server's default", 10_000)}


class Edit(Node):
    """Edit pictures on a server."""

    DESCRIPTION = "Edits pictures on a server that xdit-launch serve has started, if its model takes pictures."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Names, types and defaults of the inputs."""
        return {
            "required": {**server_input(), "image": ("IMAGE",), **drawing_inputs(), **images_input()},
            "optional": {"mask": ("MASK", {"tooltip": "1 where the picture is to be changed"}), **key_input()},
        }

    def run(
        self,
        server: str,
        image: torch.Tensor,
        prompt: str,
        seed: int,
        width: int = 0,
        height: int = 0,
        images: int = 1,
        mask: torch.Tensor | None = None,
        key_variable: str = client.KEY,
        **values: Any,
    ) -> tuple[torch.Tensor]:
        """Edit.

        Returns:
            IMAGE.

        Raises:
            ServerError: a sentence that says what to do.
        """
        if bool(width) != bool(height):
            raise ServerError("width and height go together; give both, or leave both at 0.")
        size = {"size": f"{width}x{height}"} if width else {}
        fields = {"prompt": prompt, "seed": seed, "n": images, **size, **settings(**values)}
        files = [("image[]", png_of(picture)) for picture in image]
        if mask is not None:
            files.append(("mask", png_of_mask(mask)))
        return (image_of(edit(Server(server, key_variable), fields, files)),)


class LoadModel(Node):
    """A model whose denoiser runs in a gang."""

    DESCRIPTION = "Loads a denoiser onto several ranks of xdit, for ComfyUI's samplers. Needs xdit in ComfyUI's Python."
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Names, types and defaults of the inputs."""
        return {
            "required": {
                "family": (list(FAMILIES), {"default": "flux", "tooltip": "kind of the model"}),
                "path": text("folder or hub id of a checkpoint of diffusers; empty is the usual one"),
                "plugins": text("strategies that divide a single call of the denoiser", default="usp"),
                "settings": text("as on the command line, such as usp.ulysses=2 lora=style.safetensors"),
            }
        }

    def run(self, family: str, path: str, plugins: str, settings: str) -> tuple[Any]:
        """Load.

        Returns:
            MODEL.

        Raises:
            ModelError, XditError: a sentence that says what to do.
        """
        return (load_model(family, path.strip(), plugins, settings),)
