from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import Resources, check_gpus, model_resources, threads_per_replica, total_cpus


@pytest.mark.parametrize(
    ("device", "num_gpus", "cluster_gpus", "gpus"),
    [
        ("cpu", None, 8, 0),
        ("auto", None, 0, 0),
        ("auto", None, 8, 1),
        ("auto", 0.5, 1, 0.5),
        ("auto", 0, 8, 0),
        ("cuda", None, 1, 1),
    ],
)
def test_gpus_follow_device_and_cluster(device: str, num_gpus: float | None, cluster_gpus: float, gpus: float) -> None:
    assert model_resources(device, num_gpus, cluster_gpus).num_gpus == gpus


def test_a_contradiction_is_refused() -> None:
    with pytest.raises(ValueError, match="1 GPUs"):
        model_resources("cpu", 1, 8)


def test_a_machine_with_too_few_gpus_is_refused_with_the_numbers() -> None:
    check_gpus([(Resources(1.0, 0.5), 2)], 1)
    with pytest.raises(ValueError, match=r"3 GPUs.*has 2"):
        check_gpus([(Resources(1.0, 1), 3)], 2)


@given(st.integers(1, 256), st.integers(0, 256))
def test_threads_never_oversubscribe_nor_vanish(num_cores: int, num_replicas: int) -> None:
    threads = threads_per_replica(num_cores, num_replicas)
    assert threads >= 1
    assert threads == 1 or threads * max(1, num_replicas) <= num_cores


def test_total_counts_every_replica() -> None:
    assert total_cpus([(Resources(1.0), 2), (Resources(0.5), 3)]) == 3.5
