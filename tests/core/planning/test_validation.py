"""What a plugin declares and returns is looked at once; a mistake is a sentence that names whose it is."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from xdit_core import (
    EXACT,
    Axis,
    Blocks,
    Built,
    Checkpoint,
    Claim,
    Declaration,
    Engine,
    Fidelity,
    Latents,
    ModelSpec,
    PluginError,
    Problem,
    RequestSpec,
    Traffic,
    TrunkSpec,
    Wrap,
    hookimpl,
)
from xdit_core.registry.owners import Owner
from xdit_core.registry.validation import check_record
from xdit_core.testing.runs import plan_for


class Plugin:
    """What a module would be."""


def plugin(declared=None, check=None, built=None, settings=None):
    """A strategy made of results of its hooks."""
    made = Plugin()

    @hookimpl
    def xdit_declare(settings, facts):
        return declared if declared is not None else Declaration(wraps=(Wrap("forward", "reuse"),))

    @hookimpl
    def xdit_build(settings, rank):
        return built if built is not None else Built(wraps={"forward/reuse": lambda inner, call: inner(call)})

    made.xdit_declare, made.xdit_build = xdit_declare, xdit_build
    if check is not None:
        made.xdit_check = hookimpl(lambda settings, facts, plan: check)
    if settings is not None:
        made.xdit_settings = hookimpl(lambda: settings)
    return made


@dataclass(frozen=True)
class Odd:
    """A setting that no word of a command line can give."""

    table: dict[str, int] | None = None


WRONG = {
    "no declaration": (
        plugin(declared={"axes": ()}),
        "plugin odd must return a Declaration from xdit_declare; it returned {'axes'",
    ),
    "a list of axes": (
        plugin(declared=Declaration(axes=[])),
        r"with axes=\[\], where tuple\[xdit_core.records.Axis, ...\] is expected",
    ),
    "a degree in words": (
        plugin(declared=Declaration(axes=(Axis("a", "2", Traffic.PER_STEP),))),
        r"with axes\[0\].degree='2', where int or None is expected",
    ),
    "a wrap in words": (plugin(declared=Declaration(wraps=("forward/reuse",))), r"with wraps=\('forward/reuse',\)"),
    "an unknown slot": (
        plugin(declared=Declaration(claims=(Claim("token", "mine"),))),
        "claims the slot 'token', which does not exist; did you mean tokens",
    ),
    "an unknown fidelity": (
        plugin(declared=Declaration(fidelity=Fidelity("exakt"))),
        "declares the fidelity 'exakt'; did you mean exact",
    ),
    "displaced without a reference": (
        plugin(declared=Declaration(fidelity=Fidelity("displaced"))),
        "is displaced and names no reference",
    ),
    "a bound of what is exact": (
        plugin(declared=Declaration(fidelity=Fidelity("exact", 0.1))),
        "is exact with the bound 0.1",
    ),
    "a check that says no": (
        plugin(check=False),
        "must return a list of Problem from xdit_check, or nothing; it returned False",
    ),
    "one problem": (plugin(check=Problem("a", "b")), "must return a list of Problem from xdit_check"),
    "problems in words": (plugin(check=["too small"]), "must return a list of Problem from xdit_check"),
    "a problem without words": (plugin(check=[Problem(1, "b")]), "with what=1, where str is expected"),
    "a setting of another type": (plugin(settings=Odd), "a setting is an int, float, bool, str"),
    "no wraps": (
        plugin(built=Built()),
        r"declares wrap forward/reuse but xdit_build gave none; add it to Built\(wraps=...\)",
    ),
    "wraps that were not declared": (
        plugin(built=Built(wraps={"forward/reuse": print, "trunk/reuse": print})),
        "builds wrap trunk/reuse without declaring it, so it would never run",
    ),
    "a wrap that cannot be called": (
        plugin(built=Built(wraps={"forward/reuse": 3})),
        "built 3 for wrap forward/reuse, which cannot be called",
    ),
    "something else than Built": (plugin(built={"wraps": {}}), "must return a Built from xdit_build"),
    "a transform that was not declared": (
        plugin(built=Built(wraps={"forward/reuse": print}, transforms={"adapt": print})),
        "builds transform adapt without declaring it",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_mistake_of_a_strategy(tiny_sd3_folder, kind):
    made, said = WRONG[kind]
    with pytest.raises(PluginError, match=said) as refused:
        Engine(plan_for(["odd"], str(tiny_sd3_folder), extra={"odd": made}), registry_of(made))
    assert "odd" in str(refused.value)


def registry_of(made):
    """A registry with that plugin."""
    from xdit_core import Registry

    return Registry({"odd": made})


def test_a_slot_of_ones_own(tiny_sd3_folder):
    declared = Declaration(wraps=(Wrap("forward", "reuse"),), claims=(Claim("odd.cache", "it keeps results"),))
    plan = plan_for(["odd"], str(tiny_sd3_folder), extra={"odd": plugin(declared)})
    assert plan.claims["odd.cache"] == "odd"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"checkpoint": Checkpoint("StableDiffusion3Pipeline")},
            "checkpoint.pipelines='StableDiffusion3Pipeline', where tuple",
        ),
        ({"trunk": TrunkSpec(attention=("joint",))}, "trunk.attention="),
        ({"request": RequestSpec(["steps"])}, r"request.defaults=\['steps'\]"),
        ({"latents": Latents(frame_dim="2")}, "latents.frame_dim='2', where int or None is expected"),
        ({"trunk": TrunkSpec((Blocks("b", 4),))}, r"trunk.blocks\[0\].count=4, where str is expected"),
        ({"trunk": ("b",)}, r"trunk=\('b',\), where TrunkSpec is expected"),
    ],
)
def test_a_mistake_of_an_adapter(changes, said):
    spec = ModelSpec(**{"name": "mine", "checkpoint": Checkpoint(("X",)), **changes})
    with pytest.raises(
        PluginError, match=f"adapter mine of mine-models 1.0 returned a ModelSpec from xdit_model with {said}"
    ):
        check_record(spec, ModelSpec, Owner("adapter", "mine", "mine-models", "1.0"), "xdit_model")


@pytest.mark.parametrize(
    ("fidelity", "exactness", "kind"),
    [
        (None, "unverified", "unverified"),
        (EXACT, "exact", "exact"),
        (Fidelity("approximate", 0.2), "approximate", "approximate"),
        (
            Fidelity("displaced", reference=lambda degrees: {}),
            "exact",
            "exact",
        ),  # without patches there is nothing to displace
    ],
)
def test_fidelity_of_a_plan(tiny_sd3_folder, fidelity, exactness, kind):
    declared = Declaration(wraps=(Wrap("forward", "reuse"),), **({} if fidelity is None else {"fidelity": fidelity}))
    plan = plan_for(["odd"], str(tiny_sd3_folder), extra={"odd": plugin(declared)})
    assert (plan.exactness, plan.fidelity["odd"]) == (exactness, kind)
    both = plan_for(
        ["odd", "pipefusion"],
        str(tiny_sd3_folder),
        {"pipefusion.stages": 1, "pipefusion.patches": 2},
        extra={"odd": plugin(declared)},
    )
    worst = {"exact": "displaced"}.get(exactness, exactness)
    assert both.exactness == worst and "pipefusion" in both.compared and both.displaced[-1] == "pipefusion"


def test_verify_knows_what_is_promised():
    from xdit_launcher.commands.verify import Comparison

    assert Comparison("float32", 0.1, None, "approximate", bound=0.2).good
    assert not Comparison("float32", 0.3, None, "approximate", bound=0.2).good
    assert not Comparison("float32", 0.1, None, "exact").good
    unverified = Comparison("float32", 0.1, None, "unverified")
    assert not unverified.good and next(unverified.lines()).startswith("unverified: latents differ")
    assert next(Comparison("float32", 0.1, None, "approximate", bound=0.2).lines()).startswith(
        "approximate as it should be"
    )
