"""What is done to blocks while they run: their attention is led to a point, and text without rows costs nothing."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from torch import nn

from helpers.host_path import Count
from xdit_core.points.blocks.empty_text import EmptyText, learn
from xdit_core.points.blocks.routing import EmptyRows, Routing, attention_op, unrouted


class Doubles:
    """A point whose kernel calls torch's function under its own name, as a plugin would."""

    calls = 0

    def attend(self, q, k, v, options):
        self.calls += 1
        return 2 * F.scaled_dot_product_attention(q, k, v, **options)


def qkv():
    return [torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_calls_go_to_the_point_and_those_of_its_kernel_to_torch():
    torchs, point, x = F.scaled_dot_product_attention, Doubles(), qkv()
    whole = F.scaled_dot_product_attention(*x)
    with Routing(point):
        assert torch.equal(F.scaled_dot_product_attention(*x, None, 0.0, scale=None), 2 * whole)
    assert point.calls == 1 and F.scaled_dot_product_attention is torchs


def test_torch_has_its_own_again_after_an_error():
    torchs = F.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), Routing(Doubles()):
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is torchs


def test_what_another_library_put_there_is_what_kernels_call(monkeypatch):
    torchs = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: 10 * torchs(*a, **k))
    x = qkv()
    with Routing(Doubles()):
        assert torch.equal(F.scaled_dot_product_attention(*x), 2 * (10 * torchs(*x)))
        assert torch.equal(unrouted(*x), 10 * torchs(*x))


def test_two_threads_at_once():
    """Each thread's calls go to its own point, whoever leaves first; a third thread's to torch."""
    x, inside, leave = qkv(), threading.Barrier(3), threading.Event()
    whole, results = F.scaled_dot_product_attention(*x), {}

    def run(name, waits):
        point = Doubles()
        with Routing(point):
            inside.wait(10)
            if waits:
                leave.wait(10)
            results[name] = F.scaled_dot_product_attention(*x), point.calls

    threads = [threading.Thread(target=run, args=(n, n == "last")) for n in ("first", "last")]
    for thread in threads:
        thread.start()
    inside.wait(10)
    threads[0].join(10)
    assert torch.equal(F.scaled_dot_product_attention(*x), whole)
    leave.set()
    threads[1].join(10)
    for out, calls in results.values():
        assert torch.equal(out, 2 * whole) and calls == 1


@pytest.mark.parametrize("laid_out", ["heads first", "rows first"])
def test_the_op_of_compiled_blocks_is_what_it_says_to_the_compiler(laid_out):
    x = qkv() if laid_out == "heads first" else [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv()]
    options = (None, 0.0, False, None, False)
    torch.library.opcheck(attention_op, (*x, *options))
    with Routing(Doubles()):
        assert torch.equal(attention_op(*x, *options), 2 * unrouted(*x))


def test_reshape_of_no_rows():
    x = torch.empty(2, 3, 0, 8)
    with pytest.raises(RuntimeError):
        x.reshape(2, 3, 0, -1, 2)
    with EmptyRows() as mode:
        assert x.reshape(2, 3, 0, -1, 2).shape == (2, 3, 0, 4, 2)
        assert x.reshape(2, 0, 24).shape == (2, 0, 24)
        assert torch.ones(4, 2).reshape(-1).shape == (8,)
    assert mode.met


@pytest.fixture
def block():
    torch.manual_seed(0)
    return JointTransformerBlock(16, 2, 8, qk_norm="rms_norm").eval()


def arguments(text_rows, patch_rows=6):
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, patch_rows, 16),
        "encoder_hidden_states": torch.randn(2, text_rows, 16),
        "temb": torch.randn(2, 16),
    }


@torch.no_grad()
def test_text_modules_are_left_out_without_text(block):
    given, empty = arguments(0), EmptyText()
    with Routing(Doubles()):
        with Count() as whole:
            text, tokens = block(**given)
        with empty.left_out(0, block, given), Count() as part:
            text_again, tokens_again = block(**given)
    assert torch.equal(tokens, tokens_again) and text.shape == text_again.shape == (2, 0, 16)
    names = {name for name, m in block.named_modules() if m in learn(block, given)}
    assert names >= {"norm1_context", "ff_context", "attn.add_q_proj", "attn.to_add_out", "norm2_context"}
    assert not names & {"norm1", "ff", "attn", "attn.to_q", "attn.to_out.0"}
    assert part.operations.total() < 0.75 * whole.operations.total()


@torch.no_grad()
def test_the_block_runs_whole_again_with_text(block):
    given = arguments(4)
    with Routing(Doubles()):
        before = block(**given)
        with EmptyText().left_out(0, block, arguments(0)):
            block(**arguments(0))
        after = block(**given)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any("forward" in m.__dict__ for m in block.modules())


class Leaks(nn.Module):
    """A block whose picture rows take a value that a text module computes, and that uses a module twice."""

    def __init__(self):
        super().__init__()
        self.gate, self.both, self.text = Gate(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden_states, encoder_hidden_states):
        rows, gate = self.gate(encoder_hidden_states)
        return self.text(self.both(rows)), self.both(hidden_states) * gate


class Gate(nn.Module):
    def forward(self, rows):
        return rows + 1, torch.full((1, 1, 4), 3.0)


@torch.no_grad()
def test_what_picture_rows_need_is_computed():
    block = Leaks().eval()
    given = {"hidden_states": torch.randn(1, 3, 4), "encoder_hidden_states": torch.empty(1, 0, 4)}
    left_out = learn(block, given)
    assert set(left_out) == {block.text}
    with EmptyText().left_out(0, block, given):
        assert torch.equal(block(**given)[1], 3 * block.both(given["hidden_states"]))
