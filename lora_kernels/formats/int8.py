"""int8: a signed byte for each weight and a scale for each row, symmetric around zero."""

import torch

from lora_kernels.formats.base import QuantizedWeight, check_shape, check_tensor, safe_scale


class Int8Weight(QuantizedWeight):
    """`w[n, k] = data[n, k] * scale[n]`, multiplied in fp32.

    data   int8 `[N, K]`
    scale  fp32 `[N]`
    dtype  of the weight before

    >>> weight = Int8Weight.quantize(torch.tensor([[-1.0, 0.5, 2.0]]))
    >>> weight.data.tolist()
    [[-64, 32, 127]]
    """

    name = "int8"
    INSTRUCTIONS = 5.0

    def __init__(self, data, scale, dtype=torch.bfloat16):
        check_tensor("data", data, (torch.int8,), ("N", "K"))
        shape = check_shape(data.shape)
        check_tensor("scale", scale, (torch.float32,), shape[:1])
        super().__init__(shape, dtype, data=data, scale=scale)

    def _rows(self, start, stop):
        return self.data[start:stop] * self.scale[start:stop, None]

    def _tile(self, capability):
        return (self.data, self.scale, self.shape[1]), ()

    @classmethod
    def _quantize(cls, values, dtype):
        scale = safe_scale(values.abs().amax(1) / 127)
        return cls((values / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale, dtype)

    @classmethod
    def from_bitsandbytes(cls, linear) -> "Int8Weight":
        """The weight of a `bitsandbytes.nn.Linear8bitLt`, sharing its codes; what it does to activations is left out.

        Raises TypeError for another layer, ValueError for one that is not quantised yet.
        """
        if not hasattr(linear, "state"):
            raise TypeError(f"linear: got {type(linear).__name__}, expected a Linear8bitLt of bitsandbytes")
        data = linear.state.CB if linear.state.CB is not None else linear.weight.CB
        absmax = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
        if linear.state.has_fp16_weights or data is None or absmax is None:
            raise ValueError(
                "linear: its weight is not in int8, expected has_fp16_weights=False and a layer moved to a device"
            )
        return cls(data, absmax.float() / 127, torch.float16)

    @classmethod
    def from_torchao(cls, weight) -> "Int8Weight":
        """torchao's int8 tensor with symmetric scales for each row, sharing its codes; NotImplementedError for others."""
        if _qdata(weight) is None:
            raise TypeError(f"weight: got {type(weight).__name__}, expected an int8 tensor of torchao")
        if tuple(weight.block_size) != (1, weight.qdata.shape[1]):
            raise NotImplementedError(f"weight: got block_size {weight.block_size}, expected one scale for each row")
        if getattr(weight, "zero_point", None) is not None and weight.zero_point.any():
            raise NotImplementedError("weight: got zero points other than 0, expected symmetric quantisation")
        return cls(weight.qdata, weight.scale.flatten().float(), weight.dtype)

    @classmethod
    def from_linear(cls, linear):
        if type(linear).__name__ == "Linear8bitLt":
            return cls.from_bitsandbytes(linear)
        weight = getattr(linear, "weight", None)
        return cls.from_torchao(weight) if getattr(_qdata(weight), "dtype", None) == torch.int8 else None


def _qdata(weight):
    """The codes of a torchao tensor with a block size, or None."""
    return weight.qdata if hasattr(weight, "qdata") and hasattr(weight, "block_size") else None
