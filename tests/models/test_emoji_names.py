"""What people type at the bundled model: characters, names, other words."""

from __future__ import annotations

import pytest

from xdit_core import Registry, make_plan
from xdit_emoji.names import characters, note, words


@pytest.mark.parametrize(
    ("typed", "drawn"),
    [
        ("\u2764\ufe0f", "red heart"),
        ("\u2764", "red heart"),
        ("\U0001f680", "rocket"),
        ("a \U0001f680\U0001f499", "a rocket blue heart"),
        ("red  heart", "red  heart"),
    ],
)
def test_characters_are_names(typed, drawn):
    assert words({}, typed) == drawn
    assert note({}, typed) == ""


def test_all_names_have_a_character(pytestconfig):
    names = (pytestconfig.rootpath / "models/xdit_emoji/training/names.txt").read_text().split("\n")
    assert sorted(filter(None, names)) == sorted(characters().values())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("green hart", "near are green heart"),
        ("heart", "red heart"),
        ("quantum", "try "),
        ("\U0001f1eb\U0001f1f7", "none of the 241 names"),
    ],
)
def test_an_unknown_word_says_what_is_near(typed, said):
    assert said in note({}, typed)
    plan = make_plan([], {"model": "emoji", "prompt": typed, "device": "cpu"})
    assert any(said in line for line in plan.notes)


def test_the_pipeline_gets_the_name():
    spec, _ = Registry().model("emoji")
    assert spec.request.encode_subject({}, "\U0001f680", 2) == "rocket"
