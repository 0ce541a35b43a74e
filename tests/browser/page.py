"""A page of TensorBoard in headless Chromium."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_TEXT = """
function text(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (node.nodeType === Node.ELEMENT_NODE) {
    if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.tagName)) return '';
    if (!node.checkVisibility()) return '';
  }
  let all = node.tagName === 'IFRAME' && node.contentDocument ? text(node.contentDocument) : '';
  if (node.shadowRoot) all += text(node.shadowRoot);
  for (const child of node.childNodes) all += ' ' + text(child);
  return all;
}
return text(document.body);
"""
_FIND = """
function find(node, selector) {
  let all = [...node.querySelectorAll(selector)];
  for (const child of node.querySelectorAll('*')) {
    if (child.shadowRoot) all = all.concat(find(child.shadowRoot, selector));
    if (child.tagName === 'IFRAME' && child.contentDocument)
      all = all.concat(find(child.contentDocument, selector));
  }
  return all;
}
"""
_PATIENCE = 60.0


class Page:
    """What a person sees of TensorBoard, whatever shadows its parts live in."""

    def __init__(self, url: str, screenshots: Path) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert chromium, "no chromium here: apt-get install chromium"
        assert driver, "no chromedriver here: apt-get install chromium-driver"
        options = Options()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
            options.add_argument(argument)
        options.add_argument("--window-size=1500,1250")
        self._driver = webdriver.Chrome(options=options, service=Service(driver))
        self.url = url
        self._screenshots = screenshots

    def open(self, tab: str, *texts: str) -> str:
        """Go to a tab; returns all visible text once it has `texts`.

        Raises:
            AssertionError: it doesn't show them in time, with what it shows.
        """
        self._driver.get("about:blank")
        self._driver.get(f"{self.url}/?darkMode=false#{tab}")
        return self.wait_for(*texts)

    def wait_for(self, *texts: str) -> str:
        """All visible text, once it has `texts`."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            seen = " ".join(self.text().split())
            missing = [text for text in texts if text not in seen]
            if not missing:
                return seen
            assert time.monotonic() < deadline, f"{missing} not in: {seen}"
            time.sleep(0.5)

    def text(self) -> str:
        """All visible text now."""
        return str(self._driver.execute_script(_TEXT))

    def count(self, selector: str, condition: str = "true") -> int:
        """Elements that match a CSS selector and a condition in JavaScript on `e`."""
        script = f"{_FIND} return find(document, arguments[0]).filter(e => {condition}).length"
        return int(self._driver.execute_script(script, selector))

    def wait_until(self, selector: str, least: int, condition: str = "true") -> None:
        """Until there are so many elements."""
        deadline = time.monotonic() + _PATIENCE
        while (found := self.count(selector, condition)) < least:
            assert time.monotonic() < deadline, f"{found} of {least} {selector} ({condition})"
            time.sleep(0.5)

    def shoot(self, name: str) -> Path:
        """Keep a screenshot."""
        time.sleep(1.0)  # charts move into place
        file = self._screenshots / f"{name}.png"
        assert self._driver.save_screenshot(str(file))
        return file

    def close(self) -> None:
        """End Chromium."""
        self._driver.quit()
