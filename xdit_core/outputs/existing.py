"""Find the results of a run that exist before it starts, on the disks of all ranks. Without torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xdit_core.outputs.names import targets
from xdit_core.outputs.results import check_writable, existing, finished, some

if TYPE_CHECKING:
    from xdit_core.plan import Plan


@dataclass(frozen=True)
class FilesThere:
    """Results that exist before the run.

    Args:
        kept: results with the wanted settings inside; ``resume=yes`` keeps them.
        replaced: all other results.
    """

    kept: frozenset[Path] = frozenset()
    replaced: frozenset[Path] = frozenset()

    @staticmethod
    def here(plan: Plan) -> FilesThere:
        """Find the results on this machine, and check that results can be written.

        Raises:
            UsageError: results cannot be written.
        """
        check_writable(plan)
        files = targets(plan.run, plan.facts.video)
        kept = finished(plan, files) if plan.run.resume else frozenset()
        return FilesThere(kept, frozenset(existing(files)) - kept)

    def to_json(self) -> str:
        """Convert to JSON, for the other ranks."""
        return json.dumps({"kept": sorted(map(str, self.kept)), "replaced": sorted(map(str, self.replaced))})

    def with_others(self, texts: Iterable[str]) -> FilesThere:
        """Combine what all ranks found: a result that one rank has is not drawn again."""
        reports = [json.loads(text) for text in texts]
        kept = frozenset(Path(path) for item in reports for path in item["kept"])
        return FilesThere(kept, frozenset(Path(path) for item in reports for path in item["replaced"]) - kept)

    def skipped(self, plan: Plan) -> frozenset[tuple[int, int]]:
        """List the pictures that need not be drawn, as (index of the prompt, number of the picture)."""
        every = range(plan.run.images)
        return frozenset(
            (index, number)
            for index, row in enumerate(targets(plan.run, plan.facts.video))
            for i, path in enumerate(row)
            if path in self.kept
            for number in (every if plan.run.output_type == "latent" else (i,))
        )

    def left(self, plan: Plan) -> int:
        """Count the results that remain to be made."""
        return sum(map(len, targets(plan.run, plan.facts.video))) - len(self.kept)

    def lines(self, plan: Plan) -> Iterator[str]:
        """Describe these results in lines for the user."""
        if plan.run.resume:
            count = len(self.kept) + self.left(plan)
            yield (
                f"{len(self.kept)} of {count} {'is' if len(self.kept) == 1 else 'are'} there with these settings; "
                f"drawing {self.left(plan) or 'nothing'}"
            )
        if self.replaced:
            hint = "" if plan.run.overwrite else "; overwrite=no would keep what is there"
            yield f"replacing {some(sorted(self.replaced))}{hint}"
