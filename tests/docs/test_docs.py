"""What the documents say is true."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from xdit_core import Engine, Registry, hookspecs
from xdit_core.settings import ModelSettings, RunSettings, fields_of
from xdit_core.testing.runs import plan_for

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else ""
DOCS = ROOT / "docs"
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
    """Of the package, or of the tests: no strategy of the package watches its rank."""
    sources = [p for folder in ("plugins", "models", "tests/helpers") for p in (ROOT / folder).rglob("*.py")]
    assert any(f"@hookimpl\ndef {hook.__name__}(" in p.read_text(encoding="utf-8") for p in sources)


def test_the_readme_names_every_plugin_and_model():
    registry = Registry()
    for group in ("xdit.plugins", "xdit.models"):
        for name in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]:
            assert f"| `{name}` |" in README
            assert name in registry.names(group)


def test_the_page_of_settings_has_a_row_for_every_setting():
    rows = re.findall(r"^\| (`[^|]*`) \|", (DOCS / "use" / "command-line.md").read_text(encoding="utf-8"), re.M)
    shown = {name for row in rows for name in re.findall(r"`([a-z_.]+)`", row)}
    assert shown >= {name.rstrip("_") for name in fields_of(RunSettings)}
    assert shown >= {f"model.{name}" for name in fields_of(ModelSettings)}


def test_the_page_on_serving_has_a_row_for_every_setting_and_field():
    fields = pytest.importorskip("xdit_launcher.serve.api.native").JobRequest.model_fields
    pictures = pytest.importorskip("xdit_launcher.serve.api.openai_api").ImageRequest.model_fields
    from xdit_launcher.serve.limits import ServeSettings

    page = (DOCS / "use" / "serving.md").read_text(encoding="utf-8")
    shown = {name for row in re.findall(r"^\| ([^|]*) \|", page, re.M) for name in re.findall(r"`([a-z_.0-9]+)`", row)}
    assert shown >= {f"serve.{name}" for name in fields_of(ServeSettings)}
    assert shown >= set(fields) and shown >= set(pictures)


PAGES = sorted(p for p in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_a_page_links_exists(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:xdit_core|launcher|plugins|models|tests|benchmarks)/[\w/.-]*\w/?)`", text):
        assert (ROOT / target).exists(), target


def test_the_index_links_every_page():
    linked = {
        (DOCS / target).resolve()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", DOCS.joinpath("README.md").read_text())
    }
    assert linked >= {page.resolve() for page in PAGES if page != DOCS / "README.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_of_text_are_short_enough_for_a_diff(page):
    code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        code ^= line.startswith("```")
        assert code or len(line) <= 112 or line.startswith("|") or line.startswith("!["), line


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (DOCS / "use" / "python.md").read_text(encoding="utf-8"), re.S)[1]
    exec(compile(code.replace("seed=3", "seed=3, steps=3"), "python.md", "exec"), {})
    assert (tmp_path / "rocket.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("number", "name", "says"),
    [(0, "slow_calls", r"^a call of the denoiser took [\d.]+ s$"), (1, "slow_steps", r"^step \d of 4 took [\d.]+ s$")],
)
def test_the_examples_of_plugins_run(tiny_sd3_folder, monkeypatch, capsys, number, name, says):
    page = (DOCS / "inside" / "adding-a-strategy.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.S)[number]
    plugin = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    exec(compile(code, "adding-a-strategy.md", "exec"), plugin.__dict__)
    plan = plan_for([name], str(tiny_sd3_folder), {f"{name}.limit": 0.0}, extra={name: plugin})
    with Engine(plan, Registry({name: plugin})) as engine:
        engine.generate("a red fox")
    assert len(re.findall(says, capsys.readouterr().out, re.M)) == plan.run.steps == 4


def cached_latents(settings, folder, page, plugins=(), limit=0.2):
    """Latents of a run with the step cache of the page, and for each run of the blocks whether it was left out."""
    torch.set_num_threads(1)
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    plugin = types.ModuleType("step_cache")
    exec(compile(code.replace("limit=0.2", f"limit={limit}"), "deciding-at-run-time.md", "exec"), plugin.__dict__)
    left_out, original = [], plugin.StepCache.blocks

    def blocks(cache, inner, rows):
        left_out.append(True)

        def counted(rows):
            left_out[-1] = False
            return inner(rows)

        return original(cache, counted, rows)

    plugin.StepCache.blocks = blocks
    plan = plan_for(["step_cache", *plugins], folder, settings, extra={"step_cache": plugin})
    with Engine(plan, Registry({"step_cache": plugin})) as engine:
        return engine.generate("a red fox", steps=8).latents.clone(), left_out


def test_the_step_cache_of_the_page_runs_alone_and_on_two_ranks(gloo, tiny_sd3_folder):
    page = (DOCS / "inside" / "deciding-at-run-time.md").read_text(encoding="utf-8")
    folder = str(tiny_sd3_folder)
    computed, never = cached_latents({}, folder, page, limit=0.0)
    cached, sometimes = cached_latents({}, folder, page, limit=1.0)
    assert not any(never) and any(sometimes) and not any(sometimes[:4]) and not torch.equal(computed, cached)
    settings = {"usp.ulysses": 2, "lockstep": True}
    for latents, left_out in gloo.run(cached_latents, settings, folder, page, ["usp"], 1.0, world=2):
        assert left_out == sometimes
        torch.testing.assert_close(latents, cached, atol=1e-5, rtol=1e-5)


def test_constraints_pin_what_the_project_needs():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        assert re.split(r"[\[<>=]", requirement)[0].lower() in pinned, requirement
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
    page = (DOCS / "use" / "coming-from-xdit.md").read_text(encoding="utf-8")
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

    page = (DOCS / "use" / "combinations.md").read_text(encoding="utf-8")
    names = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["xdit.plugins"])
    shown = " ".join(matrix.lines({"model": "emoji", "device": "cuda"}, names))
    assert shown.split() == page[page.index("|") :].split()  # the page wraps the reasons
