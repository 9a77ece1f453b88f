"""``python -m scripts.release``: wheel, sdist, Debian package, its bill of materials, image.

It needs the packages of requirements/dist.txt. What this machine has no tool for is said and left
out.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from scripts.release import debian
from scripts.release.sbom import bill

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
BUILDERS = ("podman", "buildah", "docker")


def main() -> int:
    """Build everything into dist/, from nothing."""
    os.environ.setdefault("SOURCE_DATE_EPOCH", _committed())
    os.umask(0o022)
    shutil.rmtree(DIST, ignore_errors=True)
    # The wheel is made from the sdist, so nothing of an older build gets into it.
    python("-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT))
    [wheel] = DIST.glob("*.whl")
    [sdist] = DIST.glob("*.tar.gz")
    same_times(sdist)
    python("-m", "twine", "check", "--strict", str(wheel), str(sdist))
    version = debian.wheel_metadata(wheel)["Version"]
    if shutil.which("dpkg-deb"):
        made = debian.build(wheel, DIST)
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["dpkg-deb", "-x", str(made), scratch], check=True)
            [site] = Path(scratch, debian.HOME, "lib").glob("python*/site-packages")
            text = json.dumps(bill(site), indent=2) + "\n"
        (DIST / f"elastic-ckpt-{version}.cdx.json").write_text(text)
    else:
        print("no dpkg-deb: no Debian package, and no bill of its materials")
    image(version)
    sums = [f"{_digest(path)}  {path.name}\n" for path in sorted(DIST.iterdir())]
    (DIST / "SHA256SUMS").write_text("".join(sums))
    print("".join(sums), end="")
    return 0


def same_times(sdist: Path) -> None:
    """Pack an sdist again with the time of the release in place of that of the build."""
    moment = int(os.environ["SOURCE_DATE_EPOCH"])
    made = io.BytesIO()
    with (
        tarfile.open(sdist) as old,
        gzip.GzipFile("", "wb", fileobj=made, mtime=moment) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for one in sorted(old.getmembers(), key=lambda one: one.name):
            one.mtime, one.uid, one.gid, one.uname, one.gname = moment, 0, 0, "", ""
            one.pax_headers = {}
            new.addfile(one, old.extractfile(one) if one.isreg() else None)
    sdist.write_bytes(made.getvalue())


def image(version: str) -> None:
    """Build the image, if there is a builder that works."""
    builder = next((one for one in BUILDERS if works(one)), None)
    if builder is None:
        print(f"no {', '.join(BUILDERS[:-1])} or {BUILDERS[-1]} works here: the image is not built")
        return
    tags = [
        "--tag",
        f"elastic-ckpt:{version}",
        "--label",
        f"org.opencontainers.image.version={version}",
    ]
    subprocess.run([builder, "build", *tags, str(ROOT)], check=True)


def works(builder: str) -> bool:
    """Whether a builder is there and answers; docker needs its daemon."""
    if shutil.which(builder) is None:
        return False
    try:
        done = subprocess.run([builder, "info"], capture_output=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def python(*words: str) -> None:
    """Run this Python; end with its exit code if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _committed() -> str:
    """Return when the newest commit was made, in seconds since 1970."""
    log = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return subprocess.run(log, capture_output=True, text=True, check=True).stdout.strip()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
