"""What a step launches, counted: as much as plain diffusers, and few operations for each exchange."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from helpers.host_path import collectives, one_rank, operations
from xdit_core.testing.models import tiny_sd3

BLOCKS, PATCHES = 8, 4
SIZE = {"height": 32, "width": 32, "guidance": 1.0, "max_sequence_length": 0}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """An SD3 of 8 blocks as a pipeline and as a folder."""
    pipe = tiny_sd3(layers=BLOCKS)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("deep")
    pipe.save_pretrained(folder)
    return pipe, str(folder)


@pytest.fixture(scope="module")
def plain(deep):
    """Operations of a step of plain diffusers."""
    call = {"guidance_scale": 1.0, "max_sequence_length": 0, "height": 32, "width": 32, "output_type": "latent"}
    with torch.inference_mode():
        return operations(lambda steps: deep[0]("a red fox", num_inference_steps=steps, **call))


def launched(deep, plugins, settings, world=1, rank=0):
    """Operations of a step of one rank."""
    values = {"model": "sd3", "model.path": deep[1], **SIZE, **settings}
    with ExitStack() as stack, torch.inference_mode():
        request = one_rank(plugins, values, world, rank, stack)
        request(3)
        return operations(request)


def test_the_engine_alone_launches_what_diffusers_does(deep, plain):
    assert launched(deep, [], {}) == plain


def test_a_strategy_on_one_rank_launches_nothing_more(deep, plain):
    assert launched(deep, ["usp"], {"usp.ulysses": 1, "usp.ring": 1}) == plain


def test_an_exchange_of_ulysses_is_a_message_and_a_copy(deep, plain):
    more = launched(deep, ["usp"], {"usp.ulysses": 4, "usp.ring": 1}, 4) - plain
    assert more["c10d::alltoall_base_"] == 2 * BLOCKS
    assert more["aten::stack"] == BLOCKS and sum(more.values()) <= 7 * BLOCKS + 8


def test_a_hop_of_the_ring_is_two_messages_and_few_operations(deep, plain):
    more = launched(deep, ["usp"], {"usp.ulysses": 1, "usp.ring": 4}, 4) - plain
    assert more["c10d::send"] == more["c10d::recv_"] == 3 * BLOCKS
    assert more["aten::logaddexp"] == more["aten::lerp"] == 3 * BLOCKS
    assert sum(more.values()) <= BLOCKS * (3 * 8 + 12) + 8


@pytest.mark.parametrize("rank", [0, 3])
def test_a_divided_matrix_is_a_sum_and_nothing_more(deep, plain, rank):
    """Two sums a stream and block (the last block puts out no text), two modulations that are gathered."""
    more = launched(deep, ["tp"], {"tp.degree": 4}, 4, rank) - plain
    gathered = 2 * BLOCKS
    assert more == {"c10d::allreduce_": 4 * BLOCKS - 2, "c10d::_allgather_base_": gathered, "aten::new_ones": gathered}


@pytest.mark.parametrize("rank", range(4))
def test_patches_launch_no_more_than_the_whole_picture(deep, plain, rank):
    """A stage computes its share of the blocks once for each patch; only the first patch has text."""
    settings = {"pipefusion.stages": 4, "pipefusion.patches": PATCHES}
    counted = launched(deep, ["pipefusion"], settings, 4, rank)
    assert sum(counted.values()) <= 1.15 * sum(plain.values())
    assert collectives(counted) <= 2 * PATCHES + 4
    assert not {"aten::isnan", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"} & set(counted)
