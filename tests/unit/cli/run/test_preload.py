"""Which modules workers find imported when their script begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.cli.run.build_settings import modules_to_preload

COLOSSALAI = ("colossalai", "colossalai.booster", "colossalai.booster.plugin")


@pytest.mark.parametrize(
    ("source", "args", "expected"),
    [
        ("import torch\n", (), ()),
        ("import colossalai\n", (), COLOSSALAI),
        ("def main():\n    from colossalai.booster import Booster\n", (), COLOSSALAI),
        ("import trainer\n", ("--backend", "colossalai"), COLOSSALAI),
        ("import colossalai_like\n", ("--out", "mycolossalai"), ()),
        (b"\xff\xfe\x00", (), ()),
    ],
    ids=["torch", "import", "indented", "argument", "other", "binary"],
)
def test_colossalai_is_imported_ahead_if_the_job_names_it(
    tmp_path: Path, source: str | bytes, args: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    script = tmp_path / "train.py"
    script.write_bytes(source if isinstance(source, bytes) else source.encode())
    assert modules_to_preload(None, script, args) == expected


def test_preload_overrides_the_default(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import colossalai\n")
    assert modules_to_preload(" numpy, scipy.stats ,", script, ()) == ("numpy", "scipy.stats")
    assert modules_to_preload("", script, ()) == ()
