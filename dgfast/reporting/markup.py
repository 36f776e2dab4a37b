"""HTML in which all text is escaped, whoever wrote it: what is no `Html` yet becomes text of the page."""

import html
from collections.abc import Iterable, Sequence

_VOID = {"img", "meta"}  # elements without content


class Html(str):
    """Markup that is finished. Any other string is text, and is escaped when it becomes a part of one."""


def tag(name: str, /, *content: str, **attributes: str) -> Html:
    """An element.

    Args:
        content: text, or `Html`. attributes: `class_` stands for class, `aria_label` for aria-label.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(writable(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{said}>" + ("" if name in _VOID else f"{joined(content)}</{name}>"))


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Parts one after the other; those that are text are escaped."""
    return Html(between.join(part if isinstance(part, Html) else html.escape(writable(part)) for part in parts))


def writable(text: str) -> str:
    """Text that UTF-8 has: bytes of a file's name that are none stand there as backslashes and digits."""
    return text.encode(errors="backslashreplace").decode()


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names its rows; what is wider than the page is scrolled, by keyboard too."""
    head = tag("tr", *(tag("th", heading, scope="col") for heading in headings))
    body = (tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows)
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
