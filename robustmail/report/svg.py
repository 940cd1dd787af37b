"""Charts for the page: bars of HTML, and SVG whose colours come from page.css."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from robustmail.markup import Html, tag
from robustmail.text import format_eps

__all__ = ["Point", "bar_chart", "bullet", "curve", "histogram", "whisker"]

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 42


@dataclass(frozen=True)
class Point:
    """An accuracy with its 95 % interval at one eps; shares in [0, 1]."""

    eps: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """The axes of a chart; x, y: the ranges that they show."""

    x: tuple[float, float]
    y: tuple[float, float]

    def pixels(self, x: float, y: float) -> tuple[float, float]:
        """Convert a value to pixels, rounded to a tenth."""
        x_share = (x - self.x[0]) / (self.x[1] - self.x[0])
        y_share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(LEFT + x_share * (WIDTH - LEFT - RIGHT), 1), round(
            HEIGHT - BOTTOM - y_share * (HEIGHT - TOP - BOTTOM), 1
        )

    def path(self, values: Iterable[tuple[float, float]]) -> str:
        """Build the `d` attribute of a path through values."""
        return "M" + "L".join("{} {}".format(*self.pixels(*value)) for value in values)

    def draw(
        self, description: str, names: tuple[str, str], ticks: tuple[dict[float, str], dict[float, str]], *marks: Html
    ) -> Html:
        """Build the chart.

        description: for screen readers.
        names: of the x and the y axis.
        ticks: {value: label} of the x and the y axis.
        marks: what is drawn between the axes.
        """
        bottom = HEIGHT - BOTTOM
        grid = [_line(self.pixels(self.x[0], y), self.pixels(self.x[1], y), "grid") for y in ticks[1]]
        texts = [_text(LEFT - 8, self.pixels(self.x[0], y)[1] + 4, text, "end") for y, text in ticks[1].items()]
        texts += [_text(self.pixels(x, self.y[0])[0], bottom + 17, text) for x, text in ticks[0].items()]
        texts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, names[0])]
        texts += [
            tag("text", names[1], text_anchor="middle", transform=f"translate(11 {(TOP + bottom) / 2}) rotate(-90)")
        ]
        axis = _line((LEFT, bottom), (WIDTH - RIGHT, bottom), "axis")
        return tag(
            "svg", tag("title", description), *grid, *marks, axis, *texts,
            viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=description, class_="plot",
        )  # fmt: skip


def curve(points: Sequence[Point], quoted: Point | None, norm: str) -> Html:
    """Draw robust accuracy against eps with its interval as a band.

    points: by increasing eps.
    quoted: the result of the evaluation at its eps, highlighted.
    norm: "linf" or "l2".
    """
    top = max([p.eps for p in points] + [quoted.eps if quoted else 0.0]) or 1.0
    frame = Frame((0.0, top * 1.03), (0.0, 1.0))
    band = [(p.eps, p.high) for p in points] + [(p.eps, p.low) for p in reversed(points)]
    marks = [tag("path", d=frame.path(band) + "Z", class_="band")]
    marks.append(tag("path", d=frame.path((p.eps, p.accuracy) for p in points), class_="line"))
    marks += [_dot(frame, p, "dot", norm) for p in points]
    if quoted:
        x, y = frame.pixels(quoted.eps, 1)
        marks.append(_line(frame.pixels(quoted.eps, 0), (x, y), "marked"))
        marks.append(_text(x + 6, y + 12, f"evaluated: {format_eps(quoted.eps)}", "start"))
        marks.append(_line(frame.pixels(quoted.eps, quoted.low), frame.pixels(quoted.eps, quoted.high), "error"))
        marks.append(_dot(frame, quoted, "quoted", norm))
    description = "Robust accuracy by eps: " + ", ".join(
        f"{100 * p.accuracy:.1f} % at {format_eps(p.eps, norm)}" for p in points
    )
    percents = {share / 4: f"{25 * share}" for share in range(5)}
    return frame.draw(
        description, (f"eps ({norm.capitalize()})", "accuracy (%)"), (_eps_ticks(top, norm), percents), *marks
    )


def histogram(groups: Mapping[str, Sequence[float]], low: float = -1.0, high: float = 1.0, bins: int = 40) -> Html:
    """Draw stacked counts of values in [low, high].

    groups: {name: values}; the name is the CSS class of its colour.
    """
    counts = {name: [0] * bins for name in groups}
    for name, values in groups.items():
        for value in values:
            counts[name][min(bins - 1, max(0, int((value - low) / (high - low) * bins)))] += 1
    tallest = max(1, *(sum(column) for column in zip(*counts.values(), strict=True)))
    frame, base = Frame((low, high), (0.0, tallest * 1.04)), [0] * bins
    marks = []
    for name, group in counts.items():
        for i, count in enumerate(group):
            if count:
                left, bottom = frame.pixels(low + (high - low) * i / bins, base[i])
                right, top = frame.pixels(low + (high - low) * (i + 1) / bins, base[i] + count)
                box = {"x": left + 0.5, "y": top, "width": round(right - left - 1, 1), "height": round(bottom - top, 1)}
                marks.append(tag("rect", **box, class_=f"fill {name}"))
                base[i] += count
    description = "Histogram of margins: " + ", ".join(f"{len(values)} {name}" for name, values in groups.items())
    marks.append(_line(frame.pixels(0, 0), frame.pixels(0, frame.y[1]), "marked"))
    xs = {x / 2: f"{x / 2:g}".replace("-", "−") for x in range(-2, 3)}
    step = max(1.0, _tick_step(tallest, 5))
    ys = {i * step: f"{i * step:,.0f}" for i in range(int(tallest / step) + 1)}
    return frame.draw(description, ("clean margin", "images"), (xs, ys), *marks)


def whisker(low: float, value: float, high: float) -> Html:
    """Draw a share with its interval on a line from 0 to 1."""
    style = f"--low:{100 * low:.2f}%;--at:{100 * value:.2f}%;--high:{100 * high:.2f}%"
    return tag("div", tag("i"), tag("b"), class_="whisker", style=style, aria_hidden="true")


def bar_chart(share: float, kind: str) -> Html:
    """Draw a share in [0, 1] as a bar; kind: the CSS class of its colour."""
    return tag(
        "div", tag("b", class_=f"fill {kind}"), class_="bar", style=f"--b:{100 * share:.2f}%", aria_hidden="true"
    )


def bullet(natural: float, robust: float) -> Html:
    """Draw natural accuracy as a wide bar and robust accuracy as a narrow bar on it, both in [0, 1]."""
    return tag(
        "div", tag("i", class_="fill natural"), tag("b", class_="fill robust"), class_="bar",
        style=f"--a:{100 * natural:.2f}%;--b:{100 * robust:.2f}%", aria_hidden="true",
    )  # fmt: skip


def _dot(frame: Frame, p: Point, kind: str, norm: str) -> Html:
    x, y = frame.pixels(p.eps, p.accuracy)
    tooltip = f"{100 * p.accuracy:.1f} % [{100 * p.low:.1f}, {100 * p.high:.1f}] at {format_eps(p.eps, norm)}"
    return tag("circle", tag("title", tooltip), cx=x, cy=y, r=6 if kind == "quoted" else 3, class_=kind)


def _line(start: tuple[float, float], end: tuple[float, float], kind: str) -> Html:
    return tag("path", d="M{} {}L{} {}".format(*start, *end), class_=kind)


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Html:
    return tag("text", text, x=x, y=y, text_anchor=anchor)


def _eps_ticks(top: float, norm: str) -> dict[float, str]:
    """Ticks from 0 to `top`: multiples of a power of two of 1/255 in l-inf, round decimals otherwise."""
    if norm == "linf" and 255 * top >= 1:
        step = 2.0 ** max(0, math.ceil(math.log2(255 * top / 5))) / 255
    else:
        step = _tick_step(top, 6)
    return {i * step: format_eps(i * step) if i else "0" for i in range(int(top / step + 1e-9) + 1)}


def _tick_step(top: float, max_ticks: int) -> float:
    """The smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... with at most `max_ticks` steps up to `top`."""
    size = 10.0 ** math.floor(math.log10(top / max_ticks))
    return next(size * factor for factor in (1, 2, 5, 10) if top / (size * factor) <= max_ticks)
