"""vLLM's shrink and expand kernels behind its base layer, with the metadata that it prepares once a step."""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider, needs_gpu


def providers(device: torch.device) -> list[Provider]:
    needs_gpu(device)
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink, utils

    def batched(problem, tensors):
        if tensors.x.dtype == torch.float32:
            raise NotImplementedError("has fp16 and bf16 adapters only")
        utils._LORA_A_PTR_DICT.clear()  # its caches know tensors by their address, and addresses come again
        utils._LORA_B_PTR_DICT.clear()
        meta = LoRAKernelMeta.make(problem.distinct, problem.m, device)
        meta.prepare_tensors(tensors.slots)
        rows = meta.meta_args(problem.m, specialize_active_lora=False)  # its default
        scaled = tensors.b * tensors.scalings[:, None, None].to(tensors.b.dtype)  # as it loads adapters
        a, b = (tensors.a[:, None],), (scaled[:, None],)
        size = (1, problem.m, max(problem.ranks))

        def step(x):
            y = F.linear(x, tensors.weight)
            h = torch.empty(size, dtype=torch.float32, device=device)
            lora_shrink(x, a, h, *rows, 1.0)
            lora_expand(h, b, y, *rows, offset_start=0, add_inputs=True)
            return y

        return step

    return [Provider("vLLM", batched=batched)]
