"""python -m dgfast.guidance: the table of all guidances in docs/guidance.md, of what they declare."""

import re

from dgfast.guidance import GUIDANCES, Guidance, LossGuidance


def table() -> str:
    """One row a guidance, in Markdown."""
    rows = ["| guidance | options | cost a call | use it |", "|---|---|---|---|"]
    shown: list[type[Guidance]] = [*GUIDANCES, LossGuidance]
    for guidance in shown:
        options = ", ".join(f"`--{one.name.replace('_', '-')}`" for one in guidance.options())
        anchor = re.sub(r"[^a-z0-9-]", "", guidance.name.lower().replace(" ", "-"))
        link = f"[{guidance.name}](#{anchor})"
        rows.append(f"| {link} | {options or 'from Python alone'} | {guidance.cost} | {guidance.use} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
