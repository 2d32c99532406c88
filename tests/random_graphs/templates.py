"""Ops of one line each, written as templates with places for what is drawn."""

from __future__ import annotations

from typing import Any

from .builder import OPS, UNSUPPORTED, Builder, Op, Skip


def expressions(templates: dict[str, str], table: dict[str, Op] = OPS) -> None:
    """Registers ops of one line each: template, see `fill` -> the ATen overloads that it is there for."""
    for template, reaches in templates.items():

        def write(b: Builder, template: str = template) -> None:
            try:
                b.let(fill(b, template))
            except RuntimeError as error:  # two operands that each fit, but not one another
                raise Skip from error

        assert template not in OPS and template not in UNSUPPORTED, template
        table[template] = Op(template, write, tuple(reaches.split()))


def fill(b: Builder, template: str) -> str:
    """A template with choices in its places.

    {x} a value, {vector} one of at least one axis, {matrix} of at least two, {image} of four; behind it {dim} an
    axis, {dims} several, {y} an operand that broadcasts with it, {same} one of its shape, {mask} a mask.
    {positive} a value kept above 0.5. {flag}, {number}, {fraction}.
    """
    return template.format_map(_Places(b))


class _Places(dict[str, str]):
    """What stands in the places of one template, chosen when asked for."""

    def __init__(self, b: Builder) -> None:
        super().__init__()
        self.b = b
        self.value = ""

    def __missing__(self, place: str) -> str:
        b = self.b
        if place in _RANKS:
            self.value = self[place] = b.pick(*_RANKS[place])
            return self.value
        if place == "positive":
            self.value = b.pick()
            self[place] = (
                f"({self.value}.square() + 0.5)" if b.chance() else f"(F.softplus({self.value}) + 0.5)"
            )
            return self[place]
        if not self.value and place not in ("flag", "number", "fraction"):
            self["x"]  # what the place is about comes first
        made: Any = {
            "dim": lambda: b.axis(self.value),
            "dims": lambda: b.axes(self.value),
            "y": lambda: b.operand(self.value),
            "same": lambda: b.weight(b.shape(self.value)),
            "mask": lambda: b.mask(b.shape(self.value)),
            "flag": b.chance,
            "number": b.number,
            "fraction": b.fraction,
        }[place]()
        if place in ("dim", "dims"):
            self[place] = str(made)
        return str(made)


_RANKS = {"x": (0, 5), "vector": (1, 5), "matrix": (2, 5), "image": (4, 4)}
