"""What is frozen stays as it is, mappings included, and a plan's digest says what is computed and nothing else."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle

import pytest

from xdit_core import Built, Checkpoint, ModelSpec, Plan, RequestSpec
from xdit_core.testing.runs import plan_for


def test_mappings_in_records_cannot_be_changed(tiny_sd3_folder):
    plan = plan_for(
        ["pipefusion"],
        str(tiny_sd3_folder),
        {"pipefusion.stages": 1, "call.joint_attention_kwargs": {"deep": {"er": 1}}},
    )
    spec = ModelSpec("m", Checkpoint(("P",)), request=RequestSpec({"steps": 1}, renamed={"steps": "n"}))
    for mapping in (
        *(
            plan.values,
            plan.plugins,
            plan.wraps,
            plan.claims,
            plan.reference,
            plan.values["call.joint_attention_kwargs"]["deep"],
        ),
        *(
            spec.request.defaults,
            spec.request.renamed,
            spec.unsupported,
            spec.trunk.forced_args,
            Built(wraps={"a/b": print}).wraps,
        ),
    ):
        before = dict(mapping)
        for change in (
            lambda m: m.update(x=1),
            lambda m: m.__setitem__("x", 1),
            lambda m: m.pop("x", None),
            lambda m: m.setdefault("x", 1),
            lambda m: m.clear(),
            lambda m: m.__ior__({"x": 1}),
            lambda m: m.popitem(),
            lambda m: m.__delitem__("x"),
        ):
            with pytest.raises(TypeError, match=r"cannot be changed; make another record with dataclasses\.replace"):
                change(mapping)
        assert mapping == before


def test_what_was_given_may_change_and_the_record_does_not():
    given = {"steps": 1, "nested": {"a": 1}}
    spec = ModelSpec("m", Checkpoint(("P",)), request=RequestSpec(given))
    given["steps"] = given["nested"]["a"] = 2
    assert spec.request.defaults == {"steps": 1, "nested": {"a": 1}}


def test_frozen_plans_can_be_written_copied_and_sent(tiny_sd3_folder):
    plan = plan_for(
        ["pipefusion"],
        str(tiny_sd3_folder),
        {"pipefusion.stages": 1, "call.joint_attention_kwargs": {"deep": {"er": 1}}},
    )
    assert Plan.from_json(plan.to_json()) == plan
    assert pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan) == copy.copy(plan) == plan
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["values"]["call.joint_attention_kwargs"] == {
        "deep": {"er": 1}
    }
    with pytest.raises(TypeError, match="cannot be changed"):
        pickle.loads(pickle.dumps(plan)).values["call.joint_attention_kwargs"]["deep"]["er"] = 2


def test_the_digest_is_of_what_is_computed(tiny_sd3_folder):
    """Two runs of the same picture have the same, wherever it is written and however it is watched."""

    def digest(**settings):
        return plan_for(
            ["usp"], str(tiny_sd3_folder), {"usp.ulysses": 1, "usp.ring": 1, "prompt": "a fox", **settings}
        ).digest()

    aside = {
        "out": "other.png",
        "runs": "elsewhere",
        "timeout": 99.0,
        "trace": True,
        "resume": True,
        "overwrite": False,
        "nproc": 1,
    }
    for name, value in aside.items():
        assert digest(**{name: value}) == digest(), name
    assert digest(guidance=7.0) == digest()  # as by default
    for name, value in {
        "seed": 1,
        "steps": 3,
        "prompt": "a hare",
        "height": 48,
        "dtype": "bfloat16",
        "call.clip_skip": 1,
    }.items():
        assert digest(**{name: value}) != digest(), name
