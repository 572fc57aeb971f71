"""A measured figure with its interval. This module imports no numpy: a terminal command must start quickly."""

from typing import NamedTuple, TypedDict

LEVEL = 0.95  # of all intervals


class EstimateJson(TypedDict):
    """An estimate as it stands in JSON files and in the manifest."""

    value: float
    low: float | None
    high: float | None


class Estimate(NamedTuple):
    """A figure and the two ends of its 95 % interval; None where the data cannot tell an end."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Show two decimals: `0.82 [0.78, 0.85]`."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def percent(self) -> str:
        """Show a share in whole percent: `82 % [78, 85]`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.0f} %"
        return f"{100 * self.value:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    def as_json(self) -> EstimateJson:
        return {"value": self.value, "low": self.low, "high": self.high}


def estimate(figure: EstimateJson | None) -> Estimate | None:
    """Read an estimate from its JSON form; None stands for a figure that could not be measured."""
    if figure is None:
        return None
    return Estimate(figure["value"], figure.get("low"), figure.get("high"))
