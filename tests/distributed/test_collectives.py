"""Collective operations: the group's backend, its errors, and what a single rank gets."""

import pytest
import torch
import torch.distributed as dist

from neko_lean.distributed import collectives
from neko_lean.distributed.collectives import (
    all_gather_objects,
    all_reduce_max,
    any_rank,
    merge_items_of_ranks,
    raise_on_any_rank,
    with_process_group,
)
from neko_lean.distributed.ranks import items_of_rank
from neko_lean.errors import NekoLeanError
from neko_lean.models.devices import pick_device
from tests.torchrun import set_rank

pytestmark = pytest.mark.usefixtures("no_gpu")


def test_collectives_of_a_single_rank_return_its_own_values():
    assert all_gather_objects({"a": 1}) == [{"a": 1}]
    assert merge_items_of_ranks(items_of_rank([1, 2, 3])) == [1, 2, 3]
    assert raise_on_any_rank(lambda: 5) == [5] and all_reduce_max(7, None) == 7 and not any_rank(False, None)


@pytest.mark.parametrize("when", ["connecting", "working", "disconnecting"])
def test_a_lost_connection_is_reported_in_one_sentence(monkeypatch, when):
    set_rank(monkeypatch, 0, world_size=2)

    def fail_if(stage):
        if stage == when:
            raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:40135. GLHF!")

    monkeypatch.setattr(collectives.dist, "init_process_group", lambda *_, **__: fail_if("connecting"))
    monkeypatch.setattr(collectives, "all_gather_objects", lambda _: fail_if("disconnecting"))
    with pytest.raises(NekoLeanError, match="another rank has exited"), with_process_group():
        fail_if("working")


def test_more_ranks_than_gpus_are_refused_except_on_the_cpu(monkeypatch):
    set_rank(monkeypatch, 1, world_size=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for device in (None, "cuda"):
        with pytest.raises(NekoLeanError, match=r"2 processes on this machine, which has 1 GPU.*--nproc-per-node 1"):
            pick_device(device)
    assert pick_device("cpu").type == "cpu"

    backends = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: pytest.fail(f"there is no GPU {number}"))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: backends.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(collectives, "all_gather_objects", lambda value: [value])
    with with_process_group():
        assert backends == ["gloo"]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda:1")
