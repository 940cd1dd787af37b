"""Build HTML and SVG, for pages and notebooks.

Every text that is not `Html` is escaped, so no name in a file can become markup.
"""

from __future__ import annotations

from html import escape

from robustmail.runtime.untrusted import printable

__all__ = ["Html", "card", "table", "tag"]

VOID = {"img", "meta", "br", "link"}  # elements without an end tag


class Html(str):
    """Text that is markup, which `tag` does not escape."""

    __slots__ = ()


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """Build `<name attributes>inside</name>`; None is left out, `class_` is class, `aria_label` is aria-label."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    body = "".join(
        child if isinstance(child, Html) else escape(printable(str(child))) for child in inside if child is not None
    )
    return Html(f"<{name}{written}>" if name in VOID else f"<{name}{written}>{body}</{name}>")


def table(caption: str, heads: list[str], rows: list[list[object]], class_: str = "") -> Html:
    """Build a table; the first cell of a row is its head. The column `-graph` draws the numbers beside it."""
    names = [("", "graph") if head == "-graph" else (head, None) for head in heads]
    head = tag(
        "tr", *(tag("th", name, scope="col", class_=kind) if name else tag("td", class_=kind) for name, kind in names)
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_=kind) for cell, (_, kind) in zip(row[1:], names[1:], strict=True)),
        )
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", head),
            tag("tbody", *body),
            class_=class_ or None,
        ),
        class_="scroll",
    )


def card(title: str, *parts: object) -> Html:
    """Show a value in a notebook: a title, then tables or sentences. It has no colours, so it suits light and dark."""
    return tag("div", tag("strong", title), *(part if isinstance(part, Html) else tag("p", part) for part in parts))
