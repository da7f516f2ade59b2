"""Sizes of memory as people write them: 512MiB, 2GiB, 1.5GB, or a number of bytes."""

import re

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
         **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}}  # fmt: skip


def parse_bytes(value: int | str) -> int:
    """Bytes, an integer >= 0. Raises ValueError for anything else, naming the units."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    if isinstance(value, bool) or match is None or match[2] not in UNITS:
        raise ValueError(f"{value!r}: expected bytes, such as 536870912 or 512MiB (units {', '.join(UNITS)[2:]})")
    return int(float(match[1]) * UNITS[match[2]]) if "." in match[1] else int(match[1]) * UNITS[match[2]]


def bytes_text(num_bytes: int) -> str:
    """A number of bytes in the largest of KiB, MiB and GiB of which there is one."""
    for name in ("GiB", "MiB", "KiB"):
        if num_bytes >= UNITS[name]:
            return f"{num_bytes / UNITS[name]:.2f} {name}"
    return f"{num_bytes} bytes"
