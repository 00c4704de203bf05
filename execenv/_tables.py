"""What commands print on stdout: tables, lines and JSON, for people and for other programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from execenv._standard_streams import printable, write


async def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In columns: by rich on a terminal, else plain, so that other programs can cut it."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if os.isatty(1):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in head:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console()
        with console.capture() as capture:
            console.print(table)
        await write(1, capture.get().encode(errors="replace"))
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    await print_lines(
        [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in (head, *rows)
        ]
    )


async def print_lines(lines: Sequence[str]) -> None:
    text = "".join(f"{printable(line).rstrip()}\n" for line in lines)
    await write(1, text.encode(errors="replace"))


async def print_json(value: object) -> None:
    await write(1, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode(errors="replace"))
