"""One line of a diagnosis."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was looked at, what was seen, and what to do about it.

    Attributes:
        check: What was looked at.
        level: "error" is what stops a job or makes its results depend on the node that did the work.
        message: What was seen, in one line.
        remedy: What to do; "" where there is nothing to.
    """

    check: str
    level: Level
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.level:<9}{self.check:<14}{' '.join(self.message.split())}" + (self.remedy and f": {self.remedy}")


def worst(check: str, ok: str, findings: list[Finding]) -> list[Finding]:
    """The findings, or one that says that all is well.

    Args:
        check: What was looked at.
        ok: The message where nothing was found.
        findings: What was found.
    """
    return findings or [Finding(check=check, level="ok", message=ok)]
