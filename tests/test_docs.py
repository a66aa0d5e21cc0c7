"""The documents are true: examples parse, every key is named, commands exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from pydantic import BaseModel
from typer.testing import CliRunner

import confide
from client.data.findings import Code, Severity
from client.data.personal import Personal
from client.data.recipe import StepKind, load_recipe
from common.config import RunConfig, TaskKind, load_config, parse_config
from simulations.run import DEMO

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text("utf-8")
USING = (ROOT / "docs" / "using.md").read_text("utf-8")
TASKS = (ROOT / "docs" / "tasks.md").read_text("utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_complete_example_parses() -> None:
    config = parse_config(tomllib.loads(_blocks(CONFIGURATION, "toml")[0]), source="docs/configuration.md")
    assert config.run.name == "intents"
    assert config.warmup.target_epsilon < config.privacy.target_epsilon


def test_the_causal_example_parses() -> None:
    config = parse_config(tomllib.loads(_blocks(CONFIGURATION, "toml")[1]), source="docs/configuration.md")
    assert config.data.prompt == "question"


def test_every_task_has_an_example_that_parses() -> None:
    examples = [parse_config(tomllib.loads(b), source="docs/tasks.md") for b in _blocks(TASKS, "toml")]
    assert {config.task.kind for config in examples} == set(TaskKind)
    assert any(config.data.template for config in examples)
    for kind in TaskKind:
        assert kind.value in CONFIGURATION, kind


def test_every_key_is_documented_with_its_default() -> None:
    sections = re.split(r"^### \[(\w+)\]$", CONFIGURATION, flags=re.MULTILINE)
    documented = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert set(documented) == set(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.+?) \|$", documented[name], flags=re.MULTILINE)
        assert [key for key, _, _ in rows] == list(section.model_fields), name
        for key, default, meaning in rows:
            value = section.model_fields[key].default
            assert meaning.strip(), f"{name}.{key}"
            if isinstance(value, bool):
                assert default == str(value).lower()
            elif isinstance(value, int | float):
                assert float(default) == value, f"{name}.{key}"


def test_the_demo_is_a_configuration_and_within_three() -> None:
    config = load_config(DEMO)
    assert config.privacy.target_epsilon <= 3
    assert config.sites.count == 8


def test_readme_names_make_targets_that_exist() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"`?make (\w+)", readme))
    assert {"demo", "test", "check", "slow"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_commands_and_options_in_documents_exist() -> None:
    text = (
        CONFIGURATION
        + TASKS
        + USING
        + (ROOT / "README.md").read_text("utf-8")
        + (ROOT / "docs" / "privacy.md").read_text()
    )
    known = CliRunner().invoke(confide.app, ["simulate", "--help"], env={"COLUMNS": "200"}).stdout
    for option in set(re.findall(r"confide simulate[^\n`]*?(--[a-z-]+)", text)):
        assert option in known, option
    for name in ("predict", "ask", "export", "serve", "compare"):
        has = CliRunner().invoke(confide.app, [name, "--help"], env={"COLUMNS": "200"}).stdout
        for option in set(re.findall(rf"confide {name} [^\n`]*?(--[a-z-]+)", text)):
            assert option in has, option
    for command in set(re.findall(r"confide (\w+)", text)) - {"is"}:
        assert CliRunner().invoke(confide.app, [command, "--help"]).exit_code == 0, command


def test_what_the_data_document_names_exists(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    for line in re.findall(r"^confide client data (.+)$", text, flags=re.MULTILINE):
        command, *words = line.split()
        known = CliRunner().invoke(confide.app, ["client", "data", command, "--help"], env={"COLUMNS": "200"})
        assert known.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in known.stdout, line
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(_blocks(text, "toml")[0])
    assert len(load_recipe(recipe)) == 5
    for name in (*StepKind, *Code, *Personal):
        assert re.search(rf"[`\s]{name.label}[`,\s]", text), name
    for severity, column in zip(Severity, (2, 3, 4), strict=True):
        rows = [
            line.split("|") for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5
        ]
        named = {label for row in rows for label in re.findall(r"`([a-z0-9-]+)`", row[column])}
        assert named == {code.label for code in Code if code.severity is severity}


def test_every_claim_of_the_threat_model_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in found, f"{file}::{name}"
    claims_only = text.split("## Claims")[1].split("## What is not")[0]
    rows = [line for line in claims_only.splitlines() if "|" in line]
    claims = [row for row in rows if not row.startswith(("|---", "| claim |", "| it tries |"))]
    assert all("::" in row for row in claims)
