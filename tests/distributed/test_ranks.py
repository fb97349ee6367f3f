"""Ranks: which process this is, and which items it works on."""

from neko_lean.distributed.ranks import (
    as_single_process,
    flatten_in_rank_order,
    group_by_round,
    is_main_process,
    items_of_rank,
    local_rank,
    rank,
    world_size,
)
from tests.torchrun import set_rank


def test_without_torchrun_there_is_one_rank(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # as a batch system sets it
    monkeypatch.setenv("RANK", "3")
    assert (rank(), world_size(), local_rank(), is_main_process()) == (0, 1, 0, True)


def test_rank_and_world_size_are_read_from_torchruns_environment(monkeypatch):
    set_rank(monkeypatch, 3, world_size=4, local_rank=1)
    assert (rank(), world_size(), local_rank(), is_main_process()) == (3, 4, 1, False)


def test_as_single_process_hides_the_other_ranks(monkeypatch):
    set_rank(monkeypatch, 3, world_size=4)
    with as_single_process():
        assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    assert world_size() == 4


def test_items_are_divided_among_the_ranks(monkeypatch):
    set_rank(monkeypatch, 3, world_size=4)
    assert items_of_rank(list(range(10))) == [3, 7]
    assert group_by_round(list(range(10))) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert flatten_in_rank_order([[0], [1, 2], [3], [4], [5, 6], [7]]) == [0, 5, 6, 1, 2, 7, 3, 4]
