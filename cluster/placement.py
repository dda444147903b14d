"""What each Serve replica reserves of the cluster: pure arithmetic over the configuration, no Ray.

Reservations are logical. A gateway or cache replica waits more than it works, so it reserves a fraction of a core; a
model replica reserves one core on a CPU (its threads may use more) and its GPUs on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GATEWAY_CPUS = 0.1
CACHE_CPUS = 0.2
MODEL_CPUS = 1.0


@dataclass(frozen=True, slots=True)
class Resources:
    num_cpus: float
    num_gpus: float = 0.0


def model_resources(device: str, num_gpus: float | None, cluster_gpus: float) -> Resources:
    """`device` as in `ModelConfig`; `num_gpus` None asks for one GPU where the device allows it and there is one.

    More than `cluster_gpus` may be asked for: a cluster that grows brings them later. Raises ValueError where device
    and GPUs contradict each other."""
    if device == "cpu":
        if num_gpus:
            raise ValueError(f"device is cpu, yet {num_gpus:g} GPUs are asked for")
        return Resources(MODEL_CPUS)
    if num_gpus is not None:
        return Resources(MODEL_CPUS, num_gpus)
    return Resources(MODEL_CPUS, 1.0 if device != "auto" or cluster_gpus >= 1 else 0.0)


def check_gpus(replicas: Sequence[tuple[Resources, int]], cluster_gpus: float) -> None:
    """For a cluster that does not grow: raises ValueError with the numbers where (resources, replicas) never fit."""
    wanted = sum(resources.num_gpus * count for resources, count in replicas)
    if wanted > cluster_gpus:
        raise ValueError(f"the models need {wanted:g} GPUs together and this machine has {cluster_gpus:g}")


def threads_per_replica(num_cores: int, num_replicas: int) -> int:
    """An even share of one machine's cores for replicas that run side by side on it; at least one each."""
    assert num_cores > 0, "a machine has a core"
    return max(1, num_cores // max(1, num_replicas))


def total_cpus(replicas: Sequence[tuple[Resources, int]]) -> float:
    """Logical cores that all of (resources, number of replicas) reserve together."""
    return sum(resources.num_cpus * count for resources, count in replicas)
