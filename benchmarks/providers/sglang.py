"""SGLang's LoRA operators: `csgmv`, its default, and `triton_v2`, which overlaps the base GEMM.

The routes of a batch are built at the first call and kept, as they are for all layers of a step.
"""

import torch
import torch.nn.functional as F

from benchmarks.providers import Provider, needs_gpu


def providers(device: torch.device) -> list[Provider]:
    needs_gpu(device)
    return [Provider("SGLang csgmv", batched=_csgmv), Provider("SGLang triton_v2", batched=_triton_v2)]


def _triton_v2(problem, tensors):
    from sglang.srt.lora.dense.plan import DenseLoraKind
    from sglang.srt.lora.dense.runner import DenseLoraRunner
    from sglang.srt.lora.utils import Phase
    from sglang.srt.lora.workspace import LoraWorkspace

    runner = DenseLoraRunner(LoraWorkspace(), max_loras=problem.distinct, device=tensors.x.device)
    runner.begin_batch(
        token_slots=tensors.slots,
        lora_ranks=tensors.ranks,
        scalings=tensors.scalings,
        num_tokens=problem.m,
        phase=Phase.DECODE if problem.m <= 256 else Phase.PREFILL,
        graph_mode=False,
    )
    plan = runner.plan_for(
        DenseLoraKind.LINEAR, max(problem.ranks), problem.k, problem.n, num_tokens=problem.m
    )  # fmt: skip
    return lambda x: runner.apply(
        x, lambda: F.linear(x, tensors.weight), plan, a=tensors.a, b=tensors.b, offsets=(0, problem.n)
    )


def _csgmv(problem, tensors):
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    m, n, device = problem.m, problem.n, tensors.x.device
    chunk = 128 if m >= 256 else 32 if m >= 64 else 16  # as its backend chooses
    segments = [
        (slot, min(chunk, rows - first))
        for slot, rows in enumerate(torch.bincount(tensors.slots, minlength=problem.distinct).tolist())
        for first in range(0, rows, chunk)
    ]
    slots, lengths = (torch.tensor(column, dtype=torch.int32, device=device) for column in zip(*segments, strict=True))
    batch = LoRABatchInfo(
        use_cuda_graph=False, bs=m, num_segments=len(segments), weight_indices=slots, seg_lens=None, max_len=chunk,
        seg_indptr=F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), lora_ranks=tensors.ranks,
        scalings=tensors.scalings, permutation=tensors.slots.argsort(stable=True),
    )  # fmt: skip
    offsets = torch.tensor([0, n], dtype=torch.int32, device=device)

    def step(x):
        h = chunked_sgmv_lora_shrink_forward(x, tensors.a, batch, 1)
        return chunked_sgmv_lora_expand_forward(h, tensors.b, batch, offsets, n, F.linear(x, tensors.weight))

    return step
