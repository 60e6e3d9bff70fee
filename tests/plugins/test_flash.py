"""Attention kernels: every one equals torch's own choice, with the log-sum-exp that the ring needs, or is refused by
name."""

from __future__ import annotations

import pytest
import torch

from xdit_core import PlanRefused
from xdit_core.testing import assert_close
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


@pytest.mark.parametrize("kernel", ["auto", "flash", "math"])
def test_alone_and_under_a_ring(gloo, tiny_sd3_folder, kernel):
    serial = diffusers_latents(str(tiny_sd3_folder))
    assert_close(generate(["flash"], str(tiny_sd3_folder), {"flash.kernel": kernel})[0], serial)
    settings = {"flash.kernel": kernel, "usp.ulysses": 1, "usp.ring": 2}
    for latents, _ in gloo.run(generate, ["flash", "usp"], str(tiny_sd3_folder), settings, world=2):
        assert_close(latents, serial)


def call(q, k, v, with_lse, **options):
    """An attention call outside an engine."""
    from xdit_core import AttentionCall, ForwardContext

    context = ForwardContext()
    rows = context.rows("self")
    return AttentionCall(q, k, v, rows, rows, 0, 0, options, context, with_lse=with_lse)


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("rows", [(5, 5), (3, 9), (1, 64)])
def test_log_sum_exp(kernel, rows):
    from xdit_flash.strategy import kernel_named

    q, k, v = (
        torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(i))
        for i, n in enumerate((rows[0], rows[1], rows[1]))
    )
    out, lse = kernel_named(kernel)(lambda c: None, call(q, k, v, True))
    scores = q @ k.transpose(-1, -2) / 8**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, rows[0])


def test_a_mask_reaches_the_kernel():
    from xdit_flash.strategy import kernel_named

    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.rand(1, 1, 6, 6) > 0.3
    mask[..., 0] = True
    out = kernel_named("math")(lambda c: None, call(q, k, v, False, attn_mask=mask))
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"flash.kernel": "cudnn"},
            "flash.kernel=cudnn needs a CUDA device and this plan runs on the CPU; use one of auto, flash, math",
        ),
        ({"flash.kernel": "efficient"}, "flash.kernel=efficient needs a CUDA device"),
        ({"flash.kernel": "flash_attn"}, "flash.kernel=flash_attn needs a CUDA device"),
        ({"flash.kernel": "quick"}, "flash.kernel=quick is unknown; use one of auto, flash, math"),
        (
            {"flash.kernel": "cudnn", "device": "cuda", "dtype": "float32"},
            "computes in half precision and this plan in float32",
        ),
        (
            {"flash.kernel": "flash_attn_3", "device": "cuda"},
            "needs the package flash_attn_interface, which is not installed",
        ),
    ],
)
def test_what_is_refused(tiny_sd3_folder, settings, sentence):
    with pytest.raises(PlanRefused) as caught:
        plan_for(["flash"], str(tiny_sd3_folder), settings)
    assert sentence in str(caught.value)


def test_a_device_that_is_too_old_is_named(tiny_sd3_folder, monkeypatch):
    monkeypatch.setattr("xdit_flash.cuda_capability", lambda: (7, 5))
    with pytest.raises(
        PlanRefused, match=r"flash.kernel=cudnn needs a device of compute capability 8.0 or more and this one has 7.5"
    ):
        plan_for(["flash"], str(tiny_sd3_folder), {"flash.kernel": "cudnn", "device": "cuda"})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["flash", "efficient", "cudnn", "flash_attn", "flash_attn_3"])
def test_kernels_of_a_gpu(kernel):
    from importlib.util import find_spec

    from xdit_flash import KERNELS
    from xdit_flash.strategy import kernel_named

    if KERNELS[kernel].package and find_spec(KERNELS[kernel].package) is None:
        pytest.skip(f"{KERNELS[kernel].package} is not installed")
    q, k, v = (torch.randn(2, 4, 96, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    want, want_lse = kernel_named("math")(lambda c: None, call(q, k, v, True))
    out, lse = kernel_named(kernel)(lambda c: None, call(q, k, v, True))
    torch.testing.assert_close(out, want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(kernel_named(kernel)(lambda c: None, call(q, k, v, False)), want, atol=2e-2, rtol=2e-2)
