"""What a client may ask for, each limit with its sentence, and the errors that it gets. Without torch."""

from __future__ import annotations

import io
import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdit_core.checkpoints.model_facts import pipeline_class
from xdit_core.errors import UsageError, XditError
from xdit_core.planning.requests import plan_of_request
from xdit_core.printable import printable
from xdit_core.registry.registry import Registry
from xdit_core.settings import build, did_you_mean, fields_of
from xdit_launcher.gang.loras import AllowedLoras

if TYPE_CHECKING:
    from xdit_core.plan import Plan

PREFIX = "serve."
REMEMBERED = 1000  # checked combinations of settings
MIB = 2**20
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class ServeSettings:
    """The settings ``serve.*`` of a server."""

    queue: int = field(default=100, metadata={"help": "jobs that may wait; more are refused with status 429"})
    pixels: int = field(default=2048 * 2048, metadata={"help": "most pixels of a picture, or of a frame of a video"})
    frames: int = field(default=257, metadata={"help": "most frames of a video"})
    batch: int = field(default=1, metadata={"help": "most pictures of jobs that fit together and are drawn at once"})
    steps: int = field(default=100, metadata={"help": "most denoising steps"})
    images: int = field(default=10, metadata={"help": "most pictures of a job"})
    prompt: int = field(default=4000, metadata={"help": "most characters of a prompt"})
    upload_mib: float = field(default=25.0, metadata={"help": "most MiB of an uploaded file"})
    upload_pixels: int = field(default=4096 * 4096, metadata={"help": "most pixels of an uploaded picture"})
    uploads: int = field(default=16, metadata={"help": "most files of a request"})
    results_gib: float = field(default=10.0, metadata={"help": "GiB of results that are kept; the oldest go first"})
    results_days: float = field(default=30.0, metadata={"help": "days for which ended jobs are kept"})
    grace: float = field(default=300.0, metadata={"help": "seconds that a running job has when the server is ended"})
    idle: float = field(
        default=300.0, metadata={"help": "seconds without a job after which a gang beyond the least number ends"}
    )
    webhooks: str = field(
        default="",
        metadata={"help": "addresses that may be called when a job ends, between commas; with / at the end all below"},
    )
    call: str = field(
        default="",
        metadata={"help": "further arguments of the pipeline that clients may give as numbers, such as clip_skip,mu"},
    )

    @property
    def at_once(self) -> int:
        """How many jobs a gang has at the same time: while a batch is drawn, the next one gathers."""
        return 2 * self.batch if self.batch > 1 else 1

    @property
    def call_names(self) -> frozenset[str]:
        """The names in ``serve.call=``."""
        return frozenset(name.strip() for name in self.call.split(",") if name.strip())


def take_settings(values: Mapping[str, Any]) -> tuple[ServeSettings, dict[str, Any]]:
    """Divide flat settings into those of the server and all others.

    Raises:
        UsageError: one of the server's is unknown, of a wrong type, or below zero.
    """
    own = {key: value for key, value in values.items() if key.startswith(PREFIX)}
    known = [PREFIX + name for name in fields_of(ServeSettings)]
    for key in own:
        if key not in known:
            raise UsageError(f"unknown setting {key}; {did_you_mean(key, known)}")
    settings: ServeSettings = build(ServeSettings, PREFIX, own)
    for name in fields_of(ServeSettings):
        value = getattr(settings, name)
        if not isinstance(value, str) and value <= 0:
            raise UsageError(f"{PREFIX}{name}={value} is too small; give a number above 0.")
    return settings, {key: value for key, value in values.items() if key not in own}


