"""How deviations are printed, in the table of a config and in that of a foreign layer."""

from rich.text import Text


def judged(value: float, sound: bool) -> Text:
    """Returns a deviation, in red where it is beyond its limit."""
    return Text(number(value), style="" if sound else "red")


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}"
