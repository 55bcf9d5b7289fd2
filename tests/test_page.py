"""The page of a server, in a browser: what is typed is continued by all, with weights."""

import base64
import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from serving import served, until
from shared import documents_of

NAMES = ("chromium", "chromium-browser", "chrome", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")


class Tab:
    """A tab of a headless Chromium, told what to do by its debugging protocol."""

    def __init__(self, folder: Path):
        from websockets.sync.client import connect

        options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        options += ["--window-size=1100,1400", f"--user-data-dir={folder}", "about:blank"]
        self.open = contextlib.ExitStack()
        self.process = subprocess.Popen([BROWSER, *options], stderr=subprocess.DEVNULL)
        self.open.callback(self.end)
        port = folder / "DevToolsActivePort"
        until(lambda: port.exists() and port.read_text().count("\n") >= 1)
        number = port.read_text().splitlines()[0]
        pages = httpx.get(f"http://127.0.0.1:{number}/json").json()
        address = next(page for page in pages if page["type"] == "page")["webSocketDebuggerUrl"]
        self.socket, self.number = self.open.enter_context(connect(address, max_size=None)), 0
        self.said = []
        self.call("Runtime.enable")
        self.call("Log.enable")
        self.call("Network.enable")

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.said.append(answer)

    def run(self, code):
        """The value of an expression."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def end(self):
        self.process.terminate()
        self.process.wait(timeout=20)


@pytest.fixture
def tab(tmp_path):
    found = Tab(tmp_path / "profile")
    with found.open:
        yield found


def faults(tab):
    """What the browser complains of."""
    return [m for m in tab.said if m["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]


def ask(tab, text, **controls):
    for name, value in {"text": text, **controls}.items():
        tab.run(f"document.getElementById({json.dumps(name)}).value = {json.dumps(value)}")
    tab.run("document.getElementById('go').click()")
    until(lambda: not tab.run("document.getElementById('go').disabled"))


def test_a_text_is_continued_by_all(tiny, tab, tmp_path):
    with served(tiny.directory) as server:
        tab.call("Page.navigate", url=server.url)
        until(lambda: "alone (xelm:de-fr, xelm:en-es" in tab.run("document.body?.innerText ?? ''"))
        prompt = documents_of(tiny.held_out, "de")[0][:20]
        ask(tab, prompt, tokens="6", temperature="0")
        for name in ("problem", "key-field"):
            assert tab.run(f"document.getElementById('{name}').getClientRects().length") == 0
        body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "seed": 0}
        models = [model["id"] for model in server.client().models.list().to_dict()["data"]]
        wanted = {}
        for model in models:
            wanted[model] = server.post(body | {"model": model}).json()["choices"][0]
        shown = tab.run("document.getElementById('ensemble').textContent")
        assert shown == prompt + wanted["xelm"]["text"]
        alone = tab.run(
            "[...document.querySelectorAll('#experts article')].map(box => "
            "[box.querySelector('h3').textContent, box.querySelector('.text').textContent])"
        )
        assert alone == [[m.removeprefix("xelm:"), prompt + wanted[m]["text"]] for m in models[1:]]
        assert shown_of(tab, "shown-language") == "German (de), detected"
        assert shown_of(tab, "shown-router") == wanted["xelm"]["xelm"]["router"] == "detected"
        bars = tab.run("document.getElementById('bars').innerText").split()
        leader = max(wanted["xelm"]["xelm"]["weights"].items(), key=lambda item: item[1])
        assert bars[0] == leader[0] and bars[1] == f"{100 * leader[1]:.1f}"
        pieces = tab.run("document.querySelectorAll('#ensemble span[data-expert]').length")
        assert pieces >= 1
        tab.picture(Path(os.environ.get("XELM_TEST_PICTURE", tmp_path / "page.png")))
        # What is refused is told, and what is typed is text, not markup.
        ask(tab, prompt, tokens="9999")
        told = tab.run("document.getElementById('problem').textContent")
        assert "leaves this model of 64 space" in told
        ask(tab, "<img src=x onerror=document.title='broken'>ab", tokens="2")
        assert tab.run("document.title") == "xelm"
        assert tab.run("document.querySelectorAll('#results img').length") == 0
        # Nothing comes from elsewhere.
        asked = {
            message["params"]["request"]["url"]
            for message in tab.said
            if message["method"] == "Network.requestWillBeSent"
        }
        assert asked and all(url.startswith(server.url) for url in asked)
        bad = [m for m in faults(tab) if "400" not in json.dumps(m) and "favicon" not in str(m)]
        assert bad == []


def shown_of(tab, name):
    return tab.run(f"document.getElementById('{name}').textContent")


def test_the_page_says_what_the_server_says_of_the_language(tiny, tab):
    with served(tiny.directory) as server:
        tab.call("Page.navigate", url=server.url)
        until(lambda: "alone (" in tab.run("document.body?.innerText ?? ''"))
        prompt = documents_of(tiny.held_out, "de")[0][:20]
        ask(tab, prompt, tokens="4", language="es")
        assert shown_of(tab, "shown-language") == "Spanish (es), as you state"
        assert shown_of(tab, "shown-router") == "the language that you state"
        assert tab.run("document.getElementById('bars').innerText").split()[0] == "en-es"
        ask(tab, prompt, tokens="4", language="ja")
        assert shown_of(tab, "shown-language") == "Japanese (ja), as you state"
        wanted = "mixture, since no expert serves the language that you state"
        assert shown_of(tab, "shown-router") == wanted


def test_the_page_draws_a_new_random_seed_unless_one_is_given(tiny, tab):
    with served(tiny.directory) as server:
        tab.call("Page.navigate", url=server.url)
        until(lambda: "alone (" in tab.run("document.body?.innerText ?? ''"))
        prompt = documents_of(tiny.held_out, "de")[0][:20]
        drawn, said = [], []
        for _ in range(2):
            ask(tab, prompt, tokens="12", temperature="2")
            drawn.append(int(shown_of(tab, "shown-seed").split(",")[0]))
            said.append(shown_of(tab, "ensemble"))
        assert drawn[0] != drawn[1] and said[0] != said[1]
        ask(tab, prompt, tokens="12", temperature="2", seed=str(drawn[0]))
        assert shown_of(tab, "shown-seed") == str(drawn[0]) and shown_of(tab, "ensemble") == said[0]


def test_who_has_no_key_is_asked_for_it(tiny, tab):
    with served(tiny.directory, key="sesame") as server:
        tab.call("Page.navigate", url=server.url)
        until(lambda: tab.run("document.getElementById('key-field')?.getClientRects().length > 0"))
        until(lambda: "requires its API key" in shown_of(tab, "problem"))
        ask(tab, "ab", tokens="2", key="sesame", temperature="0")
        assert tab.run("document.getElementById('problem').hidden")
        assert len(tab.run("document.getElementById('ensemble').textContent")) > 2


def test_nothing_of_the_page_comes_from_elsewhere():
    page = (Path(__file__).parent.parent / "xelm/serving/page.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)\s*=|https?://|@import|url\(", page)
