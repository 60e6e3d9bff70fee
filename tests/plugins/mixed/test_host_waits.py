"""In a displaced step nothing makes the host wait for the device, so that it can run ahead."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from xdit_core import Engine, Observer
from xdit_core.testing.runs import plan_for

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_consecutive", "_unique2", "masked_select")
METHODS = ("cpu", "numpy", "tolist", "item", "__array__")  # which need no operation on a CPU


class Reads(TorchDispatchMode):
    """Counts what would make the host wait on a device, while ``on``."""

    def __init__(self):
        super().__init__()
        self.on, self.counts = False, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for t in types):
            return NotImplemented  # the operations inside a tensor of another kind come here as well
        name = func.overloadpacket.__name__
        if self.on and (
            name in READS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]))
        ):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def watch(self, method):
        """Count calls of a method of tensors."""
        original = getattr(torch.Tensor, method)

        def counted(x, *args, **kwargs):
            if self.on:
                self.counts[method] += 1
            return original(x, *args, **kwargs)

        setattr(torch.Tensor, method, counted)
        return lambda: setattr(torch.Tensor, method, original)


class Displaced(Observer):
    """Counts from the end of a step to the end of another."""

    def __init__(self, reads, first, last):
        self.reads, self.first, self.last = reads, first, last

    def step_done(self, step, steps):
        self.reads.on = self.first <= step < self.last


def reads_of(plugins, folder, settings, control=False):
    """What made the host wait in the steps after the second."""
    torch.set_num_threads(1)
    reads = Reads()
    engine = Engine(plan_for(plugins, folder, settings), observer=Displaced(reads, 2, 5))
    undo = [reads.watch(method) for method in METHODS]
    try:
        with reads:
            engine.generate("a red fox", steps=6)
            reads.on = True
            if control:
                bool((torch.ones(2) > 0).nonzero().sum() > 0)
                torch.ones(1).tolist()
    finally:
        for each in undo:
            each()
    engine.close()
    return dict(reads.counts)


@pytest.mark.parametrize(
    ("plugins", "settings"),
    [
        (["pipefusion"], {"pipefusion.stages": 2, "pipefusion.patches": 3}),
        (["distrifusion"], {"distrifusion.degree": 2}),
        (["cfg", "pipefusion"], {"pipefusion.stages": 2}),
    ],
)
def test_a_displaced_step_reads_nothing(gloo, tiny_sd3_folder, plugins, settings):
    world = plan_for(plugins, str(tiny_sd3_folder), settings).world
    counts = gloo.run(reads_of, plugins, str(tiny_sd3_folder), settings, world=world, timeout=60, nccl_rules=True)
    assert counts == [{}] * world


def test_a_read_would_be_noticed(tiny_sd3_folder):
    assert reads_of([], str(tiny_sd3_folder), {}, control=True) == {"nonzero": 1, "_local_scalar_dense": 1, "tolist": 1}
