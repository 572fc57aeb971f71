"""Where the lines and labels of a chart stand, and the boxes and arrows of a chain."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.html.curves import Chart, Curve, Point
from pipeline.html.values import Run, State

WIDTH = 320  # of a chart, in units of its drawing
HEIGHT = 150
LEFT = 62  # room for the numbers beside the axis
RIGHT = 12
TOP = 10
BOTTOM = 22
BOX_WIDTH = 140
BOX_HEIGHT = 54
_GAP_X = 50
_GAP_Y = 26
_LANE = 16  # between arrows that go above the boxes
_PAD = 8  # beside the outermost boxes
_INIT = "init"  # the role of the parent whose weights a stage goes on from


@dataclass(frozen=True)
class Line:
    """Hold the points of a curve as SVG writes them."""

    label: str
    points: str


@dataclass(frozen=True)
class Label:
    """Hold a number at an axis, and where it stands."""

    at: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A chart with its lines and labels in place, its frame, and what it says in words."""

    title: str
    unit: str
    words: str
    lines: list[Line]
    x_labels: list[Label]
    y_labels: list[Label]
    marks: list[float]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def draw(chart: Chart, stage: str) -> Drawing:
    """Place a chart in its frame; `stage` is for its words."""
    points = [point for curve in chart.curves for point in curve.points]
    steps = [*(step for step, _ in points), *chart.marks]  # an alarm at a value that is no number has no point
    values = [value for _, value in points]
    x_scale = _Scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    y_scale = _Scale(min(values), max(values), HEIGHT - BOTTOM, TOP)
    lines = []
    for curve in chart.curves:
        placed = (f"{x_scale.place(step):.1f},{y_scale.place(value):.1f}" for step, value in curve.points)
        lines.append(Line(curve.label, " ".join(placed)))
    middle = (min(values) + max(values)) / 2
    heights = sorted({min(values), middle, max(values)})
    return Drawing(
        title=chart.title,
        unit=chart.unit,
        words=f"{chart.title} of {stage} by step. {' '.join(map(_words, chart.curves))}",
        lines=lines,
        x_labels=[Label(x_scale.place(step), f"{step:g}") for step in sorted({min(steps), max(steps)})],
        y_labels=[Label(y_scale.place(value), _short(value)) for value in heights],
        marks=[x_scale.place(step) for step in chart.marks],
    )


