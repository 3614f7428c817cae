"""A setting of the last release is taken by its old name, by every route, with a warning that names the new one."""

from __future__ import annotations

import logging
from functools import reduce
from pathlib import Path

import msgspec
import pytest

from tests.engine.simulation.test_sim_hardware import HEAD
from tfserve.cli_config import config_from_args, environment_settings, split_settings
from tfserve.config import RENAMED, SETTINGS, EngineConfig, config_from, load_config, nested, variable_of
from tfserve.engine.core.step_trace import read_trace
from tfserve.errors import ConfigError


def by_file(old: str, value: object, folder: Path) -> EngineConfig:
    path = folder / "serve.yaml"
    path.write_bytes(msgspec.json.encode({"model": "m", **nested({old: value})}))
    return load_config(path, {})


def by_command_line(old: str, value: object, folder: Path) -> EngineConfig:
    settings, others = split_settings(["m", "--" + old.replace("_", "-"), str(value)])
    assert others == ["m"]
    return config_from_args("m", settings, {})


def by_environment(old: str, value: object, folder: Path) -> EngineConfig:
    return config_from_args("m", [], {variable_of(old): str(value)})


def embedded(old: str, value: object, folder: Path) -> EngineConfig:
    return EngineConfig(model="m", **nested({old: value}))


def other_value(name: str) -> object:
    """A valid value that is not the default."""
    return {bool: False, int: 7, float: 0.5}[SETTINGS[name].kind]


def value_of(config: EngineConfig, name: str) -> object:
    return reduce(getattr, name.split("."), config)


@pytest.mark.parametrize("old", list(RENAMED))
@pytest.mark.parametrize("route", [by_file, by_command_line, by_environment, embedded])
def test_an_old_name_sets_the_setting_and_the_warning_names_the_new_one(route, old, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    new = RENAMED[old]
    assert SETTINGS[new].default != other_value(new)
    assert value_of(route(old, other_value(new), tmp_path), new) == other_value(new)
    (told,) = (record.getMessage() for record in caplog.records)
    assert f"{old} is called {new} now" in told


@pytest.mark.parametrize("old", list(RENAMED))
def test_both_names_at_once_are_refused_by_the_new_one(old):
    with pytest.raises(ConfigError, match="is given twice") as caught:
        config_from({"model": "m", **{name: other_value(RENAMED[old]) for name in (RENAMED[old], old)}})
    assert caught.value.key == RENAMED[old]


def test_a_later_source_beats_an_earlier_one_whichever_name_each_has(tmp_path):
    (tmp_path / "serve.yaml").write_text("model: m\nscheduler: {critical_s: 7}\n")
    path = str(tmp_path / "serve.yaml")
    assert config_from_args(path, ["--scheduler.tokenflow.low_buffer_s", "2"], {}).scheduler.tokenflow.low_buffer_s == 2
    environ = {"TFSERVE_SCHEDULER__TOKENFLOW__LOW_BUFFER_S": "3"}
    assert config_from_args(path, [], environ).scheduler.tokenflow.low_buffer_s == 3
    assert config_from_args(path, ["--scheduler.critical_s", "4"], environ).scheduler.tokenflow.low_buffer_s == 4


def test_a_new_name_without_its_section_is_an_error_that_has_the_section():
    with pytest.raises(ConfigError, match=r"did you mean scheduler\.tokenflow\.low_buffer_s\?"):
        config_from({"model": "m", "scheduler": {"low_buffer_s": 1}})


def test_a_slip_in_an_old_name_leads_to_the_new_one():
    with pytest.raises(ConfigError, match=r"did you mean scheduler\.tokenflow\.low_buffer_s\?"):
        config_from({"model": "m", "scheduler": {"critcal_s": 1}})
    with pytest.raises(ConfigError, match=r"did you mean TFSERVE_SCHEDULER__TOKENFLOW__LOW_BUFFER_S\?"):
        environment_settings({"TFSERVE_SCHEDULER__CRITCAL_S": "1"})


def test_old_names_lead_to_settings_that_exist_and_are_none_themselves():
    assert set(RENAMED.values()) <= set(SETTINGS)
    assert not set(RENAMED) & set(SETTINGS)


def test_a_section_may_be_a_struct_among_other_names():
    tokenflow = EngineConfig(model="m", scheduler={"tokenflow": {"low_buffer_s": 2.0}}).scheduler.tokenflow
    config = EngineConfig(model="m", scheduler={"tokenflow": tokenflow, "offload": False})
    assert (config.scheduler.tokenflow, config.scheduler.ablation.offload) == (tokenflow, False)
    with pytest.raises(ConfigError, match=r"scheduler\.tokenflow\.low_buffer_s: is given twice"):
        EngineConfig(model="m", scheduler={"tokenflow": tokenflow, "critical_s": 3.0})


def test_a_recorded_step_trace_is_read_by_the_names_of_its_time(tmp_path):
    recorded = {old.partition(".")[2]: other_value(new) for old, new in RENAMED.items()}
    head = {**msgspec.to_builtins(HEAD), "type": "engine", "scheduler": {"policy": "fcfs", **recorded}}
    (tmp_path / "old.jsonl").write_bytes(msgspec.json.encode(head) + b"\n")
    read = read_trace(tmp_path / "old.jsonl").head
    assert read.scheduler.policy == "fcfs"
    assert {new: reduce(getattr, new.split(".")[1:], read.scheduler) for new in RENAMED.values()} == {
        new: other_value(new) for new in RENAMED.values()
    }
    assert msgspec.structs.replace(read, scheduler=HEAD.scheduler) == HEAD
