"""Whether workers can connect: loopback, the host's name, gloo's interfaces."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from elastic_ckpt.cli.doctor import machine as network_findings
from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.machine import LOOPBACK, check_network
from elastic_ckpt.util import in_child


def look(**environ: str) -> dict[str, Finding]:
    return {one.what: one for one in check_network(environ)}


def name_server(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], str]) -> None:
    """Resolve this host's name to a given address; other addresses as usual."""
    real = socket.getaddrinfo

    def ask(host: str, *given: Any, **named: Any) -> Any:
        if host == LOOPBACK:
            return real(host, *given, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answer(), 0))]

    monkeypatch.setattr(socket, "getaddrinfo", ask)


def test_loopback_works() -> None:
    found = look()
    assert found["loopback"].state == "ok" and found.keys() == {"loopback", "host name"}


def test_a_missing_loopback_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> NoReturn:
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", refuse)
    found = look()["loopback"]
    assert found.state == "problem" and "lo up" in found.todo


def test_an_unreachable_loopback_server_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> NoReturn:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert look()["loopback"].text == "127.0.0.1 is unusable: timed out"


def test_a_loopback_host_name_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    name_server(monkeypatch, lambda: "127.0.0.1")
    found = look()["host name"]
    assert found.state == "ok" and "which other nodes cannot reach" in found.text


def test_a_host_name_of_another_host_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    name_server(monkeypatch, lambda: "192.0.2.1")
    found = look()["host name"]
    assert found.state == "warning" and "192.0.2.1, where listening fails" in found.text


def test_an_unknown_host_name_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> NoReturn:
        raise socket.gaierror(-2, "Name or service not known")

    name_server(monkeypatch, refuse)
    found = look()["host name"]
    assert found.state == "warning" and "Name or service not known" in found.text
    assert "/etc/hosts" in found.todo


def test_a_silent_name_server_is_a_warning_after_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_findings, "RESOLVE_SECONDS", 0.3)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.2)
    name_server(monkeypatch, lambda: str(time.sleep(600)))
    assert "did not answer within" in look()["host name"].text


def test_a_missing_interface_is_a_problem() -> None:
    found = look(GLOO_SOCKET_IFNAME="lo,eth77")["GLOO_SOCKET_IFNAME"]
    assert found.state == "problem" and "names eth77," in found.text and "lo" in found.todo
    assert look(GLOO_SOCKET_IFNAME="lo")["GLOO_SOCKET_IFNAME"].state == "ok"
    assert "GLOO_SOCKET_IFNAME" not in look(GLOO_SOCKET_IFNAME="")
