"""Every strategy keeps to the rules of NCCL, and the backend that checks them notices who does not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.models.families import FAMILIES, settings
from helpers.models.tiny import saved
from xdit_core import Engine
from xdit_core.testing.nccl_order import History, Operation, RuleBroken, check_order
from xdit_core.testing.pool import PoolError
from xdit_core.testing.runs import generate, plan_for

STAGES = {"pipefusion.stages": 2, "pipefusion.patches": 3}
PLANS = [
    (["usp"], {"usp.ulysses": 1, "usp.ring": 3}, 3),
    (["pipefusion"], {"pipefusion.stages": 3, "pipefusion.patches": 4}, 3),
    (["pipefusion"], {"pipefusion.stages": 4, "pipefusion.patches": 4, "pipefusion.warmup": 0}, 4),
    (["distrifusion"], {"distrifusion.degree": 2}, 2),
    (["tp"], {"tp.degree": 2}, 2),
    (["dp"], {"dp.degree": 2, "images": 2}, 2),
    (["cfg", "usp"], {"usp.ulysses": 2, "usp.ring": 1}, 4),
    (["cfg", "pipefusion"], STAGES, 4),
    (["pipefusion", "usp"], {**STAGES, "usp.ulysses": 1, "usp.ring": 2}, 4),
]


@pytest.mark.parametrize(("plugins", "values", "world"), PLANS, ids=lambda x: "+".join(x) if type(x) is list else "")
def test_strategies_keep_to_the_rules(check_plan, plugins, values, world):
    check_plan(plugins, values, world=world, nccl_rules=True)


@pytest.mark.parametrize(
    ("model", "plugins", "more"),
    [
        ("hunyuandit", ["pipefusion"], {"pipefusion.stages": 4, "pipefusion.patches": 4}),  # long skips
        ("qwen_image", ["cfg", "pipefusion"], STAGES),  # a call for each branch of guidance
    ],
)
def test_models_with_other_messages_keep_to_the_rules(gloo, tmp_path, model, plugins, more):
    values = {**settings(FAMILIES[model], steps=3), **more}
    gloo.run(generate, plugins, saved(model, tmp_path), values, world=4, timeout=60, nccl_rules=True)


def picture(plugins, folder, values):
    """The picture that this rank has, None on others."""
    torch.set_num_threads(1)
    engine = Engine(plan_for(plugins, folder, {**values, "output_type": "image"}))
    images = engine.generate("a red fox", steps=2).images
    engine.close()
    return None if images is None else np.asarray(images[0]).astype(int)


def test_the_parallel_vae_keeps_to_the_rules(gloo, tiny_sd3_folder):
    """It exchanges rows at every convolution."""
    folder, values = str(tiny_sd3_folder), {"usp.ulysses": 2, "usp.ring": 1}
    first, _ = gloo.run(picture, ["usp", "parallel_vae"], folder, values, world=2, timeout=60, nccl_rules=True)
    assert abs(first - picture([], folder, {})).max() <= 1


def strided():
    """A send of a tensor that is not contiguous."""
    dist.send(torch.ones(2, 3).t(), 1 - dist.get_rank())


def overwritten():
    """A buffer that is written to before its message has left."""
    x = torch.ones(4)
    work = dist.isend(x, 1) if dist.get_rank() == 0 else dist.irecv(x, 0)
    x += 1
    work.wait()


def both_send():
    """Each sends before it receives, which gloo does not mind."""
    other, x = 1 - dist.get_rank(), torch.ones(4)
    work = dist.isend(x, other)
    dist.recv(torch.empty(4), other)
    work.wait()


def other_order():
    """Two messages that are received in another order than they were sent, told apart by tags."""
    x, y = torch.ones(4), torch.zeros(4)
    if dist.get_rank() == 0:
        works = [dist.isend(x, 1, tag=1), dist.isend(y, 1, tag=2)]
    else:
        works = [dist.irecv(y, 0, tag=2), dist.irecv(x, 0, tag=1)]
    for work in works:
        work.wait()


def swapped():
    """One rank sums, the other is at a broadcast."""
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(4))
    else:
        dist.broadcast(torch.ones(4), 0)


def objects():
    """A gather of objects on a communicator of the device."""
    dist.all_gather_object([None, None], "x")


MUTANTS = [
    (strided, r"rank \d gives send a tensor of \[3, 2\] that is not contiguous \(strides \[1, 3\]\)"),
    (overwritten, r"written to while rank \d was in (send of \[4\] float32 to 1|recv of \[4\] float32 from 0) with it"),
    (
        both_send,
        r"ranks 0 and 1 wait for each other for ever on NCCL.*: rank 0 waits in send of \[4\] float32 to 1; "
        r"rank 1 waits in send of \[4\] float32 to 0; issue them in the same order",
    ),
    (other_order, r"rank 0 and what rank 1 expects differ: send of \[4\] float32 to 1 \(tag 1\), recv .* \(tag 2\)"),
    (
        swapped,
        r"in different collectives: rank 0 waits in all_reduce of \[4\] float32 with \S+SUM; rank 1 waits in broadcast",
    ),
    (objects, r"rank \d calls all_gather_object over a communicator of the device"),
]


@pytest.mark.parametrize(("task", "sentence"), MUTANTS, ids=lambda x: x.__name__ if callable(x) else "")
def test_what_breaks_a_rule_is_noticed(gloo, task, sentence):
    with pytest.raises(PoolError) as error:
        gloo.run(task, world=2, timeout=2 if task is swapped else 30, nccl_rules=True)
    assert re.search(f"RuleBroken: .*{sentence}", str(error.value)), str(error.value)


def early():
    """What a receiver reads before and after the wait."""
    x = torch.full((4,), 3.0)
    if dist.get_rank() == 0:
        dist.send(x, 1)
        return None
    y = torch.zeros(4)
    work = dist.irecv(y, 0)
    before = y.clone()
    work.wait()
    return before.isnan().all().item(), y.tolist()


def test_nothing_is_there_before_the_wait(gloo):
    assert gloo.run(early, world=2, nccl_rules=True) == [None, (True, [3.0] * 4)]


def history(rank, *events):
    """A history of a rank among ranks 0 to 2: ``g>1`` sends in group ``g``, ``g<1`` receives, ``g+`` is a collective,
    ``*`` in front is part of one batch, a number waits."""
    made = History()
    for event in events:
        if isinstance(event, int):
            made.wait(event)
            continue
        group, way, peer = event.lstrip("*")
        kind = {">": "send", "<": "recv", "+": "sum"}[way]
        batch = 1 if event.startswith("*") else 0
        made.issue(
            Operation(
                group,
                (0, 1, 2)[: int(peer) if way == "+" else 3],
                kind,
                (4,),
                "float32",
                batch=batch,
                peer=-1 if way == "+" else int(peer),
            )
        )
    return History.from_json(made.to_json())


GOOD = {
    "batch": [["*a>1", "*a<1"], ["*a>0", "*a<0"]],
    "two communicators": [["a>1", "b<1", 0, 1], ["b>0", "a<0", 0, 1]],
    "one order": [["a>1", "a<1"], ["a<0", "a>0"]],
    "ahead": [["a>1", "a>1", 1], ["a<0", "a<0", 0, "b>2", 1, "b>2"], ["b<1", 0, "b<1", 1]],
}
STUCK = {
    "sends": ([["a>1", "a<1"], ["a>0", "a<0"]], "rank 0 waits in send .* to 1; rank 1 waits in send .* to 0"),
    "a collective between": ([["a+2", "a>1"], ["a<0", "a+2"]], r"rank 0 waits in sum .*; rank 1 waits in recv"),
    "through the compute stream": (
        [["a<1", 0, "b>1"], ["b<0", 0, "a>0"]],
        "rank 0 waits in recv .* from 1; rank 1 waits in send .* to 0, rank 1 waits in recv .* in another communicator",
    ),
    "left out": ([["a+2", "a+2"], ["a+2"]], r"rank 0 waits in sum .* \(after sum .*\); rank 1 ended with sum"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_may_be_done(name):
    check_order({rank: history(rank, *events) for rank, events in enumerate(GOOD[name])})


@pytest.mark.parametrize("name", STUCK)
def test_what_stands_still(name):
    histories, sentence = STUCK[name]
    with pytest.raises(RuleBroken, match=f"ranks 0 and 1 wait for each other.*{sentence}"):
        check_order({rank: history(rank, *events) for rank, events in enumerate(histories)})
