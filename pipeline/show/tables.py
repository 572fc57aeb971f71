"""Numbers as people read them."""


def number(value: float | None, digits: int = 3) -> str:
    """Show a metric. The manifest holds NaN as null."""
    if value is None:
        return "nan"
    if digits == 3 and 0 < abs(value) < 1e-2:
        return f"{value:.3g}"
    return f"{value:.{digits}f}"


def count(value: int) -> str:
    """Show a number of rows, tokens or parameters in three digits."""
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


def about(seconds: float) -> str:
    """Show a time that is foretold: in seconds, minutes, hours or days, of two digits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds:.2g}'):g} s"
