"""Plans: what is refused and how it reads, how open degrees are completed, JSON in and out."""

from __future__ import annotations

import random
import sys
import types
from dataclasses import dataclass

import pytest

from xdit_core import (
    Axis,
    Claim,
    Declaration,
    ModelError,
    Plan,
    PlanRefused,
    PluginError,
    Registry,
    Traffic,
    UsageError,
    Wrap,
    hookimpl,
    make_plan,
)
from xdit_core.planning.degrees import complete
from xdit_core.planning.planner import check_same_plan
from xdit_core.testing.runs import plan_for


def module(**hooks):
    """A plugin made of hooks."""
    made = types.ModuleType("made")
    vars(made).update(hooks)
    return made


def plugin(declaration):
    """A plugin that only declares."""

    @hookimpl
    def xdit_declare(settings, facts):
        return declaration

    return module(xdit_declare=xdit_declare)


def degrees(plan):
    return {a.name: a.degree for a in plan.axes}


def plan(folder, plugins=("usp", "pipefusion"), devices=2, extra=None, **settings):
    values = {"model": "sd3", "model.path": str(folder), **{k.replace("__", "."): v for k, v in settings.items()}}
    return make_plan(list(plugins), values, Registry(extra), devices=devices)


def test_order_of_plugins_does_not_matter(tiny_sd3_folder):
    names = ["usp", "pipefusion"]
    plans = [plan(tiny_sd3_folder, random.sample(names, 2)) for _ in range(4)]
    assert len({p.to_json() for p in plans}) == 1
    assert plans[0].wraps["attention"] == (("exchange", "usp"), ("cache", "pipefusion"), ("ring", "usp"))


@pytest.mark.parametrize(
    ("nproc", "expected"),
    [
        (1, {"stages": 1, "ring": 1, "ulysses": 1}),
        (2, {"stages": 1, "ring": 1, "ulysses": 2}),
        (3, {"stages": 3, "ring": 1, "ulysses": 1}),
        (4, {"stages": 2, "ring": 1, "ulysses": 2}),
        (8, {"stages": 2, "ring": 1, "ulysses": 4}),
        (16, {"stages": 4, "ring": 1, "ulysses": 4}),
        (32, {"stages": 4, "ring": 2, "ulysses": 4}),
    ],
)
def test_open_degrees_are_completed(tiny_sd3_folder, nproc, expected):
    assert degrees(plan(tiny_sd3_folder, nproc=nproc)) == expected


def test_every_selected_plugin_gets_work_on_a_small_machine(tiny_sd3_folder):
    made = plan(tiny_sd3_folder, devices=2)
    assert degrees(made) == {"stages": 2, "ring": 1, "ulysses": 2} and made.world == 4
    assert plan(tiny_sd3_folder, devices=256).world == 4  # more cores become threads
    assert made.notes == ("4 processes: stages 2 x ulysses 2",)


