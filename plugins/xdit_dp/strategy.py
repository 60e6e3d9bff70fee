"""Divides the pictures of a request among ranks: each draws its part, and then all get all outputs."""

from __future__ import annotations

import dataclasses

import torch.distributed as dist

from xdit_core import Output, Rank, Request, RunRequest, even_bounds, joined, share


class Divide:
    """Each rank draws a range of all the pictures; sizes differ by one at most, and may be 0."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.group = rank, rank.mesh.host_group(("dp",))
        self.degree, self.index = rank.degree("dp"), rank.index("dp")

    def __call__(self, inner: RunRequest, request: Request) -> list[Output]:
        """This rank's share in, everybody's outputs out, in the order of the prompts and pictures."""
        if self.group is None:
            return inner(request)
        bounds = even_bounds(sum(len(job.numbers) for job in request.jobs), self.degree)
        mine = inner(request.but(jobs=share(request.jobs, bounds[self.index], bounds[self.index + 1])))
        everyone: list[list[Output] | None] = [None] * self.degree
        packed = [dataclasses.replace(o, latents=None if o.latents is None else o.latents.cpu()) for o in mine]
        with self.rank.waiting("the pictures of the other ranks", "dp", self.group):
            dist.all_gather_object(everyone, packed, group=self.group)
        return joined(output for part in everyone if part is not None for output in part)
