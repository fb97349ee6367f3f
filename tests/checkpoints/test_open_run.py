"""Opening a run's work folder."""

import pytest

from neko_lean.checkpoints.open_run import open_run_folder
from neko_lean.errors import NekoLeanError
from neko_lean.outputs.place import claim_folder


def test_two_processes_cannot_write_one_output(unlearn, tmp_path):
    with (
        open_run_folder(claim_folder(tmp_path / "out", "saved", []), {}),
        pytest.raises(NekoLeanError, match="another process is writing"),
    ):
        unlearn(tmp_path / "out", overwrite=True)
    assert list(tmp_path.iterdir()) == []
