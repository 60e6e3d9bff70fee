"""A MODEL of ComfyUI whose denoiser runs in a gang: samplers, schedulers, guidance and conditioning stay ComfyUI's, and
every call of the denoiser goes to ranks of xdit. Needs xdit in ComfyUI's Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .arguments import FAMILIES

if TYPE_CHECKING:
    from xdit_launcher.gang.gang import Gang

LATENT_CHANNELS = 16
LORAS = "a LoRA node cannot reach the ranks of this model; write the file as lora= in the settings of xdit Load Model."


class ModelError(Exception):
    """What cannot be done with a model in a gang: a sentence with the fix."""


class Ranks:
    """A gang that is started when it is needed, and again if it has ended.

    Args:
        start: starts it.
    """

    def __init__(self, start: Callable[[], Gang]) -> None:
        self._start, self._gang = start, start()

    @property
    def gang(self) -> Gang:
        """The gang, alive."""
        if not self._gang.alive:
            self._gang = self._start()
        return self._gang

    def __del__(self) -> None:
        if hasattr(self, "_gang"):
            self._gang.close()


def start_gang(family: str, path: str, plugins: str, settings: str, folder: Path) -> Gang:
    """Start a gang.

    Args:
        family: one of ``FAMILIES``.
        path: folder or hub id of the checkpoint, "" for the usual one.
        plugins: names of strategies, with commas.
        settings: words ``name=value``.
        folder: for its run folder.

    Raises:
        ModelError: xdit is missing, or a word is no setting.
        XditError: the plan is refused, or the ranks do not start.
    """
    try:
        from xdit_core.planning.planner import make_plan
        from xdit_core.planning.single_call import check_single_call
        from xdit_launcher.backends import registry
        from xdit_launcher.gang.gang import Gang
    except ImportError as error:
        raise ModelError(f"xdit is not in ComfyUI's Python ({error}); run pip install xdit with it.") from error
    words = [word.partition("=") for word in settings.split()]
    for name, sign, _ in words:
        if not sign:
            raise ModelError(f"{name} is no setting; write name=value, such as usp.ulysses=2.")
        if name.startswith("model.") or name in ("model", "runs"):  # a workflow may come from somebody else
            raise ModelError(f"{name}= cannot be set in a workflow; leave it out.")
    place = {"model": family, **({"model.path": path} if path else {}), "runs": str(folder)}
    names = [name.strip() for name in plugins.split(",") if name.strip()]
    backend, values = registry.choose(None, {}, {**place, **{name: value for name, _, value in words}})
    plan = make_plan(names, values, devices=backend.devices())
    check_single_call(plan)
    return Gang(plan=plan, backend=backend)


class GangDenoiser(nn.Module):
    """Takes the place of the denoiser in a model of ComfyUI.

    Args:
        ranks: that compute.
        family: one of ``FAMILIES``.
        config: of the denoiser in diffusers.
    """

    patch_size = 2

    def __init__(self, ranks: Ranks, family: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._ranks, self._to, self._from, self._known = ranks, *FAMILIES[family]
        if not config.get("guidance_embeds"):
            self._known = tuple(name for name in self._known if name != "guidance")
        self.dtype = getattr(torch, ranks.gang.plan.dtype)
        # ComfyUI reads from the shape of this weight whether pictures are joined to the latents
        shape = (0, config["in_channels"] if family == "wan" else LATENT_CHANNELS)
        self.patch_embedding = SimpleNamespace(weight=SimpleNamespace(shape=shape))

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """Predict, as ComfyUI's own denoiser does.

        Raises:
            ModelError: something of the workflow cannot be honoured.
        """
        options = transformer_options or {}
        unknown = [name for name, value in conditions.items() if value is not None and name not in ("y", "guidance")]
        unknown += [name for name in ("patches", "patches_replace") if options.get(name)]
        if unknown or control is not None:
            what = ", ".join(unknown) or "a ControlNet"
            raise ModelError(f"a model that runs in a gang does not take {what}; remove the node that gives it.")
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        prediction: torch.Tensor = run.execute(x, timestep, context, **conditions)
        return prediction

    def _forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor, *args: Any, **conditions: Any
    ) -> torch.Tensor:
        from safetensors.torch import load, save

        known = {name: conditions[name].cpu() for name in self._known if conditions.get(name) is not None}
        here = x.cpu()
        arguments, grid = self._to(here, timestep.cpu(), context.cpu(), known)
        data = save({name: tensor.contiguous() for name, tensor in arguments.items()})
        prediction = load(self._ranks.gang.predict(data, grid))["prediction"]
        return self._from(prediction, here).to(x.device, x.dtype)


def load_model(family: str, path: str, plugins: str, settings: str) -> Any:
    """Make a MODEL; arguments as of `start_gang`."""
    import folder_paths
    from comfy import model_management, supported_models
    from comfy.model_patcher import ModelPatcher

    folder = Path(folder_paths.get_temp_directory()) / "xdit"
    ranks = Ranks(lambda: start_gang(family, path, plugins, settings, folder))
    config = json.loads((Path(ranks.gang.plan.folder) / "transformer" / "config.json").read_text(encoding="utf-8"))
    if family == "flux":
        kind = supported_models.Flux if config.get("guidance_embeds") else supported_models.FluxSchnell
        about = {"image_model": "flux", "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS}
    else:
        kind, about = supported_models.WAN21_T2V, {"image_model": "wan2.1", "model_type": "t2v"}
    model = kind({**about, "disable_unet_model_creation": True}).get_model({}, device=torch.device("cpu"))
    model.diffusion_model = GangDenoiser(ranks, family, config)
    model.memory_required = lambda *args, **more: 0  # of this process

    def refuse(*args: Any, **more: Any) -> Any:
        raise ModelError(LORAS)

    patcher = type("GangPatcher", (ModelPatcher,), {"add_patches": refuse, "add_hook_patches": refuse})
    return patcher(model, model_management.get_torch_device(), torch.device("cpu"))
