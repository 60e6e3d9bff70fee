"""Computes which tokens of the picture and of the text belong to a patch and to a rank.

All code that slices tokens asks a ``TokenLayout``, so that all of it agrees. The picture's tokens are a grid ``frames x
rows x columns``, numbered in that order; the text's tokens are numbered on their own. PipeFusion cuts the rows into
patches (in time), sequence parallelism cuts every patch into shards (over ranks). Ownership is the same in warm-up and
after: shard ``s`` always owns part ``s`` of every patch, so K/V that was cached at full sequence stays where it is
needed. Splits may be uneven; nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Span = tuple[int, int]


def even_bounds(total: int, parts: int) -> tuple[int, ...]:
    """Divide ``total`` items into ``parts`` ranges whose sizes differ by one at most, larger ones first.

    Returns:
        The ``parts + 1`` boundaries, from 0 to ``total``.
    """
    size, rest = divmod(total, parts)
    return tuple(i * size + min(i, rest) for i in range(parts + 1))


def patch_bounds(rows: int, columns: int, text: int, patches: int, unit: int = 1) -> tuple[int, ...]:
    """Rows at which the picture is cut so that every patch has about the same tokens, the text counted with patch 0.

    Args:
        unit: cuts lie at multiples of it.

    Raises:
        ValueError: fewer rows than patches.
    """
    whole, rows, columns = rows, rows // unit, columns * unit
    if patches > rows:
        raise ValueError(
            f"{whole} rows of tokens cannot be cut into {patches} patches" + (f" of {unit}" if unit > 1 else "")
        )
    if patches == 1:
        return (0, whole)
    share = (rows * columns + text) / patches
    first = round((share - text) / columns)
    first = max(1, min(first, rows // patches, rows - (patches - 1)))
    inner = [first + b for b in even_bounds(rows - first, patches - 1)[:-1]]
    return (0, *(unit * b for b in inner), whole)


def length(spans: Sequence[Span]) -> int:
    """Number of tokens in spans."""
    return sum(stop - start for start, stop in spans)


def part(spans: Sequence[Span], index: int, parts: int) -> tuple[Span, ...]:
    """Part ``index`` of ``parts`` of the tokens in spans, in order."""
    bounds = even_bounds(length(spans), parts)
    low, high, seen, result = bounds[index], bounds[index + 1], 0, []
    for start, stop in spans:
        a, b = max(low - seen, 0), min(high - seen, stop - start)
        if a < b:
            result.append((start + a, start + b))
        seen += stop - start
    return join(result)


def join(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Spans with neighbours that touch made one."""
    result: list[Span] = []
    for start, stop in spans:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


@dataclass(frozen=True)
class TokenLayout:
    """Says which tokens belong to which patch and shard, for one size of picture and text.

    Args:
        frames, rows, columns: the token grid.
        text: text tokens that go through the blocks (0 if none do).
        patches: number of patches, which are computed one after another or on different ranks.
        shards: number of parts of every patch, one for each rank that shares the tokens.
        text_first: the text's rows precede the picture's in joint attention.
        padding_tokens: rows that the denoiser adds behind those of the picture; they belong to the last patch.
        unit: rows that stay in one patch.
        weight: number of text tokens that is assumed when patches are cut, so that calls with shorter texts are cut in
            the same way; ``text`` if it is None.
    """

    rows: int
    columns: int
    text: int = 0
    patches: int = 1
    shards: int = 1
    frames: int = 1
    text_first: bool = False
    padding_tokens: int = 0
    unit: int = 1
    weight: int | None = None

    @property
    def tokens(self) -> int:
        """The number of image tokens, with the padding."""
        return self.frames * self.rows * self.columns + self.padding_tokens

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """Rows at which patches begin and end, ``patches + 1`` numbers."""
        text = self.text if self.weight is None else self.weight
        return patch_bounds(self.rows, self.columns, text // self.frames, self.patches, self.unit)

    @cached_property
    def _spans(self) -> dict[tuple[str, int | None, int | None], tuple[Span, ...]]:
        """Spans that were worked out before: every block asks for the same ones."""
        return {}

    @cached_property
    def row_sets(self) -> dict[Any, Any]:
        """The sets of rows of this layout that were asked for; see `RowSet.of`."""
        return {}

    def picture(self, patch: int | None, shard: int | None) -> tuple[Span, ...]:
        """Spans of picture tokens of a patch (None: of all patches) and a shard (None: of all shards)."""
        key = ("picture", patch, shard)
        if key not in self._spans:
            self._spans[key] = self._picture(patch, shard)
        return self._spans[key]

    def _picture(self, patch: int | None, shard: int | None) -> tuple[Span, ...]:
        if patch is None:
            if shard is None:
                return ((0, self.tokens),)
            return join(sorted(span for m in range(self.patches) for span in self.picture(m, shard)))
        frame, (top, bottom) = self.rows * self.columns, self.bounds[patch : patch + 2]
        parts = [(f * frame + top * self.columns, f * frame + bottom * self.columns) for f in range(self.frames)]
        if self.padding_tokens and patch == self.patches - 1:
            parts.append((self.frames * frame, self.tokens))
        whole = join(parts)
        return whole if shard is None else part(whole, shard, self.shards)

    def words(self, patch: int | None, shard: int | None) -> tuple[Span, ...]:
        """Spans of text tokens; they belong to patch 0."""
        if not self.text or (patch is not None and patch > 0):
            return ()
        whole: tuple[Span, ...] = ((0, self.text),)
        return whole if shard is None else part(whole, shard, self.shards)

    def joint(self, patch: int | None, shard: int | None) -> tuple[Span, ...]:
        """Spans in the row numbering of joint attention: picture and text one behind the other."""
        key = ("joint", patch, shard)
        if key not in self._spans:
            self._spans[key] = self._joint(patch, shard)
        return self._spans[key]

    def _joint(self, patch: int | None, shard: int | None) -> tuple[Span, ...]:
        shift_picture, shift_text = (self.text, 0) if self.text_first else (0, self.tokens)
        picture = [(a + shift_picture, b + shift_picture) for a, b in self.picture(patch, shard)]
        text = [(a + shift_text, b + shift_text) for a, b in self.words(patch, shard)]
        return tuple(text + picture if self.text_first else picture + text)
