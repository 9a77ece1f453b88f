"""A file of either generation stays mapped as long as it is written in every other save."""

from pathlib import Path

from elastic_ckpt.checkpoint.memory.mapped_file import MAPPED_FROM_BYTES, Mappings


def save(mappings: Mappings, path: Path) -> None:
    file = mappings.open(path, MAPPED_FROM_BYTES)
    file.write(b"x" * MAPPED_FROM_BYTES)
    file.finish()
    file.close()
    mappings.forget_unused()


def test_generations_that_take_turns_are_mapped_once(tmp_path: Path) -> None:
    mappings = Mappings()
    save(mappings, tmp_path / "a")
    save(mappings, tmp_path / "b")
    made = {inode: mapping for inode, (mapping, _) in mappings._known.items()}
    assert len(made) == 2
    for _ in range(2):
        save(mappings, tmp_path / "a")
        save(mappings, tmp_path / "b")
    assert all(mappings._known[inode][0] is mapping for inode, mapping in made.items())


def test_what_two_saves_did_not_write_is_unmapped(tmp_path: Path) -> None:
    mappings = Mappings()
    for name in ("old", "a", "b"):
        save(mappings, tmp_path / name)
    assert (tmp_path / "old").stat().st_ino not in mappings._known
    assert len(mappings._known) == 2
