"""`server.toml`: where a federation's server listens. Only the gate can be reached from outside."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.errors import ConfigError
from common.explain import explain, keys_of

Port = Annotated[int, Field(strict=True, ge=1, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gate(_Section):
    """The only thing that sites, or anybody else, can reach: Flower's Fleet API, over TLS."""

    address: str = "localhost:9092"  # host:port by which sites reach it: what their kits say
    host: str = "0.0.0.0"
    port: Port = 9092
    max_message_mb: Annotated[int, Field(strict=True, ge=1, le=2048)] = 1024  # of one request of a site
    embedded: bool = True  # false: a proxy of your own does it, as in deploy/


class Local(_Section):
    """Bound to this machine's loopback, always: who reaches the control port can start jobs."""

    superlink_port: Port = 9093
    health_port: Port = 9094  # gRPC health of SuperLink
    superexec_health_port: Port = 9095
    status_port: Port = 8080  # the status page and /metrics


class ServerSettings(_Section):
    gate: Gate = Gate()
    local: Local = Local()

    @model_validator(mode="after")
    def _apart(self) -> ServerSettings:
        ports = [self.gate.port, *self.local.model_dump().values()]
        if len(set(ports)) != len(ports):
            raise ValueError(f"local: every port must be another, found {ports}")
        return self


def template(host: str, port: int) -> str:
    """The settings of a new federation. host: by which sites reach it."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"""\
# How this machine serves the federation.

[gate]                        # what the network sees: Flower's Fleet API over TLS, and nothing else
address = "{address}"  # by which sites reach it: their kits say so
host = "0.0.0.0"
port = {port}
max_message_mb = 1024

[local]                       # on the loopback only
superlink_port = {port + 1}
health_port = {port + 2}
superexec_health_port = {port + 3}
status_port = {port + 4}            # the status page, and /metrics for Prometheus
"""


def load_server_settings(path: Path) -> ServerSettings:
    """Raises ConfigError: naming the key, what was found and the nearest right key."""
    if not path.is_file():
        raise ConfigError(f"no settings at {path}: confide server init makes them")
    try:
        return ServerSettings.model_validate(tomllib.loads(path.read_text("utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error!s:.200}") from None
    except ValidationError as error:
        raise ConfigError(explain(error, str(path), keys_of(ServerSettings))) from None
