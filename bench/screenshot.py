"""Take the README's screenshot of a report from real runs, with headless Chromium.

    neko-lean demo --out demo-run
    .venv/bin/python bench/screenshot.py demo-run

The picture shows the top of the page: what was asked, the verdict, and the first examples. The examples are rows of the
data, so publish pictures of made-up data only, such as the demo's.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from neko_lean.errors import NekoLeanError
from neko_lean.reporting.page import report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def screenshot(page: Path, out: Path, *, width: int, height: int, scale: float, dark: bool) -> None:
    """Write the top `width` x `height` CSS pixels of a page as PNG, with `scale` image pixels per CSS pixel."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise NekoLeanError(f"none of {', '.join(BROWSERS)} was found; install Chromium to make a screenshot.")
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch) / "page.png"
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--window-size={width},{height}", f"--force-device-scale-factor={scale}"]
        options += [f"--user-data-dir={scratch}/profile", f"--screenshot={stage}"]
        options += ["--blink-settings=preferredColorScheme=0"] if dark else []
        result = subprocess.run([browser, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        if not stage.is_file():
            raise NekoLeanError(f"{browser} wrote no screenshot: {result.stderr.strip()[-300:]}")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stage, out)


def main() -> None:
    """Make the report, then take its screenshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run or score folders, as for `neko-lean report`")
    parser.add_argument("--out", type=Path, default=Path("docs/report.png"))
    parser.add_argument("--before", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1720)
    parser.add_argument("--scale", type=float, default=1.0, help="image pixels per CSS pixel")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "report.html"
            report(options.runs, page, before=options.before)
            screenshot(
                page, options.out, width=options.width, height=options.height, scale=options.scale, dark=options.dark
            )
    except NekoLeanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
