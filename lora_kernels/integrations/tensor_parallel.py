"""Styles for `parallelize_module` that shard a LoRA layer, PEFT's or ours, and its adapters with it."""

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from lora_kernels import LoRALinear


class _LoRAParallel(ParallelStyle):
    def __init__(self, input_layouts, wanted, placements, output_layouts, use_local_output):
        super().__init__()
        self.input_layouts, self.wanted, self.placements = (input_layouts,), (wanted,), placements
        self.output_layouts, self.use_local_output = (output_layouts,), use_local_output

    def _apply(self, module, device_mesh):
        base = getattr(module, "base_layer", module)
        if not (hasattr(module, "lora_A") and type(base) in (nn.Linear, LoRALinear)):
            raise TypeError(
                f"{type(self).__name__}: got a {type(module).__name__} of a {type(base).__name__}, expected a LoRA layer "
                "of an nn.Linear"
            )
        return distribute_module(module, device_mesh, self._shard, self._prepare, self._finish)

    def _shard(self, name, module, mesh):
        owner = name.partition(".")[0]
        for kind, parameter in module._parameters.items():
            if parameter is not None:
                placement = self.placements[owner if owner in self.placements else kind]
                sharded = distribute_tensor(parameter, mesh, [placement])
                module.register_parameter(kind, nn.Parameter(sharded, parameter.requires_grad))

    def _prepare(self, module, inputs, mesh):
        x, *rest = inputs
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        return x.redistribute(placements=self.wanted), *rest

    def _finish(self, module, y, mesh):
        y = y.redistribute(placements=self.output_layouts)
        return y.to_local() if self.use_local_output else y


class ColwiseLoRA(_LoRAParallel):
    """PyTorch's `ColwiseParallel` for a LoRA layer: each device has its columns of y, its rows of W and of B, and all of A.

    input_layouts     how x comes where it is no DTensor; whole unless said
    output_layouts    how y goes on; sharded in its last dimension unless said
    use_local_output  a plain tensor, or a DTensor

    Raises TypeError where it is applied to anything but a LoRA layer of an `nn.Linear`.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        placements = {"weight": Shard(0), "bias": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}
        super().__init__(
            input_layouts or Replicate(), Replicate(), placements, output_layouts or Shard(-1), use_local_output
        )


class RowwiseLoRA(_LoRAParallel):
    """PyTorch's `RowwiseParallel` for a LoRA layer: each device has its columns of x, of W and of A, and all of B.

    The devices' y are terms of a sum, which `output_layouts` reduces: to the whole y unless said.
    input_layouts is the last dimension sharded unless said; the rest is as in `ColwiseLoRA`.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        placements = {"weight": Shard(1), "bias": Replicate(), "lora_A": Shard(1), "lora_B": Replicate()}
        super().__init__(
            input_layouts or Shard(-1), Shard(-1), placements, output_layouts or Replicate(), use_local_output
        )