@dataclass(frozen=True)
class _Scale:
    """Map numbers from [low, high] to places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        if self.high == self.low:
            return (self.start + self.end) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _words(curve: Curve) -> str:
    """Say a curve in words, for those who do not see it."""
    first, *_, last = curve.points
    least = min(curve.points, key=lambda point: point[1])
    greatest = max(curve.points, key=lambda point: point[1])
    ends = f"{curve.label}: {_at(first)}, {_at(last)}"
    return f"{ends}; least {_at(least)}, greatest {_at(greatest)}."


def _at(point: Point) -> str:
    step, value = point
    return f"{_short(value)} at step {step:g}"


def _short(value: float) -> str:
    return f"{value:.3g}"


@dataclass(frozen=True)
class Box:
    """A stage in the picture of the chain; `x` and `y` are its upper left corner."""

    name: str
    type: str
    state: State
    x: float
    y: float
    width: int = BOX_WIDTH
    height: int = BOX_HEIGHT


@dataclass(frozen=True)
class Arrow:
    """An arrow from a stage to one that builds on it; `is_weights`: it goes on from its weights."""

    path: str
    is_weights: bool


@dataclass(frozen=True)
class Chain:
    """The picture of a chain: boxes and arrows, its size, and what it says in words."""

    boxes: list[Box]
    arrows: list[Arrow]
    width: float
    height: float
    words: str


def draw_chain(run: Run) -> Chain:
    """Place the stages of a run from left to right, each behind all that it builds on."""
    parents = {name: _parents_in(run, name) for name in run.stages}
    cells = _cells(parents)
    links = _links(run, parents)
    occupied = set(cells.values())
    above = {(parent, child) for parent, child, _ in links if not _is_free(cells[parent], cells[child], occupied)}
    lanes = list(dict.fromkeys(parent for parent, child, _ in links if (parent, child) in above))  # one for each parent
    top = _PAD + _LANE * len(lanes)
    corners: dict[str, tuple[float, float]] = {}
    for name, (column, row) in cells.items():
        corners[name] = (_PAD + column * (BOX_WIDTH + _GAP_X), top + row * (BOX_HEIGHT + _GAP_Y))
    arrows = []
    for parent, child, is_weights in links:
        height = _PAD + _LANE * lanes.index(parent) if (parent, child) in above else None
        arrows.append(Arrow(_path(corners[parent], corners[child], height), is_weights))
    boxes = [Box(name, run.stages[name].type, run.stages[name].state, *corners[name]) for name in run.stages]
    words = "; ".join(f"{child} from {', '.join(names)}" for child, names in parents.items() if names)
    return Chain(
        boxes=boxes,
        arrows=arrows,
        width=max(box.x for box in boxes) + BOX_WIDTH + _PAD,
        height=max(box.y for box in boxes) + BOX_HEIGHT + _PAD,
        words=words,
    )


def _parents_in(run: Run, name: str) -> list[str]:
    """Return the parents of a stage that come before it in the run, each once."""
    names = list(run.stages)
    earlier = names[: names.index(name)]
    return [parent for parent in dict.fromkeys(run.stages[name].parents.values()) if parent in earlier]


def _cells(parents: Mapping[str, list[str]]) -> dict[str, tuple[int, int]]:
    """Return the column and row of each stage: a column behind its last parent, and the first row that is free."""
    cells: dict[str, tuple[int, int]] = {}
    for name, names in parents.items():
        column = max((cells[parent][0] + 1 for parent in names), default=0)
        row = 0
        while (column, row) in cells.values():
            row += 1
        cells[name] = (column, row)
    return cells


def _links(run: Run, parents: Mapping[str, list[str]]) -> list[tuple[str, str, bool]]:
    """Return the arrows: all that carry weights, and others where no way through other stages leads there already."""
    links: list[tuple[str, str, bool]] = []
    for child, names in parents.items():
        for parent in names:
            is_weights = run.stages[child].parents.get(_INIT) == parent
            others = [other for other in names if other != parent]
            if is_weights or not any(_leads(parent, other, parents) for other in others):
                links.append((parent, child, is_weights))
    return links


def _leads(start: str, end: str, parents: Mapping[str, list[str]]) -> bool:
    """Tell whether a stage builds on another one, at any distance."""
    return any(parent == start or _leads(start, parent, parents) for parent in parents[end])


def _is_free(start: tuple[int, int], end: tuple[int, int], occupied: set[tuple[int, int]]) -> bool:
    """Tell whether an arrow crosses no box: it leaves its row right before its end."""
    return all((column, start[1]) not in occupied for column in range(start[0] + 1, end[0]))


def _path(start: tuple[float, float], end: tuple[float, float], height: float | None) -> str:
    """Draw an arrow from the right side of a box to the left side of another; `height`: where it goes above them."""
    x1 = start[0] + BOX_WIDTH
    y1 = start[1] + BOX_HEIGHT / 2
    x2 = end[0] - 6  # the arrowhead's length
    y2 = end[1] + BOX_HEIGHT / 2
    turn = end[0] - _GAP_X + 10
    if height is None:
        half = (turn + x2) / 2
        return f"M{x1:g},{y1:g} H{turn:g} C{half:g},{y1:g} {half:g},{y2:g} {x2:g},{y2:g}"
    return f"M{x1:g},{y1:g} h8 V{height:g} H{turn + 14:g} V{y2 - 8:g} Q{turn + 14:g},{y2:g} {x2:g},{y2:g}"
