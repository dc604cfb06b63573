"""Durations in text, as kubectl prints them."""


def format_duration(seconds: float) -> str:
    """Format a duration as kubectl does: 119s, 5m10s, 11m, 4h1m, 25h, 2d2h, 10d."""
    total = max(0, int(seconds))
    minutes, hours, days = total // 60, total // 3600, total // 86400
    if total < 120:
        return f"{total}s"
    if minutes < 180:
        return _with_remainder(f"{minutes}m", total % 60, "s") if minutes < 10 else f"{minutes}m"
    if hours < 48:
        return _with_remainder(f"{hours}h", minutes % 60, "m") if hours < 8 else f"{hours}h"
    return _with_remainder(f"{days}d", hours % 24, "h") if days < 8 else f"{days}d"


def _with_remainder(text: str, remainder: int, unit: str) -> str:
    return f"{text}{remainder}{unit}" if remainder else text
