"""What the tests of plugins compare with."""

from __future__ import annotations

import pytest
import torch

from xdit_core.testing import assert_close, oracle_of
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


def test_close_is_a_part_of_the_largest_value():
    oracle = torch.tensor([0.0, 8.0])
    assert_close(oracle + 7e-5, oracle)
    for wrong in (oracle + 9e-5, oracle[:1], oracle.double(), oracle * float("nan")):
        with pytest.raises(AssertionError):
            assert_close(wrong, oracle)
    with pytest.raises(AssertionError):
        assert_close(oracle + 7e-5, oracle, within=1e-6)
    with pytest.raises(AssertionError, match="not finite"):
        assert_close(oracle * float("inf"), oracle * float("inf"))


def test_the_oracle_is_called_as_the_plan_says(tiny_sd3_folder):
    settings = {"steps": 2, "guidance": 3.0, "negative": "blue", "height": 24, "width": 40, "images": 2}
    plan = plan_for([], str(tiny_sd3_folder), settings)
    words = {"guidance_scale": 3.0, "negative_prompt": "blue", "height": 24, "width": 40, "num_images_per_prompt": 2}
    serial = diffusers_latents(str(tiny_sd3_folder), num_inference_steps=2, **words)
    assert torch.equal(oracle_of(plan, tiny_sd3_folder, settings), serial)


def test_the_oracle_of_a_displaced_plan_is_its_reference(tiny_sd3_folder):
    settings = {"pipefusion.stages": 2, "pipefusion.patches": 3, "usp.ulysses": 2, "usp.ring": 1, "images": 2}
    plan = plan_for(["pipefusion", "usp"], str(tiny_sd3_folder), settings)
    one = {"pipefusion.stages": 1, "pipefusion.patches": 3, "images": 2}
    reference = generate(["pipefusion"], str(tiny_sd3_folder), one)[0]
    assert torch.equal(oracle_of(plan, tiny_sd3_folder, settings), reference)


def test_another_number_of_ranks(check_plan):
    with pytest.raises(AssertionError, match="the plan has 4 ranks, not 2"):
        check_plan(["usp"], {"usp.ulysses": 2, "usp.ring": 2}, world=2)


def test_an_oracle_that_differs(check_plan):
    """The bound is far below what any real run reaches."""
    with pytest.raises(AssertionError, match="not close"):
        check_plan(["usp"], {"usp.ulysses": 1, "usp.ring": 2}, world=2, within=1e-12)
