"""Figure text: a figure as people read it. Knows no report."""

NONE = "-"  # a figure that does not exist


def format_figure(value: float | None, unit: str) -> str:
    """A figure with its unit: seconds (in s, ms or us), share (in %), percent (a share in whole ones), mega (in
    millions), count or number.
    """
    if value is None:
        return NONE
    if unit == "seconds":
        return _format_seconds(value)
    if unit == "mega":
        value /= 1e6
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "percent":
        return f"{100 * value:.0f} %"
    if unit == "count" and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _format_seconds(value: float) -> str:
    """Three digits in the unit that fits; from 1,000 s on, whole seconds."""
    if abs(value) >= 999.5:
        return f"{value:,.0f} s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(value) >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{_three_digits(value * 1e6)} us" if value else "0 s"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def counted(value: float) -> str:
    """A number of things, as `format_figure` has it."""
    return format_figure(value, "count")
