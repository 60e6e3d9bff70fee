"""Parallel VAE: the decoding of one picture divided among the ranks that made it.

The decoder is cut along the rows of the picture by DistVAE (github.com/xdit-project/DistVAE, from PipeFusion, Fang et
al. 2024, arXiv:2405.14430): convolutions exchange the rows at the cuts, norms their statistics, and the result equals
that of one rank. With ``tiling`` the decoder is left whole, and the overlapping tiles into which diffusers cuts a large
picture are dealt out to the ranks; their result is that of ``vae.enable_tiling()``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdit_core import EXACT, Built, Declaration, Fidelity, ModelFacts, Problem, Transform, Wrap, hookimpl

if TYPE_CHECKING:
    from xdit_core import Plan, Rank


@dataclass(frozen=True)
class Settings:
    """Settings of ``parallel_vae``."""

    degree: int | None = field(
        default=None, metadata={"help": "ranks that decode a picture; default: all that make it"}
    )
    tiling: bool = field(default=False, metadata={"help": "overlapping tiles instead of rows; not equal to serial"})


@hookimpl
def xdit_settings() -> type[Settings]:
    """``parallel_vae.degree``, ``.tiling``."""
    return Settings


@hookimpl
def xdit_declare(settings: Settings, facts: ModelFacts) -> Declaration:
    """No axis of its own: it works on the ranks that other plugins bring."""
    problems = []
    if settings.degree is not None and settings.degree < 1:
        problems.append(Problem(f"parallel_vae.degree={settings.degree} is below 1", "give 1 or more, or leave it out"))
    return Declaration(
        wraps=(Wrap("decode", "split"),),
        # the first phase that sees the VAE: others quantize or compile what it leaves
        transforms=(Transform("quantize"),),
        problems=tuple(problems),
        fidelity=Fidelity("approximate") if settings.tiling else EXACT,
    )


@hookimpl
def xdit_check(settings: Settings, facts: ModelFacts, plan: Plan) -> Iterator[Problem]:
    """List the problems that depend on how many ranks work on one picture."""
    ranks = plan.ranks_of_a_picture
    if ranks == 1:
        alone = f", since each of the {plan.world} draws pictures of its own" if plan.world > 1 else ""
        yield Problem(
            f"parallel_vae has one rank to decode a picture on{alone}",
            "add a plugin that brings more, such as --plugins usp,parallel_vae, or drop parallel_vae",
        )
        return
    degree = settings.degree or ranks
    if degree > ranks:
        yield Problem(
            f"parallel_vae.degree={degree} but {ranks} ranks make a picture", f"give 1 to {ranks}, or leave it out"
        )
    elif degree > facts.rows:  # latents have at least as many rows as tokens
        yield Problem(
            f"{facts.rows} rows of tokens are too few to be decoded by {degree} ranks",
            f"draw a larger picture, or set parallel_vae.degree to {facts.rows} or less",
        )


@hookimpl
def xdit_build(settings: Settings, rank: Rank) -> Built:
    """The wrap and the change of the VAE, on this rank's group."""
    from xdit_parallel_vae.strategy import ParallelVae

    vae = ParallelVae(settings.degree, settings.tiling, rank)
    return Built(wraps={"decode/split": vae.decode}, transforms={"quantize": vae.prepare})
