"""Tables that programs write into pages, each between two markers: `<!-- name:begin -->` and `<!-- name:end -->`."""

from __future__ import annotations


def insert(text: str, block: str, *, name: str) -> str:
    """Return a page with the block between the markers of that name, in place of what is there.

    Raises:
        ValueError: a marker is absent, is there twice, or they are in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"{marker} is there {text.count(marker)} times; put it exactly once where the table goes")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{end} comes before {begin}; swap them")
    return f"{before}{begin}\n\n{block.strip()}\n\n{end}{after}"
