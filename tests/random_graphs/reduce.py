"""A failing graph made as short as it can be while it still fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .graph import Graph, Recipe, build


def reduced(recipe: Recipe, fails: Callable[[Graph], bool]) -> Recipe:
    """The recipe without every step that the failure does not need. A graph that cannot be built does not fail."""

    def still(steps: tuple[tuple[str, int], ...]) -> bool:
        try:
            return fails(build(dataclasses.replace(recipe, steps=steps, focus=frozenset())))
        except Exception:
            return False

    steps = recipe.steps
    shorter = True
    while shorter:
        shorter = False
        for place in reversed(range(len(steps))):
            without = steps[:place] + steps[place + 1 :]
            if still(without):
                steps, shorter = without, True
    return dataclasses.replace(recipe, steps=steps, focus=frozenset()) if still(steps) else recipe
