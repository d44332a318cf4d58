"""The machines that a plan is made for, and what is assumed of them."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megatron_mdm.config.errors import UserError
from megatron_mdm.config.load import Origins, Tree, read_mapping, validated
from megatron_mdm.config.schema import Section

GIB = 2**30


class Cluster(Section):
    """Nodes of equal GPUs. Rates are per GPU, in one direction, as data sheets give them."""

    nodes: int = Field(default=1, gt=0)
    gpus_per_node: int = Field(default=8, gt=0)
    memory_gib: float = Field(gt=0)  # of one GPU, as nvidia-smi shows it
    reserve_gib: float = Field(default=2.0, ge=0)  # CUDA context, libraries' workspaces; NCCL's buffers are counted
    fragmentation: float = Field(default=0.05, ge=0, lt=1)  # share of the memory that the allocator cannot hand out
    host_memory_gib: float = Field(default=1024.0, gt=0)  # of one node, for offloaded states and copies of checkpoints
    host_gbytes_per_s: float = Field(default=20.0, gt=0)  # from a GPU to its host
    peak_tflops: float = Field(gt=0)  # dense bf16 matrix products
    fp32_share: float = Field(default=0.067, gt=0, le=1)  # of that peak, in fp32 without TF32: an H100's 66.9 of 989
    efficiency: float = Field(default=0.55, gt=0, le=1)  # share of the peak that a layer's products and kernels reach
    layer_ms: float = Field(default=0.6, ge=0)  # a host's time to start a layer's kernels, forward and backward
    memory_gbytes_per_s: float = Field(gt=0)  # the GPU's own memory, which bounds the optimizer's step
    intra_node_gbytes_per_s: float = Field(gt=0)  # between GPUs of a node
    inter_node_gbytes_per_s: float = Field(gt=0)  # of each GPU, when all of a node talk to another node
    link_efficiency: float = Field(default=0.8, gt=0, le=1)  # share of the links' rates that collectives reach
    storage_gbytes_per_s: float = Field(default=2.0, gt=0)  # of the whole job, for checkpoints
    price_per_gpu_hour: float = Field(default=0.0, ge=0)

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """What a rank's tensors may fill."""
        return (self.memory_gib * (1 - self.fragmentation) - self.reserve_gib) * GIB

    def flops_per_s(self) -> float:
        """FLOP/s that one GPU sustains."""
        return self.peak_tflops * 1e12 * self.efficiency

    def link_bytes_per_s(self, span: int) -> float:
        """The rate of a group whose first and last rank are span − 1 apart: within a node, or over the slower links."""
        within = span <= self.gpus_per_node
        rate = self.intra_node_gbytes_per_s if within else self.inter_node_gbytes_per_s
        return rate * 1e9 * self.link_efficiency


PRESETS = {
    "rtx4090-24gb": Cluster(
        gpus_per_node=1,
        memory_gib=23.5,
        host_memory_gib=64,
        peak_tflops=165,
        fp32_share=0.5,
        memory_gbytes_per_s=1008,
        intra_node_gbytes_per_s=25,
        inter_node_gbytes_per_s=1,
    ),
    "l40s-48gb": Cluster(
        gpus_per_node=1,
        memory_gib=44.5,
        host_memory_gib=256,
        peak_tflops=362,
        fp32_share=0.25,
        memory_gbytes_per_s=864,
        intra_node_gbytes_per_s=25,
        inter_node_gbytes_per_s=10,
    ),
    "a100-80gb": Cluster(
        memory_gib=79.2,
        peak_tflops=312,
        memory_gbytes_per_s=2039,
        intra_node_gbytes_per_s=300,
        inter_node_gbytes_per_s=25,
    ),
    "h100-80gb": Cluster(
        memory_gib=79.6,
        peak_tflops=989,
        efficiency=0.45,
        memory_gbytes_per_s=3350,
        intra_node_gbytes_per_s=450,
        inter_node_gbytes_per_s=50,
    ),
}


def read_cluster(name: str, nodes: int = 0, gpus_per_node: int = 0) -> Cluster:
    """A preset, or a YAML file with the fields above (`preset:` names one to start from). Numbers above 0 replace
    those of the cluster. Raises UserError."""
    values, origins = (PRESETS[name].model_dump(), {}) if name in PRESETS else _from_file(Path(name))
    values.update({key: value for key, value in (("nodes", nodes), ("gpus_per_node", gpus_per_node)) if value})
    return validated(Cluster, values, origins, name)


def _from_file(path: Path) -> tuple[Tree, Origins]:
    if not path.is_file():
        raise UserError(f"cluster {path}: neither a preset ({', '.join(PRESETS)}) nor a readable file")
    values, origins = read_mapping(path, Cluster)
    preset = values.pop("preset", "")
    if preset and preset not in PRESETS:
        raise UserError(f"{path}: 'preset' {preset} is unknown; choose of {', '.join(PRESETS)}")
    return {**(PRESETS[preset].model_dump() if preset else {}), **values}, origins
