"""For the tests of plugins: a pool of gloo workers, tiny pipelines, plans without a machine, and comparisons.

The pytest plugin in ``plugin.py`` offers these as fixtures wherever xdit is installed. A test of a strategy takes three
lines::

    @pytest.mark.parametrize("degree", [2, 3])
    def test_it_equals_one_process(check_plan, degree):
        check_plan(["mine"], {"mine.degree": degree}, world=degree)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xdit_core.testing.checks import assert_close, check_plan, oracle_of

__all__ = ["assert_close", "check_plan", "oracle_of"]


def __getattr__(name: str) -> Any:  # pytest loads this package for its plugin, without torch
    if name not in __all__:
        raise AttributeError(f"xdit_core.testing has no {name}; it has {', '.join(__all__)}.")
    from xdit_core.testing import checks

    return getattr(checks, name)
