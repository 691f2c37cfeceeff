"""What was measured, in one JSON file that is whole after every line; a later call goes on from it."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRANSPORT = "CUDA error"  # after it a process can do nothing more on its GPU


class Results:
    """Rows by stage and name. `until`: a time on the monotonic clock after which no row is begun."""

    def __init__(self, file: Path, until: float) -> None:
        self.file, self.until = file, until

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def row(self, stage: str, name: str) -> Any:
        return self.rows.get(stage, {}).get(name)

    def keep(self, stage: str, name: str, row: Any) -> None:
        rows = self.rows
        rows.setdefault(stage, {})[name] = row
        aside = self.file.with_suffix(".part")
        aside.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        aside.replace(self.file)
        print(f"{stage} | {name} | {json.dumps({k: v for k, v in row.items() if k != 'profile'})[:600]}", flush=True)

    def measure(self, stage: str, name: str, function: Callable[[], dict[str, Any]]) -> bool:
        """Measure one row, unless it is there or the time is over; a failure is a row too. False: this process is of no further use."""
        row = self.row(stage, name)
        if (row is not None and "error" not in row) or time.monotonic() > self.until:
            return True
        begun = time.monotonic()
        try:
            row = function()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:1500], "where": traceback.format_exc()[-3000:]}
        row["seconds"] = round(time.monotonic() - begun, 1)
        self.keep(stage, name, row)
        return TRANSPORT not in row.get("error", "")
