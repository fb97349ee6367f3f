"""Options that are refused, and how examples are distributed over shards."""

import pytest

from neko_lean.cache import planning
from neko_lean.cache.planning import CacheExamples, plan_shards, validate_options
from neko_lean.errors import NekoLeanError
from neko_lean.options import CacheOptions
from tests.helpers import encoded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"max_length": 0}, "max_length must be at least 1, got 0."),
        ({"batch_tokens": -1}, "batch_tokens must be at least 1, got -1."),
        ({"mass": 0.0}, "mass must be > 0 and <= 1, got 0.0."),
        ({"mass": 1.5}, "mass must be > 0 and <= 1, got 1.5."),
        ({"stored_dtype": "int8"}, "stored_dtype 'int8' is not one of float16, float32."),
    ],
)
def test_an_impossible_option_is_refused(options, message):
    with pytest.raises(NekoLeanError) as caught:
        validate_options(CacheOptions(**options))
    assert str(caught.value) == message


def test_shards_contain_every_example_once_in_order_of_length(world, monkeypatch):
    monkeypatch.setattr(planning, "SHARD_POSITIONS", 100)
    examples = encoded(world)
    jobs = plan_shards(CacheExamples(top_k=examples, targets=examples), batch_tokens=256)

    lengths = [positions for job in jobs.top_k for _, positions, _ in job.shard.rows]
    assert lengths == sorted(map(len, examples)) and len(jobs.top_k) > 2
    assert all(job.num_tokens == job.shard.positions >= 100 for job in jobs.top_k[:-1])
    # The first token of an example has no log-probability.
    assert [length - 1 for length in lengths] == [count for job in jobs.targets for _, count, _ in job.shard.rows]
    assert jobs.targets[0].shard.file == f"forget-00000-of-{len(jobs.targets):05d}.safetensors"
