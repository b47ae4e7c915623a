"""How a browser takes the page of a run: no errors, no requests, no scrolling sideways on a phone."""

import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from pages import EVIL, fill, sentence

from ner import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<!DOCTYPE html><title>?</title><iframe src="report.html" style="width:360px;height:700px"></iframe><script>
onload = () => { const root = document.querySelector("iframe").contentDocument.documentElement;
  document.title = [root.scrollWidth, root.clientWidth].join("/"); }</script>"""
CONTROL = """<!DOCTYPE html><link rel="icon" href="data:,"><img src="http://elsewhere.test/picture.png">
<script>console.error("control"); nothing.here()</script>"""


@pytest.fixture
def run(tmp_path):
    return fill(tmp_path / "20240506-104917")


@pytest.fixture
def site(run):
    """The run folder served on a local port: (port, paths asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(run))

        def log_message(self, *_):
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (Debian: apt-get install chromium)")
def test_in_a_browser(run, site, tmp_path):
    port, asked = site
    evil = sentence(f"{EVIL}江泽民在北京" * 2, [("LOC", 2, 9), ("PERSON", 70, 73)], [("PERSON", 71, 74)])
    (run / "predictions.jsonl").write_text("".join(json.dumps(evil) + "\n" for _ in range(9)))
    report.write(run)
    (run / "measure.html").write_text(MEASURE)
    (run / "control.html").write_text(CONTROL)

    def browse(page, *options):
        """Opens a page with every host name leading to the local server; returns the finished process, paths asked."""
        asked.clear()
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--hide-scrollbars",
                "--enable-logging=stderr",
                f"--user-data-dir={tmp_path / 'profile'}",
                f"--host-resolver-rules=MAP *.test 127.0.0.1:{port}",
                *options,
                f"http://127.0.0.1:{port}/{page}",
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, list(asked)

    done, paths = browse("control.html", "--dump-dom")
    assert "CONSOLE" in done.stderr and "/picture.png" in paths, "the test does not see errors or requests"

    for name, size in (("desktop", "1280,2400"), ("phone", "390,2400")):
        picture = tmp_path / f"{name}.png"
        done, paths = browse("report.html", f"--screenshot={picture}", f"--window-size={size}")
        assert paths == ["/report.html"]
        assert "CONSOLE" not in done.stderr, done.stderr
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 20_000

    done, _ = browse("measure.html", "--dump-dom", "--virtual-time-budget=5000")
    needed, given_width = map(int, re.search(r"<title>(\d+)/(\d+)</title>", done.stdout).groups())
    assert 300 < needed <= given_width, "the page scrolls sideways on a phone"
