"""Profiles of ~/.aws: which one counts, what boto3 does, and that no message has a secret."""

from __future__ import annotations

import sys
import types
from datetime import timedelta
from pathlib import Path

import obstore
import pytest

from elastic_ckpt.checkpoint.bucket import aws_profile
from elastic_ckpt.checkpoint.bucket.aws_profile import read_profile
from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.errors import BucketFailed, UsageError

_HOUR = timedelta(hours=1)
SECRET = "do-not-show-me"


class Home:
    """The two files, and the environment that points to them."""

    def __init__(self, root: Path) -> None:
        self.config, self.credentials = root / "config", root / "credentials"
        self.environment = {
            "AWS_CONFIG_FILE": str(self.config),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.credentials),
        }

    def keys(self, name: str, key: str, token: str = "") -> None:
        with open(self.credentials, "a") as file:
            file.write(f"[{name}]\naws_access_key_id = {key}\naws_secret_access_key={SECRET}\n")
            file.write(f"aws_session_token = {token}\n" * bool(token))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def key_of(home: Home, **more: str) -> str:
    found = read_profile({**home.environment, **more}).credentials
    return "" if found is None else found()["access_key_id"]


def test_without_files_nothing_is_set(home: Home) -> None:
    assert read_profile(home.environment) == aws_profile.AwsProfile()
    assert read_profile({"HOME": "/nowhere", **home.environment}).credentials is None


def test_the_default_and_the_named_profile(home: Home) -> None:
    home.keys("default", "ONE")
    home.keys("team", "TWO", "token")
    home.config.write_text(
        "[default]\nregion=eu-west-1\ns3 =\n  max_concurrent_requests = 20\n"
        "[profile team]\nregion = us-west-2\nendpoint_url = http://store:9000\n"
        "aws_access_key_id = OTHER\naws_secret_access_key = x\naws_session_token = y\n"
    )
    assert key_of(home) == "ONE"
    assert read_profile(home.environment).region == "eu-west-1"
    found = read_profile({**home.environment, "AWS_PROFILE": "team"})
    assert (found.region, found.endpoint) == ("us-west-2", "http://store:9000")
    assert found.credentials is not None
    given = found.credentials()
    assert (given["access_key_id"], given["token"]) == ("TWO", "token")


def test_keys_and_token_come_from_one_file(home: Home) -> None:
    home.keys("default", "ONE")
    home.config.write_text("[default]\naws_session_token = of the other\n")
    found = read_profile(home.environment).credentials
    assert found is not None and "token" not in found()


def test_keys_may_stand_in_the_config(home: Home) -> None:
    home.config.write_text(
        f"[default]\naws_access_key_id = ONE\naws_secret_access_key = {SECRET}%x\n"
    )
    found = read_profile(home.environment).credentials
    assert found is not None and found()["secret_access_key"] == f"{SECRET}%x"


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE"])
def test_the_environment_goes_before_the_files(home: Home, variable: str) -> None:
    home.keys("default", "ONE")
    home.config.write_text("[default]\nregion = eu-west-1\n")
    found = read_profile({**home.environment, variable: "x"})
    assert found.credentials is None and found.region == "eu-west-1"


def test_renewed_credentials_are_read(home: Home) -> None:
    home.keys("default", "ONE")
    found = read_profile(home.environment).credentials
    assert found is not None and found()["access_key_id"] == "ONE"
    home.credentials.unlink()
    home.keys("default", "TWO")
    assert found()["access_key_id"] == "TWO"


def test_a_profile_that_is_not_there(home: Home) -> None:
    home.keys("default", "ONE")
    with pytest.raises(UsageError, match=r"AWS_PROFILE is 'team', and neither .*credentials nor"):
        key_of(home, AWS_PROFILE="team")


def test_a_malformed_file_is_named_without_its_content(home: Home) -> None:
    home.credentials.write_text(f"[default]\naws_access_key_id = A\n{SECRET}\n")
    with pytest.raises(UsageError, match="credentials is malformed, line 3") as failed:
        key_of(home)
    assert SECRET not in str(failed.value)
    home.credentials.write_text(f"{SECRET}\n")
    with pytest.raises(UsageError, match="malformed, line 1") as failed:
        key_of(home)
    assert SECRET not in str(failed.value)


@pytest.mark.parametrize("way", ["credential_process = tool", "sso_session = x", "role_arn = y"])
def test_other_ways_need_boto3(home: Home, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home.config.write_text(f"[default]\n{way}\n")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UsageError, match="for which boto3 is needed: pip install boto3"):
        key_of(home)

    class Session:
        def __init__(self, profile_name: str) -> None:
            assert profile_name == "default"

        def get_credentials(self) -> Session:
            return self

        def get_frozen_credentials(self) -> types.SimpleNamespace:
            return types.SimpleNamespace(access_key="BOTO", secret_key=SECRET, token=None)

    fake = types.ModuleType("boto3")
    fake.Session = Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "boto3", fake)
    assert key_of(home) == "BOTO"

    def fail(_: Session) -> None:
        raise RuntimeError(f"the process said {SECRET}")

    monkeypatch.setattr(Session, "get_credentials", fail)
    with pytest.raises(
        UsageError, match=r"could not use .* of the AWS profile 'default'"
    ) as failed:
        key_of(home)
    assert SECRET not in str(failed.value)


def test_a_store_asks_the_file_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through obstore, to a port that nobody listens on."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in home.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(aws_profile, "READ_AGAIN_SECONDS", 0.0)
    home.keys("default", "ONE")
    store = open_store(BucketUrl.parse("s3://bucket/job"))
    assert isinstance(store, BucketStore)
    signed = [obstore.sign(store.plain, "GET", "x", expires_in=_HOUR)]
    home.credentials.unlink()
    home.keys("default", "TWO")
    signed.append(obstore.sign(store.plain, "GET", "x", expires_in=_HOUR))
    assert ["Credential=ONE" in signed[0], "Credential=TWO" in signed[1]] == [True, True]
    assert SECRET not in repr(store.plain) + "".join(signed)
    home.credentials.unlink()
    with pytest.raises(BucketFailed, match="the credentials have expired; renew them") as failed:
        store.put("x", b"")
    assert SECRET not in str(failed.value)
