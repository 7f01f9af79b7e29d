"""The page of `effnet serve` as a picture for the documentation: real weights, a real photograph, a real browser.

    python benchmarks/serve_page.py [--model efficientnet_lite0.in1k] [--out docs/figures/serve_page.png]

Needs Debian's chromium and playwright.
"""

import argparse
import importlib.resources
import json
import shutil
import subprocess
import sys

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="efficientnet_lite0.in1k")
    parser.add_argument("--photo", default="coffee.png", help="of scikit-image")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    parser.add_argument("--out", default="docs/figures/serve_page.png")
    options = parser.parse_args()
    command = [sys.executable, "-m", "effnet", "serve", options.model, "--port", "0", "--workers", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            photograph(url, str(importlib.resources.files("skimage") / "data" / options.photo), options)
        finally:
            server.terminate()


def photograph(url: str, photo: str, options: argparse.Namespace) -> None:
    """Asks about the photo twice (the first answer pays for the first map) and takes the picture."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1060, "height": 400}, color_scheme=options.scheme)
        page.goto(url)
        for _ in range(2):
            page.get_by_label("choose a file").set_input_files(photo)
            page.get_by_text("in the model").wait_for()
        page.wait_for_timeout(600)  # the bars grow
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=options.out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
