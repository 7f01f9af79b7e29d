"""The page of the service in a real Chromium, with a real server behind it."""

import shutil
import signal
from collections.abc import Generator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.conftest import missing
from tests.test_serve import LABELS, PATIENCE_S, Server, png, saved, serving

NAMES = ("<b>cat</b>", *LABELS[1:])  # whatever a class is called, it is text


def chromium() -> str:
    """Debian's Chromium; skips without it, and fails where CI is set."""
    path = shutil.which("chromium")
    if path is None:
        missing("chromium is not installed (apt-get install chromium)")
    return path


@pytest.fixture(scope="module")
def browser() -> Generator[Browser]:
    path = chromium()
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    folder = tmp_path_factory.mktemp("page")
    model = saved(folder / "small.safetensors", NAMES)
    with serving(model, "--workers", 1, "--max-mb", 1, stderr=folder / "log") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Generator[Page]:
    """The page, opened; whatever it complains of, or asks of another address, is an error at the end."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, reduced_motion="reduce")
    context.set_default_timeout(1e3 * PATIENCE_S)
    expect.set_options(timeout=1e3 * PATIENCE_S)
    page, complaints, addresses = context.new_page(), [], set()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: addresses.add(urlsplit(request.url)[:2]))
    page.goto(server.url)
    expect(page.get_by_role("status").filter(has_text="ready")).to_be_visible()
    yield page
    context.close()
    assert {scheme for scheme, _ in addresses} <= {"http", "data", "blob"}
    assert {place for scheme, place in addresses if scheme == "http"} == {urlsplit(server.url).netloc}
    known = ("status of 4", "ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")
    assert not [text for text in complaints if not any(word in text for word in known)]


def choose(page: Page, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    page.get_by_label("choose a file").set_input_files(file)


def classes(page: Page) -> list[tuple[str, str]]:
    """Name and percentage of each bar, from the top."""
    rows = [row.inner_text().split("\n") for row in page.get_by_role("listitem").filter(has_text="%").all()]
    return [(row[0], row[-1]) for row in rows]


def test_a_chosen_image_shows_the_classes_that_the_service_answers(page: Page, server: Server, tmp_path: Path) -> None:
    assert NAMES[0] == "<b>cat</b>"
    expect(page.get_by_text("small, PyTorch float32 · 32 × 32 px · 5 classes")).to_be_visible()
    choose(page, tmp_path / "one.png", png(1))
    expect(page.get_by_text("in the model")).to_be_visible()
    (result,) = server.predict(png(1)).json()["results"]
    wanted = [(row["label"], f"{100 * row['probability']:.1f} %") for row in result["predictions"]]
    assert classes(page) == wanted
    widths = page.locator(".bar i").evaluate_all("bars => bars.map(b => b.getBoundingClientRect().width)")
    shares = [row["probability"] / result["predictions"][0]["probability"] for row in result["predictions"]]
    assert [width / widths[0] for width in widths] == pytest.approx(shares, abs=0.02)
    page.get_by_label("Show").select_option("3")
    expect(page.get_by_role("listitem").filter(has_text="%")).to_have_count(3)


def test_the_map_lies_on_the_image_and_follows_slider_and_class(page: Page, tmp_path: Path) -> None:
    choose(page, tmp_path / "wide.png", png(1, height=100, width=300))
    heat, photo = page.locator("#heat"), page.get_by_role("img", name="the image: wide.png")
    expect(heat).to_be_visible()
    assert heat.bounding_box() == photo.bounding_box()
    assert page.evaluate("getComputedStyle(heat).opacity") == "0.55"
    page.get_by_role("slider", name="Evidence").fill("20")
    assert page.evaluate("getComputedStyle(heat).opacity") == "0.2"
    first, second = (name for name, _ in classes(page)[:2])
    expect(page.get_by_role("button", name=first)).to_have_attribute("aria-pressed", "true")
    before = heat.get_attribute("src")
    page.get_by_role("button", name=second).click()
    expect(page.get_by_role("button", name=second)).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#which")).to_have_text(second)
    assert heat.get_attribute("src") != before


def test_everything_works_with_the_keyboard_alone(page: Page) -> None:
    def focused() -> str:
        return page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id")

    def press_tab_until(word: str) -> None:
        for _ in range(20):
            page.keyboard.press("Tab")
            if word in focused():
                return
        pytest.fail(f"{word} is not reached")

    press_tab_until("file")
    page.keyboard.press("Tab")
    assert focused() == "cat"
    page.keyboard.press("Enter")
    expect(page.get_by_text("in the model")).to_be_visible()
    second = classes(page)[1][0]
    press_tab_until(second)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "focus must be seen"
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name=second)).to_have_attribute("aria-pressed", "true")
    assert second in focused(), "focus stays where it was"
    page.get_by_role("slider").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_text("60 %", exact=True)).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_a_phones_width_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # ty: ignore[invalid-argument-type]
    page.set_viewport_size({"width": 320, "height": 640})
    page.get_by_role("button", name="coffee").click()
    expect(page.get_by_text("in the model")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    boxes = [page.locator(name).bounding_box() for name in ("#view", "#found", "#pick")]
    tops = [box["y"] for box in boxes if box]
    assert tops == sorted(tops) and len(tops) == 3, "the image, then what was found"
    for name in ("--ink", "--soft", "--accent", "--bad"):
        for under in ("--paper", "--panel"):
            assert contrast(page, name, under) >= 4.5, (name, under)
    assert contrast(page, "--on-accent", "--accent") >= 4.5


def contrast(page: Page, one: str, other: str) -> float:
    """WCAG 2's contrast ratio of two colours of the page."""

    def luminance(name: str) -> float:
        value = page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", name).strip()
        digits = value[1:] if len(value) == 7 else "".join(2 * digit for digit in value[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def test_a_wrong_file_is_explained_and_the_next_one_works(page: Page, tmp_path: Path) -> None:
    alert = page.get_by_role("alert")
    choose(page, tmp_path / "notes.jpg", b"not an image at all")
    expect(alert).to_contain_text("is not a JPEG, PNG, WebP, BMP, TIFF or GIF image")
    expect(page.get_by_role("button", name="Try again")).to_be_hidden()
    expect(page.locator("#view")).to_be_hidden()
    choose(page, tmp_path / "torn.png", png()[:90])
    expect(alert).to_contain_text("truncated")
    choose(page, tmp_path / "large.png", b"\0" * 1_500_000)
    expect(alert).to_contain_text("1.5 MB; the limit is 1.0 MB")
    choose(page, tmp_path / "good.png", png())
    expect(page.get_by_text("in the model")).to_be_visible()
    expect(alert).to_be_hidden()
    assert len(classes(page)) == 5


def test_a_dropped_file_is_taken(page: Page) -> None:
    data = page.evaluate_handle(
        """async bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
            return data;
        }""",
        list(png(2)),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": data})
    expect(page.get_by_role("img", name="the image: dropped.png")).to_be_visible()
    expect(page.get_by_text("in the model")).to_be_visible()


def test_a_server_that_goes_away_is_said_and_the_image_is_tried_again(browser: Browser, tmp_path: Path) -> None:
    """The last test: it needs a server of its own, twice."""
    model = saved(tmp_path / "small.safetensors", NAMES)
    context = browser.new_context()
    context.set_default_timeout(1e3 * PATIENCE_S)
    page = context.new_page()
    with serving(model, "--workers", 1, stderr=tmp_path / "log") as server:
        page.goto(server.url)
        expect(page.get_by_role("status").filter(has_text="ready")).to_be_visible()
        workers = server.workers
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        server.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))  # nobody is left behind
    choose(page, tmp_path / "kept.png", png())
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer. Your image is kept")
    expect(page.get_by_role("status").filter(has_text="no answer from the server")).to_be_visible()
    port = urlsplit(server.url).port
    with serving(model, "--workers", 1, "--port", port, stderr=tmp_path / "log"):
        expect(page.get_by_role("status").filter(has_text="ready")).to_be_visible()  # without being asked
        page.get_by_role("button", name="Try again").click()
        expect(page.get_by_text("in the model")).to_be_visible()
        expect(page.get_by_role("alert")).to_be_hidden()
        assert len(classes(page)) == 5
    context.close()
