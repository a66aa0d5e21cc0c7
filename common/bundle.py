"""A job as sites approve it: one Flower bundle that says all of it, known by its SHA-256.

A bundle holds exactly three files: `job.toml`, the resolved configuration without anybody's paths;
`pyproject.toml`, as Flower wants it; and `confide_job.py`, two lines that point to the server's installed
program. A site reads `job.toml` out of the bytes and never imports or unpacks anything: it runs the client
that it has installed. So approving a hash approves everything that the server may ask for.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tomllib
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tomli_w

from common.config import RunConfig, parse_config, refuse_study
from common.errors import ConfigError

JOB_FILE = "job.toml"
PROJECT_FILE = "pyproject.toml"
MODULE_FILE = "confide_job.py"
MAX_BUNDLE_BYTES = 1024 * 1024
MAX_FILE_BYTES = 256 * 1024
_FLOWER_FILES = frozenset({".info/CONTENT", ".info/VERSION"})
_ID = re.compile(r"[0-9a-f]{16}")

_MODULE = '''\
"""The server's part of a job. Sites import nothing from a bundle: they run the client that they installed."""

from server.deployed import app, site

__all__ = ["app", "site"]
'''
_PROJECT = {
    "project": {
        "name": "confide-job",
        "version": "1.0.0",
        "description": "A federated fine-tuning job",
        "license": "LicenseRef-Proprietary",
        "dependencies": [],
    },
    "tool": {
        "flwr": {
            "app": {
                "publisher": "confide",
                "fab-include": [JOB_FILE, MODULE_FILE],
                "components": {"serverapp": "confide_job:app", "clientapp": "confide_job:site"},
                "config": {"job": ""},
            }
        }
    },
}


@dataclass(frozen=True)
class Bundle:
    """What a bundle says. digest: SHA-256 of its bytes, hex, by which sites know it."""

    job: str  # 16 hex digits: the run, in every ledger and message, however often it is restarted
    config: RunConfig
    digest: str
    texts: dict[str, str]  # the three files


def public_config(config: RunConfig) -> RunConfig:
    """The configuration without what is the server's own business: where its public records lie."""
    own = {"sample": None, "train": None, "test": None, "group": None}
    return config.model_copy(update={"data": config.data.model_copy(update=own)})


def make_bundle(job: str, config: RunConfig) -> bytes:
    """The same bytes each time for one job and one resolved configuration.

    Raises:
        ConfigError: the configuration is a study's.
    """
    from flwr.cli.build import build_fab_from_files  # half a second, and only the server builds

    refuse_study(config)
    said = {"job": {"id": job}, **tomllib.loads(public_config(config).to_toml())}
    project = tomllib.loads(tomli_w.dumps(_PROJECT))
    project["tool"]["flwr"]["app"]["config"]["job"] = job
    files = {
        PROJECT_FILE: tomli_w.dumps(project).encode(),
        JOB_FILE: tomli_w.dumps(said).encode(),
        MODULE_FILE: _MODULE.encode(),
    }
    data, _ = build_fab_from_files(files)
    return data


# What `zipfile` and the decompressors behind it raise on bytes that are none of theirs.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


def read_bundle(data: bytes) -> Bundle:
    """What the bundle says, read from its bytes alone.

    Raises:
        ConfigError: it is no bundle of a job, holds more than one, or its configuration is not valid.
    """
    if len(data) > MAX_BUNDLE_BYTES:
        raise ConfigError(f"a bundle has at most {MAX_BUNDLE_BYTES} bytes, found {len(data)}")
    digest = hashlib.sha256(data).hexdigest()
    try:
        texts = {name: _text(name, raw) for name, raw in _files(data)}
    except _UNREADABLE as error:
        raise ConfigError(f"{digest[:12]} is no bundle of a job: {error!s:.200}") from None
    if texts.keys() != {JOB_FILE, PROJECT_FILE, MODULE_FILE}:
        found = ", ".join(sorted(texts)) or "nothing"
        raise ConfigError(
            f"a job's bundle holds {JOB_FILE}, {PROJECT_FILE} and {MODULE_FILE} and nothing else, found "
            f"{found[:200]} in {digest[:12]}: have the server's people submit it with confide server submit"
        )
    try:
        fields: dict[str, Any] = tomllib.loads(texts[JOB_FILE])
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{JOB_FILE} of bundle {digest[:12]} is not valid TOML: {error!s:.200}") from None
    named = fields.pop("job", None)
    job = named.get("id") if isinstance(named, dict) and named.keys() == {"id"} else None
    if not isinstance(job, str) or not _ID.fullmatch(job):
        raise ConfigError(f"{JOB_FILE} of bundle {digest[:12]} must have job.id, 16 hex digits")
    config = parse_config(fields, source=f"{JOB_FILE} of bundle {digest[:12]}")
    refuse_study(config)
    if config.data != public_config(config).data:
        raise ConfigError(f"{JOB_FILE} of bundle {digest[:12]} names files: a job names none")
    return Bundle(job, config, digest, texts)


def _files(data: bytes) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if len(infos) > 8 or len({info.filename for info in infos}) != len(infos):
            raise ValueError("more files than a job has, or one name twice")
        for info in infos:
            if info.file_size > MAX_FILE_BYTES:
                raise ValueError(f"{info.filename[:80]!r} has {info.file_size} bytes")
            if info.filename not in _FLOWER_FILES:
                with archive.open(info) as file:
                    raw = file.read(MAX_FILE_BYTES + 1)
                if len(raw) != info.file_size:
                    raise ValueError(f"{info.filename[:80]!r} is not as long as it says")
                yield info.filename, raw


def _text(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name[:80]!r} is no text") from None


def changes(old: Bundle | None, new: Bundle) -> list[tuple[str, str, str]]:
    """What differs, for people: (key, before, now), a line for each key; "" where there was or is none."""
    before = {} if old is None else _flat(old)
    now = _flat(new)
    keys = sorted(before.keys() | now.keys())
    return [(key, before.get(key, ""), now.get(key, "")) for key in keys if before.get(key) != now.get(key)]


def _flat(bundle: Bundle) -> dict[str, str]:
    found = {"job": bundle.job}
    for section, keys in bundle.config.model_dump(mode="json", exclude_none=True).items():
        found |= {f"{section}.{key}": repr(value) for key, value in keys.items()}
    for name in (PROJECT_FILE, MODULE_FILE):
        digest = hashlib.sha256(bundle.texts[name].encode()).hexdigest()
        found[name] = f"{len(bundle.texts[name])} characters, SHA-256 {digest[:16]}"
    return found
