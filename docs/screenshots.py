"""The pictures of docs/, from the records in git: `python docs/screenshots.py [FOLDER]`. Needs Chromium, and no network.

Writes the pictures that the pages show beside this file, the report's and the site's, some of them 480 pixels wide as a phone
is; with FOLDER, every view of the report at 1400 and at 480 pixels into it, to be looked at before a release.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from harness.publish import report

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SHOWN = {
    "leaderboard": ("#/leaderboard?model=tiny&task=lamp2m&controls=no", 1280, 640),
    "leaderboard-480": ("#/leaderboard?model=tiny&task=lamp2m&controls=no", 480, 640),
    "side-by-side": ("#/samples?group={lamp4}&order=differ", 1280, 690),
    "side-by-side-480": ("#/samples?group={lamp4}&order=differ", 480, 690),
}
"""Pictures of the pages: name -> address behind the report, width and height in pixels."""
VIEWS = {
    "leaderboard": "#/leaderboard",
    "side-by-side": "#/samples?group={lamp4}&order=differ",
    "trade-off": "#/trade-off",
    "run": "#/run?run={dps}",
}
WIDTHS = {1400: 1000, 480: 900}
"""Width -> height, in pixels."""


def main(folder: Path | None) -> None:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("needs Chromium with chromedriver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(driver))

    def picture(address: str, width: int, height: int, path: Path) -> None:
        browser.get("about:blank")
        # a window is never narrower than 500 pixels; what the page is told is
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(address)
        time.sleep(1)
        browser.save_screenshot(str(path))
        print(path)

    with tempfile.TemporaryDirectory() as made:
        page = report.write(ROOT / "results", Path(made) / "report")
        lamp4 = next((page.parent / "data" / "items").glob("lamp4-*.js")).stem
        dps = "tiny/lamp4/dps-fd736aeb"
        for name, (address, width, height) in SHOWN.items():
            picture(page.as_uri() + address.format(lamp4=lamp4), width, height, DOCS / f"{name}.png")
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", f"{made}/site"]
        subprocess.run(command, cwd=ROOT, check=True)
        start = (Path(made) / "site" / "index.html").as_uri()
        for width, height in WIDTHS.items():
            picture(start, width, height, DOCS / f"site-{width}.png")
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                for name, address in VIEWS.items():
                    where = page.as_uri() + address.format(lamp4=lamp4, dps=dps)
                    picture(where, width, height, folder / f"{name}-{width}.png")
    browser.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
