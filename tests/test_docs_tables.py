"""The tables of the documents: keys with their defaults, figures as the measurements give them."""

import re
import sys
from pathlib import Path

import pytest
from documents import ROOT, ids

from ner import config

sys.path.append(str(ROOT / "benchmarks"))  # at the end, as it has a predict.py too
import speed_tables  # noqa: E402
import tables  # noqa: E402

READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
CONFIG_TABLES = [ROOT / "docs/config.md", ROOT / "docs/zh/config.md"]


def shown(key: str) -> str:
    """Return the default of a key as config.yaml has it."""
    default = config.FIELDS[key].default
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return f"{default:g}" if isinstance(default, float) else str(default)


def key_rows(file: Path) -> dict[str, str]:
    """Return {key: default} of the rows `| `key` | `default` | …` of a document."""
    return dict(re.findall(r"^\| `([\w.]+)` \| `([^`|]*)` \|", file.read_text("utf-8"), re.M))


@pytest.mark.parametrize("file", CONFIG_TABLES, ids=ids)
def test_every_key_of_the_config_is_listed_with_its_default(file):
    assert key_rows(file) == {key: shown(key) for key in config.FIELDS}


@pytest.mark.parametrize("file", READMES, ids=ids)
def test_the_everyday_keys_have_their_defaults(file):
    rows = key_rows(file)
    assert len(rows) == 8
    assert rows == {key: shown(key) for key in rows}


def test_tables_are_what_the_measurements_give():
    assert [str(file) for file in tables.stale_documents()] == []


def test_a_figure_of_several_runs_has_its_spread():
    assert speed_tables.figure([3542.0]) == "3,542"
    assert speed_tables.figure([1.0, 3.0, 2.0], 1) == "2.0 (1.0–3.0)"
    assert speed_tables.figure([0.7681, 0.7679], 3) == "0.768"
    assert speed_tables.quartiles([1.0, 1.1, 1.2, 1.3, 1.4]) == "1.20 (1.05–1.35)"
    assert tables.spread([0.875, 0.874, 0.872]) == "0.874 ± 0.002 (3)"


def test_a_stale_table_is_seen():
    text = "<!-- table: scores -->\n| old |\n<!-- end of table -->\n"
    assert "| old |" not in tables.filled(text, chinese=False)
