"""Run one command as several processes (ranks) under torchrun: who this rank is, and how the ranks communicate."""

from neko_lean.distributed.collectives import (
    all_gather_objects,
    all_gather_tensors,
    all_gather_with_grad,
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    merge_items_of_ranks,
    raise_on_any_rank,
    require_shared_folder,
    run_on_main_and_broadcast,
    with_process_group,
)
from neko_lean.distributed.ranks import (
    as_single_process,
    flatten_in_rank_order,
    group_by_round,
    is_main_process,
    items_of_rank,
    local_rank,
    local_world_size,
    rank,
    world_size,
)

__all__ = [
    "all_gather_objects",
    "all_gather_tensors",
    "all_gather_with_grad",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "as_single_process",
    "flatten_in_rank_order",
    "group_by_round",
    "is_main_process",
    "items_of_rank",
    "local_rank",
    "local_world_size",
    "merge_items_of_ranks",
    "raise_on_any_rank",
    "rank",
    "require_shared_folder",
    "run_on_main_and_broadcast",
    "with_process_group",
    "world_size",
]
