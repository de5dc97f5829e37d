"""What an input's files are: links, pipes, and whether they are still those that were planned."""

import os

import pytest

from stride_ray.corpus.splits import plan
from stride_ray.runtime.errors import StrideError
from stride_ray.selection.pool import refuse_changed


def test_the_version_of_a_link_is_its_targets(tmp_path):
    (tmp_path / "target.txt").write_text("one")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/link.txt").symlink_to(tmp_path / "target.txt")
    (before,) = plan([str(tmp_path / "corpus")], 100)
    refuse_changed(before)
    (tmp_path / "target.txt").write_text("two")
    os.utime(tmp_path / "target.txt", (1, 1))
    (after,) = plan([str(tmp_path / "corpus")], 100)
    assert after.files[0].version != before.files[0].version
    with pytest.raises(StrideError, match=r"link\.txt was changed since it was sharded"):
        refuse_changed(before)
    (tmp_path / "target.txt").unlink()
    with pytest.raises(StrideError, match="it is gone"):
        refuse_changed(before)


def test_links_to_files_are_files_and_anything_else_is_told(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "target.txt").write_text("text")
    (tmp_path / "corpus/a.txt").symlink_to(tmp_path / "target.txt")
    assert [file.name for unit in plan([str(tmp_path / "corpus")], 100) for file in unit.files] == ["a.txt"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus/folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StrideError, match="folder is a link to a folder; name that folder as an input of its own"):
        plan([str(tmp_path / "corpus")], 100)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StrideError, match=r"pipe is not a regular file \(a pipe\?\)"):
        plan([str(tmp_path / "pipe")], 100)
