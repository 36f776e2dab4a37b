"""What `python -m dgfast.convert` tells of a network: what was read, and what no file said."""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH = 100  # columns
_NO_BREAK = "\N{NO-BREAK SPACE}"
_HEADER = ("not in the file", "value", "because", "otherwise")


@dataclass(frozen=True)
class Assumed:
    """Something that the file does not say.

    Attributes:
        name, value: as on the command line. because: where the value is from. otherwise: how to have another.
    """

    name: str
    value: object
    because: str
    otherwise: str


def spelled(value: object) -> str:
    """A value as --set takes it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str) else json.dumps(value)


def listed(keywords: Mapping[str, object]) -> str:
    """Keywords and their values in one line, which breaks between them only."""
    return ", ".join(f"{name} {spelled(value)}".replace(" ", _NO_BREAK) for name, value in keywords.items())


def account(read: Mapping[str, str], assumed: Sequence[Assumed]) -> str:
    """The table, one fact a line; facts without text are left out."""
    facts = {name: text for name, text in read.items() if text}
    width = max(map(len, facts), default=0) + 4
    lines = [
        line.replace(_NO_BREAK, " ")
        for name, text in facts.items()
        for line in textwrap.wrap(text, _WIDTH, initial_indent=f"  {name:{width - 2}}", subsequent_indent=" " * width)
    ]
    return "\n".join(lines + (["", *_columns(assumed)] if assumed else []))


def _columns(assumed: Sequence[Assumed]) -> list[str]:
    rows = [_HEADER, *((entry.name, spelled(entry.value), entry.because, entry.otherwise) for entry in assumed)]
    name, value, _, otherwise = (max(len(row[i]) for row in rows) for i in range(4))
    because = max(_WIDTH - name - value - otherwise - 8, 24)
    lines = []
    for row in rows:
        first, *further = textwrap.wrap(row[2], because)
        lines.append(f"  {row[0]:{name}}  {row[1]:{value}}  {first:{because}}  {row[3]}".rstrip())
        lines += [" " * (name + value + 6) + line for line in further]
    return lines
