"""Who leads: the node that listens at the endpoint."""

from __future__ import annotations

import os
import socket

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol.rendezvous import (
    address_of,
    is_same_endpoint,
    lead_towards,
    meet,
    parse_endpoint,
    parse_nodes,
)
from tests.ports import free_port


def test_the_first_listener_leads_and_others_follow() -> None:
    port = free_port()
    first = meet(f"127.0.0.1:{port}", lambda: True)
    try:
        second = meet(f"127.0.0.1:{port}", lambda: True)
        assert first.leads and not second.leads
        assert (second.host, second.port) == ("127.0.0.1", port)
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
        with pytest.raises(OSError):  # at that address alone
            socket.create_connection(("127.0.0.2", port), timeout=2)
    finally:
        os.close(first.listen_fd)


def test_a_killed_runs_listener_is_waited_for() -> None:
    with socket.socket() as left:
        left.bind(("127.0.0.1", 0))
        left.listen()
        port = left.getsockname()[1]
        asked = []

        def is_led() -> bool:
            asked.append(True)
            if len(asked) == 3:
                left.close()
            return False

        found = meet(f"127.0.0.1:{port}", is_led)
    assert found.leads and len(asked) >= 3
    os.close(found.listen_fd)


def test_another_hosts_address_is_followed() -> None:
    assert not meet("192.0.2.1:29400", lambda: False).leads


def test_an_unknown_name_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match=r"--rdzv-endpoint nowhere\.invalid:1: .*: give the name"):
        meet("nowhere.invalid:1", lambda: True)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("node0", ("node0", 29400)),
        ("node0:1", ("node0", 1)),
        ("[::1]:77", ("::1", 77)),
        ("[::1]", ("::1", 29400)),
    ],
)
def test_endpoints(text: str, found: tuple[str, int]) -> None:
    assert parse_endpoint(text) == found


@pytest.mark.parametrize("text", ["", ":1", "a:0", "a:65536", "a:x", "a:"])
def test_invalid_endpoints(text: str) -> None:
    with pytest.raises(UsageError, match="is not HOST or HOST:PORT"):
        parse_endpoint(text)


def test_numbers_of_nodes() -> None:
    assert parse_nodes("3") == (3, 3)
    assert parse_nodes("2:8") == (2, 8)
    for text in ("", "0", "2:1", "a", "1:", ":2", "1:2:3", "-1"):
        with pytest.raises(UsageError, match="neither a number from 1 nor MIN:MAX"):
            parse_nodes(text)


def test_next_head_listens_on_its_own_address_with_the_same_port_if_it_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        taken.listen()
        other, endpoint = lead_towards(f"127.0.0.1:{port}")
        assert other.leads and other.host == "127.0.0.1" and other.port != port
        assert endpoint == f"127.0.0.1:{other.port}"
        os.close(other.listen_fd)
    same, endpoint = lead_towards(f"127.0.0.1:{port}")
    assert same.leads and endpoint == f"127.0.0.1:{port}"
    os.close(same.listen_fd)


def test_endpoints_are_compared_with_their_default_port() -> None:
    assert is_same_endpoint("node0", "node0:29400")
    assert not is_same_endpoint("node0", "node0:29401")


def test_next_head_of_a_name_that_is_gone_uses_the_address_that_it_had() -> None:
    with pytest.raises(OSError, match=r"not known|resolution"):
        lead_towards("gone.invalid:0001")
    found, endpoint = lead_towards("gone.invalid:29417", known="127.0.0.1")
    os.close(found.listen_fd)
    assert endpoint == f"127.0.0.1:{found.port}"


def test_address_of_an_endpoint() -> None:
    assert address_of("127.0.0.1:1") == "127.0.0.1"
    assert address_of("gone.invalid") == ""
