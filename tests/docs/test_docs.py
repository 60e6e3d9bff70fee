"""What the documents say is true."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest

from xdit_core import Registry, hookspecs
from xdit_core.planning.settings import ModelSettings, RunSettings, fields_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
HOOKS = [f for n, f in vars(hookspecs).items() if n.startswith("xdit_")]

pytestmark = pytest.mark.skipif(not README, reason="needs the source tree")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_every_hook_says_when_where_what_and_shows_an_example(hook):
    text = inspect.getdoc(hook)
    for part in ("When:", "Where:", "Returns:", "Example::", f"def {hook.__name__}("):
        assert part in text
    shown = re.search(rf"def {hook.__name__}\(([^)]*)\)", text)[1]
    assert [n.strip() for n in shown.split(",") if n.strip()] == list(inspect.signature(hook).parameters)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda f: f.__name__)
def test_every_hook_is_used_by_a_plugin_of_ours(hook):
    sources = [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "models").rglob("*.py")]
    assert any(f"@hookimpl\ndef {hook.__name__}(" in p.read_text(encoding="utf-8") for p in sources)


def test_the_readme_names_every_plugin_model_and_setting():
    registry = Registry()
    for group in ("xdit.plugins", "xdit.models"):
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]:
            assert f"| `{name}` |" in README
            assert name in registry.names(group)
    for name in fields_of(RunSettings):
        if name not in ("prompt", "prompts", "max_sequence_length", "runs"):
            assert re.search(rf"\b{name}\b", README), name


def test_files_that_the_readme_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"^\| `([\w/]+\.py)` \|", README, re.M):
        assert (ROOT / target).exists(), target


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    exec(compile(code.replace('{"model"', '{"steps": 3, "model"'), "README.md", "exec"), {})
    assert (tmp_path / "rocket.png").stat().st_size > 500


def test_constraints_pin_what_the_project_needs():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        assert re.split(r"[<>=]", requirement)[0].lower() in pinned, requirement
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


OPTIONS = [
    "model",
    "download-dir",
    "trust-remote-code",
    "warmup_steps",
    "use_parallel_vae",
    "use_torch_compile",
    "seed",
    "output_type",
    "enable_sequential_cpu_offload",
    "use_cfg_parallel",
    "data_parallel_degree",
    "ulysses_degree",
    "ring_degree",
    "pipefusion_parallel_degree",
    "num_pipeline_patch",
    "attn_layer_num_for_pp",
    "tensor_parallel_degree",
    "split_scheme",
    "height",
    "width",
    "prompt",
    "no_use_resolution_binning",
    "negative_prompt",
    "num_inference_steps",
    "help",
    "use_onediff",
]


def test_every_option_of_xdit_has_a_row_and_every_setting_there_exists():
    page = (ROOT / "docs" / "use" / "coming-from-xdit.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `--")]
    for option in OPTIONS:
        assert any(re.search(rf"`--{option}`", row.split("|")[1]) for row in rows), option
    registry = Registry()
    classes = {"": RunSettings, "model": ModelSettings}
    for row in rows:
        for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)=", row.split("|")[2]):
            owner, _, name = key.rpartition(".")
            if owner == "call" or key == "model":
                continue
            if owner not in classes:
                registry.select([owner])
                classes[owner] = registry.call("xdit_settings", {owner: {}})[owner]
            assert name in fields_of(classes[owner]), key


def test_the_page_of_combinations_is_what_the_plans_say():
    from xdit_launcher.commands import matrix

    page = (ROOT / "docs" / "use" / "combinations.md").read_text(encoding="utf-8")
    names = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["xdit.plugins"])
    assert "\n".join(matrix.lines({"model": "emoji", "device": "cuda"}, names)) in page
