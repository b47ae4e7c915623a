"""Take the README's two screenshots from a finished run: `python docs/images/take.py RUN`.

Needs a Unix terminal (`pty`), chromium and a Chinese font (Debian: `apt-get install chromium fonts-wqy-microhei`).
`pngquant --force --ext .png 32 docs/images/*.png` makes the files small.
`report.png` is the upper part of the run's report.html, `predict.png` what predict.py prints on a terminal.
"""

import argparse
import html
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
TEXTS = (
    "1998年3月，江泽民在北京会见了比尔·盖茨。",
    "李娜出生于武汉，现在住在深圳，为新华社工作。",
)
LIGHT = {117: "#87d7ff", 120: "#87ff87", 183: "#d7afff", 216: "#ffaf87"}  # the terminal's colours of the 256 in use
TERMINAL = (
    "<meta charset=utf-8><style>body{margin:0;background:#1e1e1e}pre{margin:16px;color:#ddd;tab-size:12;"
    "font:15px/1.6 'DejaVu Sans Mono','WenQuanYi Micro Hei Mono','Noto Sans Mono CJK SC',monospace}"
    ".dim{opacity:.55;font-size:12px}</style><pre>"
)


def terminal_output(command: list[str]) -> str:
    """Return what a command prints on a terminal, escape sequences included. Raises SystemExit where it fails."""
    parts = []

    def read(descriptor: int) -> bytes:
        parts.append(os.read(descriptor, 1 << 16))
        return parts[-1]

    os.environ["TERM"] = "xterm-256color"
    if status := pty.spawn(command, read):
        raise SystemExit(f"{' '.join(command)}: ended with status {status}")
    return b"".join(parts).decode("utf-8").replace("\r\n", "\n")


def as_page(command: str, output: str) -> str:
    """Return an HTML page that shows a command and its output as a terminal would."""
    text = html.escape(output)
    text = re.sub(
        r"\x1b\[38;5;16;48;5;(\d+)m(.*?)\x1b\[0m",
        lambda match: f'<span style="color:#000;background:{LIGHT.get(int(match[1]), "#ffd787")}">{match[2]}</span>',
        text,
    )
    text = re.sub(r"\x1b\[2m(.*?)\x1b\[0m", r'<span class="dim">\1</span>', text)
    return f"{TERMINAL}$ {html.escape(command)}\n{text}</pre>"


def screenshot(page: str, image: Path, width: int, height: int) -> None:
    """Write a picture of an HTML page. Raises CalledProcessError where chromium fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={width},{height}",
        ]
        subprocess.run(["chromium", *options, f"--screenshot={image}", file.as_uri()], check=True, capture_output=True)


def main() -> None:
    """Take both screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="The folder of a finished run.")
    run = parser.parse_args().run.resolve()
    report = re.sub(r"(?:/[\w.-]+)+/(data/msra/)", r"\1", (run / "report.html").read_text("utf-8"))  # no one's folders
    screenshot(report, IMAGES / "report.png", 1000, 1120)
    output = terminal_output([sys.executable, str(ROOT / "predict.py"), "--run", str(run), *TEXTS])
    command = "python predict.py " + " ".join(f'"{text}"' for text in TEXTS)
    screenshot(as_page(command, output), IMAGES / "predict.png", 960, 300)


if __name__ == "__main__":
    main()
