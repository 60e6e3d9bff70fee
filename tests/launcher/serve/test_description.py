"""What the server says of its model and its plan, and the files of the page."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

from helpers.models.tiny import saved
from xdit_core.planning.planner import make_plan
from xdit_core.registry.registry import Registry
from xdit_launcher.serve.api.description import plan_body, settings_of
from xdit_launcher.serve.limits import ServeSettings


def described(values, limits=None, plugins=()):
    """The settings of a model by name."""
    plan = make_plan(list(plugins), values)
    spec, _ = Registry().model(plan.model)
    return {setting.name: setting for setting in settings_of(plan, spec, limits or ServeSettings())}


def tiny(name, tmp_path, *changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = saved(name, tmp_path / name)
    return {"model": name, "model.path": str(path), "device": "cpu", **dict(changes)}


def test_settings_have_the_defaults_and_limits_of_model_and_server():
    limits = replace(ServeSettings(), steps=50, images=4, pixels=64 * 64)
    made = described({"model": "emoji", "steps": 12}, limits)
    assert (made["steps"].default, made["steps"].minimum, made["steps"].maximum) == (12, 1, 50)
    assert (made["width"].default, made["width"].step, made["width"].maximum) == (128, 16, 256)
    assert made["images"].maximum == 4 and made["guidance"].default == 3.0
    assert made["seed"].default is None and made["format"].choices == ("png", "jpeg", "webp")
    assert "max_sequence_length" not in made and "frames" not in made  # it has no T5 and makes pictures
    assert all(setting.help for setting in made.values())


def test_a_seed_of_the_server_is_the_default():
    assert described({"model": "emoji", "seed": "5"})["seed"].default == [5]


def test_arguments_of_the_pipeline_are_settings_where_they_are_open():
    made = described({"model": "emoji"}, replace(ServeSettings(), call="clip_skip"))
    assert (made["call.clip_skip"].kind, made["call.clip_skip"].default) == ("number", None)


def test_loras_are_settings_with_a_scale():
    plan = make_plan([], {"model": "emoji"})
    settings = settings_of(plan, Registry().model("emoji")[0], ServeSettings(), {"wash": "/a", "ink": "/b"})
    scales = [setting for setting in settings if setting.name.startswith("lora.")]
    assert [setting.title for setting in scales] == ["ink", "wash"] and all(setting.help for setting in scales)
    assert (scales[0].kind, scales[0].default, scales[0].minimum, scales[0].maximum) == ("number", 0, -100, 100)


def test_only_what_the_model_takes(tmp_path):
    classes = described(tiny("dit", tmp_path))
    assert {"negative", "width", "height", "max_sequence_length"}.isdisjoint(classes) and "guidance" in classes
    video = described(tiny("wan", tmp_path, ("frames", 5)))
    assert (video["frames"].minimum, video["frames"].step, video["frames"].maximum) == (1, 2, 257)
    assert video["images"].title == "Videos" and "format" not in video
    distilled = tiny("flux", tmp_path)
    assert "negative" not in described(distilled)  # its guidance is a number that goes into the model
    assert "negative" in described(distilled, replace(ServeSettings(), call="true_cfg_scale"))


@pytest.mark.parametrize(
    ("plugins", "values", "world", "last"),
    [
        ([], {}, 1, {"work": ["all of it"], "blocks": [0, 6], "patch": None, "shard": 0, "writes": True}),
        (
            ["usp", "pipefusion"],
            {"usp.ulysses": 2, "pipefusion.stages": 2},
            4,
            {"work": ["tokens, part 2 of 2", "blocks 3 to 5"], "blocks": [3, 6], "shard": 1, "writes": False},
        ),
        (
            ["cfg", "distrifusion"],
            {"distrifusion.degree": 2},
            4,
            {"work": ["guidance, half 2 of 2", "patch 2 of 2"], "patch": 1, "blocks": [0, 6]},
        ),
        (
            ["dp", "tp"],
            {"dp.degree": 2, "tp.degree": 2},
            4,
            {"work": ["pictures, share 2 of 2", "weights, part 2 of 2"]},
        ),
    ],
)
def test_the_share_of_each_rank(plugins, values, world, last):
    body = plan_body(make_plan(plugins, {"model": "emoji", "device": "cpu", **values}))
    assert len(body["ranks"]) == world and last.items() <= body["ranks"][-1].items()
    assert str(make_plan([], {"model": "emoji"}).folder) not in str(body)


def test_over_http(http):
    made = http.get("/v1/settings").json()
    assert (made["model"], made["video"], made["subject"]) == ("sd3", False, "prompt")
    steps = next(setting for setting in made["settings"] if setting["name"] == "steps")
    assert (steps["default"], steps["maximum"]) == (3, 2000)
    defaults = {setting["name"]: setting["default"] for setting in made["settings"] if setting["main"]}
    body = {name: value for name, value in defaults.items() if value is not None}
    assert http.post("/v1/jobs", json={"prompt": "a red fox", **body}).status_code == 202
    assert http.get("/v1/plan").json()["mesh"] == "one process"
    assert http.get("/health").json()["ready"] is True


def test_the_files_of_the_page(http):
    answer = http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert http.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    for name in ("nothing.js", "..%2f..%2fauth.py", "%00.js", "x" * 3000):
        assert http.get(f"/page/{name}").status_code == 404
