"""The fastest layouts that fit a cluster, of all that the stack can run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.schema import RunConfig
from megatron_mdm.training.plan.cluster import Cluster
from megatron_mdm.training.plan.plan import RECOMPUTE, Plan, Samples, make_plan


def search(config: RunConfig, cluster: Cluster, samples: Samples, limit: int) -> list[Plan]:
    """The best feasible plans, fastest first; of equally fast ones (to 1 %) the one that leaves the most memory.

    Raises UserError where nothing fits, saying what comes nearest.
    """
    feasible = []
    nearest = None
    for candidate in candidates(config, cluster):
        try:
            plan = make_plan(candidate, cluster, samples)
        except UserError:  # heads, layers or the batch cannot be split like this
            continue
        if plan.is_feasible:
            feasible.append(plan)
        elif nearest is None or plan.fullest.total < nearest.fullest.total:
            nearest = plan
    if not feasible:
        reason = f"the nearest, {describe_layout(nearest)}: {nearest.obstacle}" if nearest else "none can be split so"
        raise UserError(f"no layout of {cluster.world_size} ranks fits; {reason}; use more nodes or a smaller batch")
    fastest = min(plan.seconds_per_step for plan in feasible)
    feasible.sort(key=lambda plan: (round(plan.seconds_per_step / fastest, 2), plan.fullest.total))
    return feasible[:limit]


def candidates(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """The configuration with every layout. Tensor parallelism stays inside a node; offload, precision and the global
    batch stay as they are."""
    ranks = cluster.world_size
    tensors = [degree for degree in _divisors(ranks) if degree <= cluster.gpus_per_node]
    for tensor, pipeline in itertools.product(tensors, _divisors(ranks)):
        if ranks % (tensor * pipeline) or pipeline > config.model.num_layers:
            continue
        share = config.batch.global_size * tensor * pipeline // ranks
        data_parallel = ranks > tensor * pipeline
        least = 0 if config.precision.dtype == "fp32" else 1  # in 16 bit 0 runs as 1
        stages_of_zero = range(least, 2 if pipeline > 1 else 4) if data_parallel else range(1)
        for zero, recompute in itertools.product(stages_of_zero, RECOMPUTE):
            parallel = config.parallel.model_copy(
                update={
                    "tensor": tensor,
                    "pipeline": pipeline,
                    "zero": zero,
                    "recompute": recompute,
                    "sequence": tensor > 1,
                    "offload": config.parallel.offload if zero else "none",
                }
            )
            for micro_size in _divisors(share) if not config.batch.micro_tokens else (config.batch.micro_size,):
                batch = config.batch.model_copy(update={"micro_size": micro_size})
                yield config.model_copy(update={"parallel": parallel, "batch": batch})


def describe_layout(plan: Plan) -> str:
    """A plan's layout as overrides on the command line."""
    parallel = plan.config.parallel
    parts = [f"parallel.tensor={parallel.tensor}", f"parallel.sequence={str(parallel.sequence).lower()}"]
    parts += [f"parallel.pipeline={parallel.pipeline}", f"parallel.zero={parallel.zero}"]
    parts += [f"parallel.recompute={parallel.recompute}", f"batch.micro_size={plan.config.batch.micro_size}"]
    return " ".join(parts)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
