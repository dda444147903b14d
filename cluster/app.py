"""The composition root: one configuration becomes one Serve application of gateway, cache and models.

`cluster.app:build_app` is also the `import_path` of a Serve YAML, whose `args:` is the same configuration.
Loads no torch: what runs inside a replica is imported there.
"""

from __future__ import annotations

import hashlib
from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from cache.server import CacheServer, CacheServerConfig
from cluster.config import (
    BUNDLED_EMBEDDER,
    EngineSection,
    MillraceConfig,
    ModelSection,
    check_args,
    default_cache_path,
    read_keys,
)
from cluster.placement import CACHE_CPUS, GATEWAY_CPUS, Resources, model_resources
from replicas.engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from replicas.engine.models.source import find_on_this_machine
from router.catalog import Catalog, ModelEntry, Price
from router.policy import CheapestCapablePolicy, FixedPolicy, RoutingPolicy
from router.server import GatewayServer, GatewayServerConfig
from router.settings import ApiKey, GatewaySettings

APP_NAME = "millrace"

# The engine and the gateway admit requests themselves; Serve's own limit only has to be out of the way.
UNLIMITED = 100_000


def build_app(args: dict[str, Any]) -> serve.Application:
    """Raises ConfigError with one line per mistake, which Serve shows as the application's message."""
    return build(check_args(args), cluster_gpus=ray.cluster_resources().get("GPU", 0.0))


def build(config: MillraceConfig, cluster_gpus: float, max_start_attempts: int = 3) -> serve.Application:
    cluster_logging = LoggingConfig(encoding="JSON", enable_access_log=False)
    drain_s = config.server.drain_timeout_s

    def deployment(cls: type, name: str, num_replicas: int, resources: Resources) -> serve.Deployment:
        return serve.deployment(cls).options(
            name=name,
            num_replicas=num_replicas,
            max_ongoing_requests=UNLIMITED,
            ray_actor_options={"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
            graceful_shutdown_timeout_s=drain_s,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=5,
            health_check_timeout_s=15,
            max_constructor_retry_count=max_start_attempts,
            logging_config=cluster_logging,
        )

    from replicas.server import ModelServer

    models = {}
    for model in config.models:
        resources = model_resources(model.engine.device, model.num_gpus, cluster_gpus)
        server = deployment(ModelServer, f"model-{model.id}", model.num_replicas, resources)
        models[model.id] = server.bind(model.id, engine_config(model))
    cache = None
    if config.cache.enabled:
        cache = deployment(CacheServer, "semantic-cache", 1, Resources(CACHE_CPUS)).bind(cache_config(config))
    gateway = deployment(
        serve.ingress()(GatewayServer), "gateway", config.gateway.num_replicas, Resources(GATEWAY_CPUS)
    )
    return gateway.bind(gateway_config(config), models, cache)


def engine_config(model: ModelSection) -> EngineConfig:
    e: EngineSection = model.engine
    return EngineConfig(
        model=ModelConfig(
            source=model.source,
            dtype=e.dtype,
            device=e.device,
            quantization=e.quantization,
            max_model_len=e.max_model_len,
            kernels=e.kernels,
        ),
        cache=CacheConfig(
            block_size=e.block_size,
            num_blocks=e.num_gpu_blocks_override,
            memory_bytes=e.kv_cache_memory_bytes,
            memory_utilization=e.gpu_memory_utilization,
            enable_prefix_caching=e.enable_prefix_caching,
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=e.max_num_seqs,
            max_num_batched_tokens=e.max_num_batched_tokens,
            max_queued_requests=e.max_queued_requests,
        ),
        num_threads=e.num_threads,
        stream_interval_ms=e.stream_interval_ms,
        tensor_parallel_size=e.tensor_parallel_size,
        pipeline_parallel_size=e.pipeline_parallel_size,
    )


def cache_config(config: MillraceConfig) -> CacheServerConfig:
    c = config.cache
    return CacheServerConfig(
        embedder=c.embedder,
        sqlite_path=str(default_cache_path(c)),
        redis_url=c.redis_url,
        ttl_s=c.ttl_s,
        max_entries=c.max_entries,
        max_bytes=c.max_bytes,
        similarity_threshold=c.similarity_threshold,
    )


def gateway_config(config: MillraceConfig) -> GatewayServerConfig:
    keys = tuple(ApiKey(sha256=digest, tenant=tenant) for digest, tenant in read_keys(config.auth).items())
    return GatewayServerConfig(
        settings=GatewaySettings(
            api_keys=keys,
            max_concurrent=config.gateway.max_concurrent_requests,
            max_queued=config.gateway.max_queued_requests,
            max_body_bytes=config.server.max_body_bytes,
            embedder=embedder_id(config.cache.embedder) if config.cache.enabled else None,
            cache_sampled=config.cache.cache_sampled,
        ),
        catalog=Catalog([catalog_entry(m) for m in config.models]),
        policy=routing_policy(config),
    )


def catalog_entry(model: ModelSection) -> ModelEntry:
    price = None
    if model.price is not None:
        price = Price(model.price.prompt, model.price.completion, model.price.cached_prompt)
    return ModelEntry(
        id=model.id,
        price=price,
        quality=model.quality,
        context_length=model.engine.max_model_len,
        aliases=model.aliases,
        fallbacks=model.fallbacks,
        revision=revision(model),
    )


def revision(model: ModelSection) -> str:
    """Changes with whatever changes the model's answers: its source, its files' dates and sizes, its dtype.

    A hub's folder is named by the commit. Files that this machine does not have add nothing."""
    path = find_on_this_machine(model.source)
    files = [] if path is None else sorted(path.glob("*")) if path.is_dir() else [path]
    stamps = [(f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    folder = "" if path is None else path.name
    return hashlib.sha256(repr((model.source, model.engine.dtype, folder, stamps)).encode()).hexdigest()[:16]


def routing_policy(config: MillraceConfig) -> RoutingPolicy:
    if config.routing.policy == "fixed":
        default = config.routing.default_model or config.models[0].id
        return FixedPolicy(default, tuple(m.id for m in config.models if m.id != default))
    return CheapestCapablePolicy(config.routing.quality_target)


def embedder_id(source: str) -> str:
    """What `/v1/models` calls the embedder: the last part of its source."""
    return "all-minilm-l6-v2" if source == BUNDLED_EMBEDDER else source.rstrip("/").rsplit("/", 1)[-1]
