"""Tensor parallelism: equal to serial, with a part of the matrices on each rank from the moment of loading."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from xdit_core import Engine, ModelError, PlanRefused
from xdit_core.testing.runs import diffusers_latents, generate, plan_for


@pytest.mark.parametrize("degree", [2, 4])
def test_equals_serial(gloo, tiny_sd3_folder, degree):
    serial = diffusers_latents(str(tiny_sd3_folder))
    for latents, _ in gloo.run(generate, ["tp"], str(tiny_sd3_folder), {"tp.degree": degree}, world=degree):
        torch.testing.assert_close(latents, serial, atol=2e-5, rtol=1e-5)


def test_dual_attention(gloo, tmp_path):
    from xdit_core.testing.models import save_tiny_sd3

    folder = str(save_tiny_sd3(tmp_path / "sd35", dual=(0, 1), layers=3))
    results = gloo.run(generate, ["tp"], folder, {"tp.degree": 2}, world=2)
    torch.testing.assert_close(results[0][0], diffusers_latents(folder), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("plugins", "settings", "world"),
    [
        (["tp", "usp"], {"usp.ulysses": 2, "usp.ring": 1}, 4),
        (["tp", "usp"], {"usp.ulysses": 1, "usp.ring": 2}, 4),
        (["tp", "pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 3}, 4),
        (
            ["tp", "usp", "pipefusion"],
            {"usp.ulysses": 2, "usp.ring": 1, "pipefusion.stages": 2, "pipefusion.patches": 3},
            8,
        ),
    ],
)
def test_with_others(gloo, tiny_sd3_folder, plugins, settings, world):
    """xDiT 0.7 gives TP x SP inconsistent groups: sequence shards would be summed as if they were parts of a matrix."""
    late = "pipefusion" in plugins
    reference = (
        generate(["pipefusion"], str(tiny_sd3_folder), {"pipefusion.stages": 1, "pipefusion.patches": 3})[0]
        if late
        else diffusers_latents(str(tiny_sd3_folder))
    )
    for latents, _ in gloo.run(generate, plugins, str(tiny_sd3_folder), {**settings, "tp.degree": 2}, world=world):
        torch.testing.assert_close(latents, reference, atol=3e-5, rtol=1e-5)


def held(folder, degree):
    """Elements of this rank's blocks, and the bytes that they occupy."""
    engine = Engine(plan_for(["tp"] if degree > 1 else [], folder, {"tp.degree": degree} if degree > 1 else {}))
    parts = [p for n, p in engine.pipe.transformer.named_parameters() if "blocks" in n]
    engine.close()
    return sum(p.numel() for p in parts), sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}.values()
    )


def test_a_rank_holds_its_part_only(gloo, tiny_sd3_folder):
    whole, all_bytes = held(str(tiny_sd3_folder), 1)
    for mine, mine_bytes in gloo.run(held, str(tiny_sd3_folder), 4, world=4):
        assert mine < 0.27 * whole  # biases of row-wise matrices and norms are not divided
        assert mine_bytes < 0.27 * all_bytes


def read_while_loading(folder):
    """Numbers that loading asked of the file for the blocks."""
    from unittest import mock

    from xdit_core.engine.tensors import FileTensors

    asked = []
    original = FileTensors.read

    def spy(tensors, name, where=None):
        out = original(tensors, name, where)
        if "blocks" in name:
            asked.append(out.numel())
        return out

    with mock.patch.object(FileTensors, "read", spy):
        Engine(plan_for(["tp"], folder, {"tp.degree": 2})).close()
    return sum(asked)


def test_a_rank_reads_its_part_only(gloo, tiny_sd3_folder):
    whole, _ = held(str(tiny_sd3_folder), 1)
    assert all(asked < 0.53 * whole for asked in gloo.run(read_while_loading, str(tiny_sd3_folder), world=2))


def wrong_plan(folder):
    """A class whose own plan names a layer which is not there."""
    from unittest import mock

    from diffusers import SD3Transformer2DModel

    import xdit_sd3

    wrong = {**xdit_sd3.TP_PLAN, "transformer_blocks.*.attn.to_qkv": "colwise"}
    spec = xdit_sd3.xdit_model()
    spec = dataclasses.replace(spec, trunk=dataclasses.replace(spec.trunk, tp_plan={}))
    with (
        mock.patch.object(SD3Transformer2DModel, "_tp_plan", wrong, create=True),
        mock.patch.object(xdit_sd3, "xdit_model", lambda: spec),
        mock.patch("xdit_core.engine.engine.Registry.model", lambda *_: (spec, ("", ""))),
    ):
        try:
            Engine(plan_for(["tp"], folder, {"tp.degree": 2}))
        except ModelError as error:
            return str(error)
    return "went through"


def test_a_key_that_matches_nothing_is_an_error(gloo, tiny_sd3_folder):
    for text in gloo.run(wrong_plan, str(tiny_sd3_folder), world=2):
        assert "name transformer_blocks.*.attn.to_qkv, which SD3Transformer2DModel does not have" in text