class ApiError(Exception):
    """A request that is not answered, as a client sees it.

    Args:
        message: a sentence with the fix.
        status: of HTTP.
        param: name of the field that it is about.
        code: a word for programs.
        retry_after: seconds after which trying again makes sense.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.retry_after = printable(message), status, retry_after
        self.param = None if param is None else printable(param)
        self.code = code

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


@dataclass(frozen=True)
class CheckedRequest:
    """A request that the plan and the limits allow.

    Args:
        settings: as ``Gang.submit`` takes them, always with ``seed``.
        about: size, frames, steps, guidance, pictures, and the tokens of a picture, with the defaults filled in.
    """

    settings: dict[str, Any]
    about: dict[str, Any]

    @property
    def work(self) -> float:
        """What the time of a job is proportional to: tokens times steps times pictures."""
        return float(self.about["tokens"] * max(1, self.about["steps"] or 1) * self.about["images"])


class RequestCheck:
    """Check requests before they are accepted, with the sentences of the planner.

    Args:
        plan: of the gang.
        limits: of the server.
        loras: that clients may ask for.
    """

    def __init__(self, plan: Plan, limits: ServeSettings, loras: AllowedLoras | None = None) -> None:
        self.plan, self.limits, self.loras = plan, limits, AllowedLoras() if loras is None else loras
        self._registry = Registry()
        self.spec, _ = self._registry.model(plan.model)
        self._pipeline = pipeline_class(Path(plan.folder))
        self._lock = threading.Lock()
        self._remembered: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def check(self, prompt: str, settings: Mapping[str, Any]) -> CheckedRequest:
        """Check what a job asks for.

        Args:
            prompt: what to draw.
            settings: any of ``xdit_core.planning.requests.PER_REQUEST``, and ``call``; None stands for the default.
                ``lora`` has names and scales, as of ``AllowedLoras.scales``.

        Raises:
            ApiError: it is refused, with the reason.
        """
        asked = {name: value for name, value in settings.items() if value is not None}
        self._check_text("prompt", prompt)
        if not prompt.strip():
            raise ApiError('there is no prompt; write what to draw, such as "red heart".', param="prompt")
        self._check_text("negative", str(asked.get("negative", "")))
        self._check_numbers(asked)
        self._check_call(asked.get("call", {}))
        if "seed" not in asked:
            asked["seed"] = list(self.plan.run.seed) if "seed" in self.plan.values else secrets.randbelow(2**32)
        seeds = asked["seed"] if isinstance(asked["seed"], list) else [asked["seed"]]
        if not all(0 <= seed <= MOST_SEED - self.limits.images for seed in seeds):
            raise ApiError(f"seed must be between 0 and {MOST_SEED - self.limits.images}.", param="seed")
        lora = self._loras_of(asked.pop("lora", {}))
        about = self._plan_for(prompt, asked)
        self._check_numbers(about)
        asked |= {"lora": lora} if lora else {}
        asked["images"] = about["images"]  # as many as seeds, if there are several of these
        return CheckedRequest(asked, about)

    def _check_text(self, name: str, text: str) -> None:
        if len(text) > self.limits.prompt:
            raise ApiError(
                f"{name} has {len(text)} characters and this server takes {self.limits.prompt}; shorten it.", param=name
            )
        if "\0" in text:
            raise ApiError(f"{name} holds a zero byte; leave it out.", param=name)

    def _check_numbers(self, asked: Mapping[str, Any]) -> None:
        limits = self.limits
        for name, most in (("steps", limits.steps), ("frames", limits.frames), ("images", limits.images)):
            value = asked.get(name)
            if value is not None and value > most:
                raise ApiError(f"{name}={value} is more than this server allows; give {most} or less.", param=name)
        for name in ("height", "width", "max_sequence_length"):
            if (asked.get(name) or 0) > limits.pixels:
                raise ApiError(f"{name}={asked[name]} is more than this server allows; give less.", param=name)
        height, width = asked.get("height") or 1, asked.get("width") or 1
        if height * width > limits.pixels:
            raise ApiError(
                f"{width} x {height} has more than the {limits.pixels} pixels that this server allows; give a smaller "
                "size.",
                param="width",
            )

    def _check_call(self, call: Mapping[str, Any]) -> None:
        allowed = self.limits.call_names
        for name, value in call.items():
            if name not in allowed:
                raise ApiError(
                    f"call.{name} is not open to clients here; leave it out, or have the server started with "
                    f"serve.call={name}.",
                    param="call",
                )
            if not isinstance(value, int | float):
                raise ApiError(f"call.{name} must be a number, true or false.", param="call")

    def _loras_of(self, lora: Any) -> dict[str, float]:
        """Scales of the LoRAs of a request by name."""
        try:
            return self.loras.scales(lora)
        except UsageError as error:
            raise ApiError(str(error), param="lora") from error

    def _plan_for(self, prompt: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Size, steps and so on of a request; equal settings are checked once."""
        subject = prompt if self.spec.request.subject != "prompt" else ""
        settings = {name: value for name, value in asked.items() if name != "negative"}
        settings["seed"] = [0] * len(asked["seed"]) if isinstance(asked["seed"], list) else 0
        name = json.dumps([subject, settings, bool(asked.get("negative"))], sort_keys=True)
        with self._lock:
            if name in self._remembered:
                self._remembered.move_to_end(name)
                return dict(self._remembered[name])
            try:
                plan = plan_of_request(self.plan, self.spec, self._registry, self._pipeline, [prompt], asked)
            except XditError as error:
                raise ApiError(str(error), param=_field_of(str(error))) from error
            run = plan.run
            seeds = len(run.seed) if len(run.seed) > 1 else run.images
            about = {
                **{name: getattr(run, name) for name in ("height", "width", "frames", "steps", "guidance")},
                "images": min(run.images, seeds),
                "fps": run.fps,
                "output_type": run.output_type,
                "tokens": plan.facts.tokens,
                "text_tokens": plan.facts.text_tokens,
                "video": plan.facts.video,
            }
            self._remembered[name] = about
            if len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
            return dict(about)


def _field_of(sentence: str) -> str | None:
    """The setting that a sentence of the planner begins with, as in ``steps=0 is too small``."""
    name, sign, _ = sentence.partition("=")
    return name if sign and name.isidentifier() else None


def check_picture(data: bytes, name: str, limits: ServeSettings) -> None:
    """Check an uploaded picture; a small file that would become a huge picture is refused before it is decoded.

    Args:
        name: of the field.

    Raises:
        ApiError: it is too large, damaged, or none of PNG, JPEG and WebP.
    """
    from PIL import Image

    if len(data) > limits.upload_mib * MIB:
        raise ApiError(f"{name} has more than {limits.upload_mib:g} MiB; give a smaller file.", 413, name)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
            if width * height > limits.upload_pixels:
                raise ApiError(
                    f"{name} is {width} x {height}, more than {limits.upload_pixels} pixels; give a smaller picture.",
                    param=name,
                )
            picture.load()
    except ApiError:
        raise
    except Image.DecompressionBombError as error:
        raise ApiError(f"{name} has more than {limits.upload_pixels} pixels; give a smaller picture.") from error
    except Exception as error:  # the decoders have errors of many kinds
        raise ApiError(f"{name} cannot be read as a picture; give a PNG, JPEG or WebP file.", param=name) from error
