"""docs/operations.md names settings, defaults, metrics, log keys and messages: they must be those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.http.fakes import FakeEngine
from tfserve.cli_config import config_from_args
from tfserve.config import SETTINGS, EngineConfig, config_from
from tfserve.http.interval_log import interval_line
from tfserve.http.metrics import Metrics
from tfserve.memory.storage.kv_layout import KVLayout
from tfserve.settings import Setting

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "operations.md").read_text()

_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def rows(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, its head left out."""
    section = re.split(r"\n#{2,3} ", PAGE.split(f"# {heading}\n", 1)[1], maxsplit=1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def default_of(setting: Setting) -> Any:
    """The default as plain data."""
    return "required" if setting.default is msgspec.NODEFAULT else msgspec.to_builtins(setting.default)


def metrics() -> set[str]:
    """Every name that can appear in a scrape, and the family's own name."""
    shown = Metrics()
    shown.attach(FakeEngine(EngineConfig(model="m")))
    # The library adds when each counter was made.
    families = [
        family
        for family in text_string_to_metric_families(shown.render([]).decode())
        if not family.name.endswith("_created")
    ]
    samples = {family.name + suffix for family in families for suffix in _SUFFIXES[family.type]}
    return samples | {family.name for family in families if family.type == "histogram"}


def test_the_tables_name_every_setting_with_its_default_and_its_help():
    tables = [row for heading in ("Engine", "Scheduler", "Server") for row in rows(heading)]
    named = {name.strip("`"): yaml.safe_load(default) for name, default, *_ in tables}
    assert named == {
        name: list(default) if isinstance(default := default_of(setting), tuple) else default
        for name, setting in SETTINGS.items()
    }
    for name, _, says, *_ in tables:
        help_text = SETTINGS[name.strip("`")].help
        assert says.startswith(help_text), f"{name}: {help_text}"


def test_sizes_are_those_of_the_kv_layout():
    for model, shape, width, per_token, per_gib, request in rows("Sizing"):
        layers, heads, size = map(int, shape.split(","))
        layout = KVLayout.for_device(
            "cpu",
            {"2": "bfloat16", "4": "float32"}[width],
            num_layers=layers,
            block_size=32,
            num_kv_heads=heads,
            head_dim=size,
        )
        shown = [int(re.sub(r"\D", "", cell)) for cell in (per_token, per_gib, request)]
        size_bytes = layout.token_bytes
        assert shown == [size_bytes // 1024, 2**30 // size_bytes, round(1500 * size_bytes / 2**20)], model


def test_settings_named_anywhere_exist():
    named = set(re.findall(r"`((?:scheduler|server)\.[\w.]+)", PAGE))
    assert len(named) > 20
    assert named <= set(SETTINGS)


def test_settings_on_the_page_are_accepted():
    shown = re.search(r"```yaml\n(# serve.yaml.*?)```", PAGE, re.DOTALL)
    config_from(yaml.safe_load(shown[1]))
    for words in re.findall(r"tfserve serve \S+ (--.*)", PAGE):
        config_from_args("demo", words.split())


def test_metrics_named_anywhere_exist():
    named = set(re.findall(r"tfserve:\w+", PAGE))
    assert len(named) > 20
    assert named <= metrics()


def test_the_table_of_metrics_is_complete():
    families = {name.strip("`") for name, *_ in rows("Metrics")}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics() if not name.endswith(("_sum", "_count"))}
    assert families == bases


def test_the_keys_of_the_interval_line_are_explained():
    stats = FakeEngine(EngineConfig(model="m")).stats()
    line = interval_line(stats, msgspec.structs.replace(stats, num_host_blocks=11), 10.0)
    logged = set(re.findall(r"(\w+)=", line))
    explained = {key for name, *_ in rows("The interval line") for key in re.findall(r"`(\w+)`", name)}
    assert explained == logged
    example = re.search(r"^    (interval .*)$", PAGE, re.MULTILINE)
    assert set(re.findall(r"(\w+)=", example[1])) == logged


def test_the_setting_that_contributors_are_shown_is_in_the_code():
    shown = re.findall(r"^ +(\w+: Annotated\[.*)$", (ROOT / "docs" / "contributing.md").read_text(), re.MULTILINE)
    assert len(shown) == 1
    assert shown[0] in (ROOT / "tfserve" / "config.py").read_text()


def test_messages_are_those_of_the_code():
    code = "\n".join(path.read_text() for path in (ROOT / "tfserve").rglob("*.py"))
    table = rows("Messages")
    assert len(table) > 10
    for quoted, *_ in table:
        assert quoted.strip("`") in code, quoted


def test_links_between_the_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
