"""A killed run whose saves tests may damage."""

import shutil

import pytest

import neko_lean
from tests.checkpoints.interrupted import EVALUATED, Killed, kill_at, saved
from tests.helpers import flat


@pytest.fixture(scope="module")
def killed_run(world, model, cache, tmp_path_factory):
    """Folder with `whole`, an uninterrupted run, and the work folder of `out`, a run killed after two saves."""
    folder = tmp_path_factory.mktemp("killed")
    given = {"cache": cache, "recipe": "neko", "overrides": EVALUATED, "seed": 3, "quiet": True}
    flat(neko_lean.unlearn)(model, folder / "whole", forget=world, retain=world, **given)
    patch = pytest.MonkeyPatch()
    with patch.context() as patched, pytest.raises(Killed):
        kill_at(patched, 7)
        flat(neko_lean.unlearn)(model, folder / "out", forget=world, retain=world, save_every=3, **given)
    return folder


@pytest.fixture
def out(killed_run, tmp_path):
    """Output of a run that was killed after the saves of steps 3 and 6; the test may change its work folder."""
    shutil.copytree(saved(killed_run / "out"), saved(tmp_path / "out"))
    return tmp_path / "out"
