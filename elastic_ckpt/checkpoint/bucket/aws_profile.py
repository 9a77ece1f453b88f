"""A profile of ``~/.aws``: what the AWS tools read there, and obstore does not.

Only keys are read from these files. A profile that gets its credentials in another way (a process,
single sign-on, a role) is left to boto3, if that is installed. No message has a secret in it.
"""

from __future__ import annotations

import configparser
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.files import read_bounded
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from obstore.store import S3Credential

READ_AGAIN_SECONDS: Final = 5.0
"""How long what was read counts: who renews credentials in the file need not restart a job."""

_MAX_BYTES: Final = 1024 * 1024
_OTHER_WAYS: Final = (
    "credential_process", "sso_session", "sso_start_url", "sso_account_id", "role_arn",
    "web_identity_token_file", "credential_source", "login_session",
)  # fmt: skip
_FIRST: Final = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
"""With one of these set, credentials come from there; so it is with the AWS tools."""


class AwsCredentials:
    """Reads the credentials of a profile, as obstore asks for them.

    Attributes:
        refresh_threshold: obstore asks again this long before they expire.
    """

    refresh_threshold = timedelta(0)

    def __init__(self, ask: Callable[[], tuple[str, str, str | None]]) -> None:
        self._ask = ask

    def __call__(self) -> S3Credential:
        """Return key, secret and token; ValueError without them, which counts as expired: a file
        that is being rewritten has them soon."""
        try:
            key, secret, token = self._ask()
        except (UsageError, ValueError) as error:
            raise ValueError(f"TokenRefreshRequired: {error}") from None
        expires = datetime.now(timezone.utc) + timedelta(seconds=READ_AGAIN_SECONDS)
        found: S3Credential = {
            "access_key_id": key, "secret_access_key": secret, "expires_at": expires,
        }  # fmt: skip
        if token:
            found["token"] = token
        return found


@dataclass(frozen=True)
class AwsProfile:
    """What a profile sets; empty, or None, for what it leaves open."""

    region: str = ""
    endpoint: str = ""
    credentials: AwsCredentials | None = None


def read_profile(environment: Mapping[str, str] = os.environ) -> AwsProfile:
    """Return the profile of ``AWS_PROFILE``, else the default one, which need not be there.

    Raises:
        UsageError: ``AWS_PROFILE`` names none, a file is malformed, or the profile gets its
            credentials in a way that needs boto3.
    """
    asked = environment.get("AWS_PROFILE") or environment.get("AWS_DEFAULT_PROFILE") or ""
    name = asked or "default"
    found = _values(name, environment)
    if found is None and asked:
        raise UsageError(
            f"AWS_PROFILE is {printable(asked)!r}, and neither {_credentials_file(environment)} "
            f"nor {_config_file(environment)} has it: correct it, or unset it"
        )
    values = found or {}
    credentials = None
    if not any(environment.get(variable) for variable in _FIRST):
        credentials = _credentials(name, values, environment)
    return AwsProfile(values.get("region", ""), values.get("endpoint_url", ""), credentials)


def _credentials(
    name: str, values: Mapping[str, str], environment: Mapping[str, str]
) -> AwsCredentials | None:
    if _keys(values):

        def read() -> tuple[str, str, str | None]:
            keys = _keys(_values(name, environment) or {})
            if keys is None:
                raise ValueError(f"the profile {printable(name)!r} has no keys any more")
            return keys

        return AwsCredentials(read)
    way = next((one for one in _OTHER_WAYS if values.get(one)), "")
    if not way:
        return None
    try:
        boto3 = importlib.import_module("boto3")  # its types are not installed everywhere
    except ImportError:
        raise UsageError(
            f"the AWS profile {printable(name)!r} has {way}, for which boto3 is needed: pip "
            "install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    return _by_boto3(boto3, name, way)


def _by_boto3(boto3: Any, name: str, way: str) -> AwsCredentials:
    """Return what asks boto3, which keeps them, and renews them before they expire."""
    try:
        held = boto3.Session(profile_name=name).get_credentials()
    except Exception as error:  # types of botocore's own; their text may hold an output
        raise _unusable(name, way, error) from None

    def ask() -> tuple[str, str, str | None]:
        try:
            frozen = held.get_frozen_credentials()
        except Exception as error:
            raise ValueError(str(_unusable(name, way, error))) from None
        return frozen.access_key, frozen.secret_key, frozen.token

    if held is None:
        raise UsageError(f"boto3 found no credentials in the AWS profile {printable(name)!r}")
    return AwsCredentials(ask)


def _unusable(name: str, way: str, error: Exception) -> UsageError:
    return UsageError(
        f"boto3 could not use {way} of the AWS profile {printable(name)!r} "
        f"({type(error).__name__}): see aws sts get-caller-identity"
    )


def _keys(values: Mapping[str, str]) -> tuple[str, str, str | None] | None:
    key, secret = values.get("aws_access_key_id"), values.get("aws_secret_access_key")
    return (key, secret, values.get("aws_session_token")) if key and secret else None


def _values(name: str, environment: Mapping[str, str]) -> dict[str, str] | None:
    """Return what both files have of a profile; None if neither has it. Of the keys those of the
    credentials file count, together."""
    config = _sections(_config_file(environment))
    section = name if name == "default" else f"profile {name}"
    common = config.get(section)
    own = _sections(_credentials_file(environment)).get(name)
    if common is None and own is None:
        return None
    values = dict(common or {})
    if own and _keys(own):
        values.pop("aws_session_token", None)
    return {**values, **(own or {})}


def _sections(path: Path) -> dict[str, dict[str, str]]:
    parser = configparser.RawConfigParser(strict=False, default_section="")
    try:
        parser.read_string(read_bounded(path, _MAX_BYTES).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (configparser.Error, ValueError) as error:  # its message has the line in it
        line = getattr(error, "lineno", None) or next(
            (number for number, _ in getattr(error, "errors", ())), None
        )
        where = f", line {line}" if line else ""
        raise UsageError(f"{path} is malformed{where}: correct it, or unset AWS_PROFILE") from None
    return {
        section: {key: value.strip() for key, value in parser.items(section)}
        for section in parser.sections()
    }


def _config_file(environment: Mapping[str, str]) -> Path:
    return _path(environment.get("AWS_CONFIG_FILE") or "~/.aws/config")


def _credentials_file(environment: Mapping[str, str]) -> Path:
    return _path(environment.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # this user has no home
        return Path(text)
