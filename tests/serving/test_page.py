"""The page of `smalti serve` and the report, in a real Chromium.

SMALTI_SCREENSHOTS: a folder, into which what they look like is saved.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.core.atomic_io import read_json, write_json
from pipeline.core.image_io import from_png
from pipeline.sampling.model_source import EXPORT_RECORD
from pipeline.sampling.pipeline import Pipeline
from tests.serving.conftest import serving

Driver = webdriver.Chrome
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="no Chromium: make browser-packages"),
]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Driver]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Driver, server: str) -> Iterator[Driver]:
    """Just opened. Fails a test whose page said an error in the console."""
    look(chromium, 1280, "light")
    chromium.get(server)
    wait(chromium, lambda: "16 × 16" in text(chromium, "model"))
    yield chromium
    errors = [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors


def look(driver: Driver, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def wait(driver: Driver, until: object) -> None:
    assert callable(until)
    WebDriverWait(driver, 30, 0.05).until(lambda _: until())


def by_id(driver: Driver, name: str) -> WebElement:
    return driver.find_element(By.ID, name)


def text(driver: Driver, name: str) -> str:
    return by_id(driver, name).text


def screenshot(driver: Driver, name: str) -> None:
    if folder := os.environ.get("SMALTI_SCREENSHOTS"):
        height = driver.execute_script("return document.documentElement.scrollHeight")
        width = driver.execute_script("return window.innerWidth")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def generate(driver: Driver, prompt: str, seed: str, images: str = "2") -> None:
    for name, value in (("prompt", prompt), ("seed", seed), ("n", images)):
        by_id(driver, name).clear()
        by_id(driver, name).send_keys(value)
    by_id(driver, "prompt").send_keys(Keys.ENTER)
    wait(driver, lambda: f"seed {seed}" in text(driver, "status"))


def sources(driver: Driver) -> list[str]:
    return [str(image.get_attribute("src")) for image in driver.find_elements(By.CSS_SELECTOR, "#images img")]


def test_a_prompt_becomes_images_and_history_makes_the_same_again(page: Driver) -> None:
    generate(page, "red joker", "7")
    first = sources(page)
    assert len(first) == 2
    assert all(source.startswith("data:image/png") for source in first)
    page.find_element(By.XPATH, "//ol[@id='history']//button[.='Same']").click()
    wait(page, lambda: len(sources(page)) == 4 and "seed 7" in text(page, "status"))
    assert sources(page) == first * 2
    page.find_element(By.XPATH, "//ol[@id='history']//button[.='Again']").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, "#history li")) == 3)
    assert sources(page)[:2] != first
    saved = page.find_element(By.CSS_SELECTOR, "#images a[download]")
    assert str(saved.get_attribute("download")).startswith("red-joker-")
    screenshot(page, "generated")


def test_an_empty_field_turns_off_what_the_models_own_settings_turn_on(
    chromium: Driver, any_order: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(any_order, tmp_path / "own"))
    record = read_json(own / EXPORT_RECORD)
    settings = {"top_k": 1, "top_p": 0.5, "min_p": 0.25, "passes": 2}
    write_json(own / EXPORT_RECORD, record | {"sampling": record["sampling"] | settings})
    with serving(own, "--slots", "4") as (server, _):
        look(chromium, 1280, "light")
        chromium.get(server)
        wait(chromium, lambda: "16 × 16" in text(chromium, "model"))
        by_id(chromium, "settings").find_element(By.TAG_NAME, "summary").click()
        assert {name: float(str(by_id(chromium, name).get_attribute("value"))) for name in settings} == settings
        generate(chromium, "joker", "3", "1")
        for name in settings:
            by_id(chromium, name).clear()
        generate(chromium, "joker", "4", "1")
        asked = chromium.find_element(By.CSS_SELECTOR, "#history li span").text
        drawn = sources(chromium)[0]
    assert "top-k 64, top-p 1, min-p 0, passes 16" in asked
    expected = Pipeline.from_pretrained(any_order).generate(["joker"], seed=4)[0].image
    assert from_png(base64.b64decode(drawn.partition(",")[2])).tobytes() == expected.tobytes()


def test_enter_that_ends_a_word_of_an_input_method_sends_nothing(page: Driver) -> None:
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13}
    by_id(page, "n").clear()
    by_id(page, "n").send_keys("1")
    by_id(page, "prompt").click()
    page.execute_cdp_cmd("Input.imeSetComposition", {"text": "ジョーカー", "selectionStart": 5, "selectionEnd": 5})
    page.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    assert not page.find_elements(By.CSS_SELECTOR, "#images figure")
    page.execute_cdp_cmd("Input.insertText", {"text": "ジョーカー"})
    assert by_id(page, "prompt").get_attribute("value") == "ジョーカー"
    page.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    assert len(page.find_elements(By.CSS_SELECTOR, "#images figure")) == 1
    wait(page, lambda: "1 image, seed" in text(page, "status"))


def test_cancel_takes_the_images_away(page: Driver) -> None:
    stuck = "window.fetch = (_, {signal}) => new Promise((_, no) => signal.onabort = () => no(signal.reason))"
    page.execute_script(stuck)  # a tiny run is done before anybody could cancel it
    by_id(page, "prompt").send_keys("joker", Keys.ENTER)
    wait(page, lambda: by_id(page, "cancel").is_displayed())
    by_id(page, "cancel").click()
    wait(page, lambda: text(page, "status") == "cancelled")
    assert not sources(page)
    assert by_id(page, "generate").is_enabled()


def test_a_mask_is_painted_by_keys_and_by_mouse_and_filled(page: Driver) -> None:
    generate(page, "joker", "3", "1")
    page.find_element(By.XPATH, "//button[.='Change']").click()
    assert page.switch_to.active_element == by_id(page, "edit-title")
    mask = by_id(page, "mask")
    mask.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.SPACE)
    webdriver.ActionChains(page).move_to_element(mask).click_and_hold().move_by_offset(60, 60).release().perform()
    painted = "return mask.getContext('2d').getImageData(0, 0, 4, 4).data.filter((v, i) => i % 4 == 3 && v).length"
    assert page.execute_script(painted) >= 3
    screenshot(page, "mask")
    by_id(page, "seed").clear()
    by_id(page, "fill").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, "#history li")) == 2)
    assert len(page.find_elements(By.CSS_SELECTOR, "#codes canvas")) == 1
    by_id(page, "complete").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, "#history li")) == 3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(page: Driver, scheme: str) -> None:
    look(page, 390, scheme)
    generate(page, "a prompt with averyveryverylongwordthatdoesnotfitintoanyline of text", "5")
    page.find_element(By.XPATH, "//button[.='Nearest']").click()
    wait(page, lambda: len(page.find_elements(By.CSS_SELECTOR, ".nearest img")) == 4)
    page.find_element(By.XPATH, "//button[.='Change']").click()
    by_id(page, "settings").find_element(By.TAG_NAME, "summary").click()
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    buttons = "return [...document.querySelectorAll('button, input:not([type=checkbox])')].map((e) => e.offsetHeight)"
    assert all(height == 0 or height >= 44 for height in page.execute_script(buttons))  # for fingers
    assert page.execute_script(_CONTRAST) == []
    screenshot(page, f"phone-{scheme}")


# Texts with less contrast to what is behind them than WCAG 2.2 AA asks for (1.4.3): [text, ratio].
_CONTRAST = """
const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => rgb(color).slice(0, 3).map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => { for (; e; e = e.parentElement) {
  const color = getComputedStyle(e).backgroundColor;
  if ((rgb(color)[3] ?? 1) === 1) return color;
} return 'rgb(255,255,255)'; };
return [...document.querySelectorAll('body *')]
  .filter((e) => e.offsetHeight && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && !e.disabled)
  .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort().reverse();
    return [e.textContent.trim().slice(0, 40), (a + 0.05) / (b + 0.05)]; })
  .filter(([, ratio]) => ratio < 4.5);
"""


def test_a_report_fits_a_phone_and_a_desk(chromium: Driver, tiny_run: Path) -> None:
    for width, scheme in ((1280, "light"), (390, "dark")):
        look(chromium, width, scheme)
        chromium.get((tiny_run / "report" / "index.html").as_uri())
        assert chromium.execute_script("return document.documentElement.scrollWidth") <= width
        assert chromium.execute_script(_CONTRAST) == []
        broken = "return [...document.images].filter((i) => i.complete && !i.naturalWidth).length"
        assert chromium.execute_script(broken) == 0
        screenshot(chromium, f"report-{width}-{scheme}")