def test_axes_are_ordered_by_traffic(tiny_sd3_folder):
    assert [a.name for a in plan(tiny_sd3_folder).axes] == ["stages", "ring", "ulysses"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"nproc": 7, "usp__ulysses": 2},
            "nproc=7 does not fit the degrees (given usp.ulysses=2); use one of 2, 4, 6, 8, 10, 12, or leave nproc "
            "out.",
        ),
        ({"usp__ulysses": 3}, "sd3 has 4 heads, which does not fit usp.ulysses=3; use one of 1, 2, 4."),
        ({"usp__ulysses": 0}, "usp.ulysses=0 is below 1; give 1 or more."),
        ({"height": 30}, "height=30 is not a multiple of 4, as sd3 needs; nearest are 28 and 32."),
        ({"steps": 0}, "steps=0 is too small; give 1 or more."),
        ({"output_type": "video"}, "output_type=video is unknown; use image or latent."),
        ({"dtype": "int8"}, "dtype=int8 is unknown"),
        ({"device": "tpu"}, "device=tpu is unknown; use cpu or cuda."),
        ({"images": 0}, "images=0 is too small"),
        ({"threads": 0}, "threads=0 is too small"),
        ({"seed": 2**70}, "does not fit into 64 bits"),
    ],
)
def test_what_is_refused(tiny_sd3_folder, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan(tiny_sd3_folder, **settings)
    assert sentence in str(caught.value)


def test_all_problems_are_listed_at_once(tiny_sd3_folder):
    with pytest.raises(PlanRefused) as caught:
        plan(tiny_sd3_folder, height=30, steps=0, pipefusion__warmup=-1)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (["ups"], {}, "unknown plugin 'ups' in --plugins; did you mean usp?"),
        (["usp"], {"usp__ulises": 2}, "unknown setting usp.ulises; did you mean usp.ulysses?"),
        (["usp"], {"step": 2}, "unknown setting step; did you mean steps?"),
        (["usp"], {"steps": "many"}, "steps=many is not a whole number; write for example steps=2."),
        (["usp"], {"pipefusion__stages": 2}, "add it: --plugins pipefusion."),
        (["usp"], {"guidance": "nan"}, "guidance=nan is not a number"),
    ],
)
def test_usage_errors(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(UsageError) as caught:
        plan(tiny_sd3_folder, plugins, **settings)
    assert sentence in str(caught.value)


def test_two_claims_on_a_slot_name_both(tiny_sd3_folder):
    rival = plugin(Declaration(claims=(Claim("tokens", "it wants them all"),)))
    with pytest.raises(
        PlanRefused, match=r"rival and usp both need the slot 'tokens' .*it wants them all.*; drop one of"
    ):
        plan(tiny_sd3_folder, ["usp", "rival"], extra={"rival": rival})


def test_two_plugins_with_one_axis(tiny_sd3_folder):
    rival = plugin(Declaration(axes=(Axis("ulysses", 2, Traffic.PER_LAYER),)))
    with pytest.raises(PlanRefused, match="two plugins declare the axis ulysses"):
        plan(tiny_sd3_folder, ["usp", "rival"], extra={"rival": rival})


def test_a_wrap_at_an_unknown_level(tiny_sd3_folder):
    odd = plugin(Declaration(wraps=(Wrap("trunk", "nowhere"),)))
    with pytest.raises(PluginError, match="plugin odd wraps trunk/nowhere, which does not exist"):
        plan(tiny_sd3_folder, ["odd"], extra={"odd": odd})


def test_a_misspelt_hook_is_found(tiny_sd3_folder):
    @hookimpl
    def xdit_declair(settings, facts):
        return Declaration()

    with pytest.raises(PluginError, match="xdit_declair"):
        plan(tiny_sd3_folder, ["odd"], extra={"odd": module(xdit_declair=xdit_declair)})


def test_a_failing_hook_names_its_plugin(tiny_sd3_folder):
    @hookimpl
    def xdit_declare(settings, facts):
        raise KeyError("oops")

    with pytest.raises(PluginError, match="plugin odd failed in xdit_declare: KeyError"):
        plan(tiny_sd3_folder, ["odd"], extra={"odd": module(xdit_declare=xdit_declare)})


def test_json_and_digest(tiny_sd3_folder):
    made = plan(tiny_sd3_folder, seed=3)
    again = Plan.from_json(made.to_json())
    assert again.to_json() == made.to_json() and again.digest() == made.digest()
    assert plan(tiny_sd3_folder, seed=4).digest() != made.digest()
    check_same_plan(again)


def test_another_version_makes_another_plan(tiny_sd3_folder):
    import dataclasses

    made = plan(tiny_sd3_folder)
    with pytest.raises(Exception, match=r"another plan than the launcher did \(plugins differ\)"):
        check_same_plan(dataclasses.replace(made, plugins={**made.plugins, "usp": ("xdit", "9.9")}))


def test_planning_needs_no_torch(tiny_sd3_folder):
    import subprocess

    code = (
        "import sys; from xdit_core import make_plan;make_plan(['usp','pipefusion'], "
        f"{{'model':'sd3','model.path':{str(tiny_sd3_folder)!r}}});sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_gpus_are_all_used_unless_a_plugin_would_be_idle():
    """7 GPUs: a ring of 7 would leave the stages nothing to do, 2 x 3 does not."""
    axes = {
        "usp": (
            Axis("ring", None, Traffic.PER_RING_HOP, last_resort=True),
            Axis("ulysses", None, Traffic.PER_LAYER, choices=(1, 2, 4)),
        ),
        "pipefusion": (Axis("stages", None, Traffic.PER_STAGE, choices=tuple(range(1, 25))),),
    }
    done = complete(axes, None, 7, grow=False, heads=24, model="m")
    assert {a.name: a.degree for a in done.axes} == {"stages": 3, "ring": 1, "ulysses": 2}
    assert [a.degree for a in complete(axes, None, 8, grow=False, heads=24, model="m").axes] == [2, 1, 4]


def test_a_plan_for_64_ranks():
    axes = {"a": (Axis("x", None, Traffic.PER_LAYER),), "b": (Axis("y", None, Traffic.PER_STEP, choices=(1, 2)),)}
    done = complete(axes, 64, 1, grow=False, heads=24, model="m")
    assert [(a.name, a.degree) for a in done.axes] == [("y", 2), ("x", 32)]


def test_the_model_must_be_named(tiny_sd3_folder):
    with pytest.raises(UsageError, match=r"no model; add model=NAME with one of .*sd3"):
        make_plan([], {})


@dataclass(frozen=True)
class Odd:
    """Settings of every type."""

    whole: int = 1
    part: float | None = None
    flag: bool = False
    many: tuple[int, ...] = ()
    word: str = ""


def test_values_are_taken_verbatim():
    from xdit_core.settings import build, parse_words

    values = parse_words(["o.word=0123", "o.flag=yes", "o.many=1,2", "o.part=none", "o.whole=7"])
    assert build(Odd, "o.", values) == Odd(7, None, True, (1, 2), "0123")
    assert parse_words(["prompt=yes", "prompt=a=b"]) == {"prompt": ["yes", "a=b"]}


def test_plan_for_is_serial_without_plugins(tiny_sd3_folder):
    assert plan_for([], str(tiny_sd3_folder)).world == 1


def test_auto_takes_the_adapter_that_fits(tiny_sd3_folder, tiny_pixart_folder, tmp_path):
    more = {"model.path": str(tiny_pixart_folder), "call.use_resolution_binning": False}
    assert plan_for([], str(tiny_pixart_folder), {"model": "auto", **more}).model == "pixart_sigma"
    assert plan_for([], str(tiny_sd3_folder), {"model": "auto"}).model == "sd3"
    with pytest.raises(ModelError, match=r"model=auto needs a checkpoint; give its folder or hub id as model\.path="):
        make_plan([], {"model": "auto"})
    (tmp_path / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    with pytest.raises(
        UsageError,
        match=r"model=auto: no installed adapter fits a KolorsPipeline; give model= with one of cogvideox, ",
    ):
        make_plan([], {"model": "auto", "model.path": str(tmp_path)})
