"""Numbers as people read them."""


def number(value: float | None, digits: int = 3) -> str:
    """A metric as people read it. The manifest holds NaN as null."""
    if value is None:
        return "nan"
    return f"{value:.3g}" if 0 < abs(value) < 1e-2 and digits == 3 else f"{value:.{digits}f}"


def interval(values: list[float | None]) -> str:
    rate, low, high = (number(value, 2) for value in values)
    return f"{rate} [{low}, {high}]"


def estimate(found: dict[str, float | None] | None) -> str:
    """value [low, high], as far as they are known; `-` for what could not be measured."""
    if found is None:
        return "-"
    values = [value for value in found.values() if value is not None]
    return interval(values) if len(values) == 3 else number(values[0] if values else None, 2)


def count(value: int) -> str:
    """A number of rows, tokens or parameters in three digits."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)  # a clock may have been put back
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {rest:02d}s"
    return f"{rest}s"
