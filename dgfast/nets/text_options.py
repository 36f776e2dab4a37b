"""Lists of numbers that guided-diffusion's options give as text."""

import math


def numbers(option: object, name: str) -> list[float]:
    """The numbers of "16,8", of a lone 16, which JSON and command lines make of "16", or of a list of them.

    Raises:
        ValueError: anything else; `name` says of which option.
    """
    items = option.split(",") if isinstance(option, str) else option if isinstance(option, list | tuple) else [option]
    return [_number(item, option, name) for item in items if item != ""]


def _number(item: object, option: object, name: str) -> float:
    try:
        value = float(item) if isinstance(item, int | float | str) and not isinstance(item, bool) else math.nan
        if not math.isfinite(value):
            raise ValueError(item)
        return int(value) if value.is_integer() else value
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name} {option!r:.40} must be numbers, such as 16,8") from error
