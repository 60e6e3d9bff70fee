"""Branches are told apart by the values of their condition, never by which tensor object holds them."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from xdit_core import UnsupportedCall
from xdit_core.points.branches import Branches, watched


def texts(*seeds):
    """New tensor objects, with the same values for the same seed."""
    return [torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def numbers(branches, calls, step=0):
    """Numbers of the branches of the calls of one evaluation."""
    found = [branches.find(("transformer", frozenset(), 1), text, step).number for text in calls]
    branches.stepped()
    return found


def test_new_objects_with_the_same_values_are_the_same_branch():
    branches = Branches()
    assert [numbers(branches, texts(1, 2), step) for step in range(3)] == [[0, 1]] * 3


def test_a_branch_may_be_left_out_or_come_later_and_the_order_may_change():
    branches = Branches()
    orders = [(1,), (2, 1), (2,), (1, 2), (3, 2, 1)]
    assert [numbers(branches, texts(*order), step) for step, order in enumerate(orders)] == [
        [0],
        [1, 0],
        [1],
        [0, 1],
        [2, 1, 0],
    ]


def test_two_calls_of_an_evaluation_with_one_condition_are_two_branches():
    """Guidance on an image that the latents hold: the texts are one object, what is computed is not the same."""
    branches, (text,) = Branches(), texts(1)
    assert [numbers(branches, [text, text], step) for step in range(2)] == [[0, 1]] * 2


def test_what_else_differs_makes_another_branch():
    branches, (text,) = Branches(), texts(1)
    keys = [
        ("transformer", frozenset(), 2),
        ("transformer", frozenset({1}), 2),
        ("transformer_2", frozenset(), 2),
        ("transformer", frozenset(), 1),
    ]
    assert [branches.find(key, text, 0).number for key in keys] == [0, 1, 2, 3]


def test_age_counts_steps_and_not_evaluations():
    """A scheduler of second order evaluates twice a step."""
    branches, ages = Branches(), []
    for step in (0, 0, 1, 1, 4):
        ages.append(branches.find(("transformer",), texts(1), step).steps_done)
        branches.stepped()
    assert ages == [0, 0, 1, 1, 2]


def test_a_condition_that_is_new_at_every_step_is_refused():
    branches = Branches()
    with pytest.raises(UnsupportedCall, match=r"more than 16 conditions, so .*pass the same condition at every step"):
        for step in range(20):
            numbers(branches, texts(step), step)


@pytest.mark.parametrize("cls", [DDIMScheduler, FlowMatchEulerDiscreteScheduler])
def test_watching_a_scheduler(cls):
    """Signature, type and state stay, copies step on their own, and nothing is left behind."""
    scheduler, steps = cls(), []
    scheduler.set_timesteps(4)
    signature = inspect.signature(scheduler.step)
    with watched(scheduler, lambda result: steps.append(result)):
        assert isinstance(scheduler, cls) and type(scheduler).__name__ == cls.__name__
        assert inspect.signature(scheduler.step) == signature
        other = copy.deepcopy(scheduler)
        x = torch.zeros(1, 4, 2, 2)
        other.step(x, other.timesteps[0], x)
        assert getattr(scheduler, "_step_index", None) is None
        scheduler.step(x, scheduler.timesteps[0], x)
    assert type(scheduler) is cls
    assert len(steps) == 2