def test_bytes_sent_match_the_table(gloo, tiny_sd3_folder):
    """4 of tokens x hidden x layers: two sums a block and stream, each sending its (N-1)/N twice; the last block has no
    text output."""
    results = gloo.run(generate, ["tp"], str(tiny_sd3_folder), {"tp.degree": 4}, world=4)
    batch, steps, hidden, layers = 2, 4, 32, 4
    picture, text = 64, 12 + 5
    one = batch * steps * hidden * 4
    expected = (4 * picture * layers + 4 * text * (layers - 1)) * one * 3 // 4
    assert all(sent["tp"] == expected for _, sent in results)


@pytest.mark.parametrize(
    ("plugins", "settings", "sentence"),
    [
        (["tp"], {"tp.degree": 3}, "sd3 has 4 heads, which does not fit tp.degree=3; use one of 1, 2, 4"),
        (
            ["tp", "usp"],
            {"tp.degree": 4, "usp.ulysses": 2},
            r"sd3 has 4 heads, which tp.degree=4 x usp.ulysses=2 = 8 does not divide",
        ),
    ],
)
def test_heads_that_do_not_divide_are_refused(tiny_sd3_folder, plugins, settings, sentence):
    with pytest.raises(PlanRefused, match=sentence):
        plan_for(plugins, str(tiny_sd3_folder), settings)


def test_open_degrees_share_the_heads(tiny_sd3_folder):
    plan = plan_for(["tp", "usp"], str(tiny_sd3_folder), {"nproc": 8})
    assert plan.degree("tp") * plan.degree("ulysses") <= 4 and plan.world == 8


def after_another(folder):
    """An engine over the same ranks as one that was closed: torch must not go on with the groups of the first."""
    found = []
    for side in (16, 24, 16):
        engine = Engine(plan_for(["tp", "usp"], folder, {"tp.degree": 2, "usp.ulysses": 2, "usp.ring": 1}))
        found.append(engine.generate("a red fox", height=side, width=side).latents)
        engine.close()
    return found


def test_engines_one_after_another(gloo, tiny_sd3_folder):
    for first, _, last in gloo.run(after_another, str(tiny_sd3_folder), world=4):
        assert torch.equal(first, last)


class GatedBlock(torch.nn.Module):
    """Feed-forwards whose first matrix holds values and gates, told by its class, by a plan and by an attribute."""

    def __init__(self):
        from diffusers.models.attention import FeedForward

        super().__init__()
        self.geglu = FeedForward(8, activation_fn="geglu")
        self.swiglu = FeedForward(8, activation_fn="swiglu")
        self.first, self.last = torch.nn.Linear(8, 24), torch.nn.Linear(20, 8)
        self.last._tp_packed_row_blocks = [12, 8]
        self.norm = torch.nn.RMSNorm(8, eps=1e-6)

    def forward(self, x):
        x = x + self.geglu(x) + self.swiglu(x)
        gate, value = self.first(x).chunk(2, dim=-1)
        return self.last(torch.cat((gate * value, self.norm(self.keys(x))), dim=-1))


def packed_parts(degree):
    """Compare one block, whole and divided, with the same values; return this rank's share of the numbers."""
    from types import SimpleNamespace

    import torch.distributed as dist
    from diffusers.hooks.tensor_parallel import PackedColwiseParallel

    from xdit_core import Observer, slice_of
    from xdit_tp.strategy import Divide

    plan = {
        "*.net.0.proj": "colwise",
        "*.net.2": "rowwise",
        "first": PackedColwiseParallel([1, 1]),
        "keys": "colwise",
        "norm": "normed",
        "last": "rowwise",
    }

    def made():
        block = GatedBlock()
        block.keys = torch.nn.Linear(8, 8)
        return block

    torch.manual_seed(0)
    whole = made()
    torch.nn.init.normal_(whole.norm.weight)
    with torch.device("meta"):
        part = made()
    sent = Counter()
    rank = SimpleNamespace(
        group=lambda axis: dist.group.WORLD,
        degree=lambda axis: degree,
        index=lambda axis: dist.get_rank(),
        sent=sent,
        observer=Observer(),
        spec=SimpleNamespace(name="gated", trunk=SimpleNamespace(tp_plan=plan)),
    )
    Divide(rank)(part)
    values = whole.state_dict()
    state = {name: slice_of(p).read(values[name].__getitem__).clone() for name, p in part.named_parameters()}
    part.load_state_dict(state, assign=True)
    x, nothing = torch.randn(2, 3, 8), torch.randn(2, 0, 8)
    with torch.no_grad():
        torch.testing.assert_close(part(x), whole(x), atol=2e-5, rtol=1e-5)
        count = dict(sent)
        assert part(nothing).shape == (2, 0, 8) and sent == count  # a stream without rows sends nothing
    return sum(p.numel() for p in part.parameters()) / sum(p.numel() for p in whole.parameters())


def test_matrices_of_several_matrices(gloo):
    assert all(share < 0.6 for share in gloo.run(packed_parts, 2, world=2))
