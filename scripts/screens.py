"""Make the pictures in the docs: python -m scripts.screens docs.

They show ``status`` and ``report`` of a job after a few minutes of disturbances. Needs Chromium for
the report.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from elastic_ckpt.cli.status.page import page
from elastic_ckpt.cli.status.view import StatusView
from scripts.night.run import Night

COLUMNS = 100
STEPS_BETWEEN = 150
BROWSER_SECONDS = 120


def main() -> None:
    """Make all pictures."""
    target = Path(sys.argv[1])
    folder = Path(tempfile.mkdtemp(prefix="night-"))
    night = Night(folder, STEPS_BETWEEN)
    try:
        night.pass_by()
        write_svg(night.view(), "elastic-ckpt status gpt", target / "status.svg")
        report = folder / "report.html"
        command = [sys.executable, "-m", "elastic_ckpt", "report", str(night.directory)]
        subprocess.run([*command, "-o", str(report)], check=True)
        photograph(report, target / "report.png", 1180, 2000)
        photograph(report, target / "report-phone.png", 390, 1400)
        night.leave()  # if killed, it would leave its semaphores behind
    finally:
        night.close()
        shutil.rmtree(folder, ignore_errors=True)


def write_svg(view: StatusView, title: str, path: Path) -> None:
    """Write the page, short and whole, as a terminal shows it, without rich's web font."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True)
    console.print(Text(f"$ {title}", "bold"), page(view, COLUMNS), "", sep="\n")
    console.print(Text(f"$ {title} -v", "bold"), page(view, COLUMNS, verbose=True), sep="\n")
    svg = console.export_svg(title=title)
    svg = re.sub(r"@font-face\s*{.*?}", "", svg, flags=re.DOTALL)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def photograph(page_path: Path, path: Path, width: int, height: int) -> None:
    """Write a picture of the top of a page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={profile}", f"--window-size={width},{height}",
            f"--screenshot={path.resolve()}", page_path.resolve().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=BROWSER_SECONDS)


if __name__ == "__main__":
    main()
