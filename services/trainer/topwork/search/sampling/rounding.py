"""Rounding of sampled values."""

import math

from topwork.spec.search import Parameter

DIGITS = 5
"""Significant digits of a sampled value: more of them make no difference, but are hard to read."""


def round_value(parameter: Parameter, value: float) -> float:
    """Round a sampled value to a few digits within its bounds.

    Args:
        parameter: A parameter with uniform or logUniform.
        value: The value.

    Example:
        >>> round_value(Parameter(log_uniform=(1e-5, 1e-2)), 0.000123456789)
        0.00012346
    """
    low, high = parameter.uniform or parameter.log_uniform or (value, value)
    scale = high - low if parameter.uniform else value
    digits = DIGITS - 1 - math.floor(math.log10(scale))
    return min(max(round(value, digits), low), high)
