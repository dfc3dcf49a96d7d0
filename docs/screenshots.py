"""The report's pictures in the README, from the records in git: `python docs/screenshots.py`. Needs Chromium.

Writes leaderboard.png and side-by-side.png beside this file.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from harness.publish import report

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {
    "leaderboard": ("#/leaderboard?task=lamp2m&method=-control+-heads%3D+-clusters", 560),
    "side-by-side": ("#/samples?group={lamp4}&order=differ", 690),
}
"""Name -> address behind the page, and height in pixels."""


def main() -> None:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("needs Chromium with chromedriver (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as folder:
        page = report.write(ROOT / "results", Path(folder) / "report")
        lamp4 = next((page.parent / "data" / "items").glob("lamp4-*.js")).stem
        browser = webdriver.Chrome(options=options, service=Service(driver))
        for name, (address, height) in PICTURES.items():
            browser.get("about:blank")
            browser.set_window_size(1280, height + 143)  # the window's own bars
            browser.get(page.as_uri() + address.format(lamp4=lamp4))
            time.sleep(1)
            browser.save_screenshot(str(Path(__file__).with_name(f"{name}.png")))
        browser.quit()


if __name__ == "__main__":
    main()
