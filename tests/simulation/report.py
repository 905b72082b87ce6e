"""Figures that tests want to be seen: counted in each process, added up, printed in the terminal summary."""

from __future__ import annotations


class Figures:
    """Numbers by name, in the order in which they came."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.lines: list[str] = []

    def add(self, name: str, number: float) -> None:
        self.numbers[name] = self.numbers.get(name, 0) + number

    def say(self, line: str) -> None:
        """A line that stands for itself."""
        if line not in self.lines:
            self.lines.append(line)


figures = Figures()
