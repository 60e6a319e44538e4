"""Stand-ins for other people's packages: as much of their interfaces as the providers call, on plain PyTorch.

A provider that passes its gate with one of these calls the rival as its interface wants it, and gets its results right.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from torch import nn


def install(monkeypatch, name: str) -> None:
    """Put the stand-in of a provider's package where imports find it."""
    for path, contents in PACKAGES[name]().items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            if (parent := ".".join(parts[:i])) not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        for attribute, value in contents.items():
            monkeypatch.setattr(sys.modules[path], attribute, value, raising=False)


def _projection(x, weight, a, b, scaling):
    assert x.dim() == 3, "its backward pass wants three dimensions"
    return x @ weight.mT + scaling * (x @ a.mT) @ b.mT


def _axolotl():
    def apply(x, dropped, weight, bias, quant, a, b, scaling, lora_bias, magnitude):
        assert (dropped, bias, quant, lora_bias, magnitude) == (None,) * 5
        return _projection(x, weight, a, b, scaling)

    return {"axolotl.kernels.lora": {"LoRA_O": SimpleNamespace(apply=apply)}}


def _unsloth():
    def apply(x, weight, quant, a, b, scaling, dropout_p=None, bias=None):
        assert (quant, dropout_p, bias) == (None,) * 3
        return _projection(x, weight, a, b, scaling)

    return {"unsloth.kernels.fast_lora": {"LoRA_W": SimpleNamespace(apply=apply)}}


class _Patched(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.lora_B(self.lora_A(x) * self.scale)


def _nemo():
    def patch_linear_module(linear, dim=8, alpha=32, dropout=0.0, dropout_position="post"):
        assert dropout_position == "pre"
        linear.__class__, linear.scale = _Patched, alpha / dim
        linear.lora_A, linear.lora_B = (
            nn.Linear(linear.in_features, dim, bias=False), nn.Linear(dim, linear.out_features, bias=False)
        )  # fmt: skip
        return linear

    return {"nemo_automodel.components._peft.lora": {"patch_linear_module": patch_linear_module}}


def _vllm():
    class Meta:
        @classmethod
        def make(cls, max_loras, max_num_tokens, device):
            return cls()

        def prepare_tensors(self, token_lora_mapping):
            self.mapping = token_lora_mapping

        def meta_args(self, token_nums, specialize_active_lora):
            return (self.mapping[:token_nums], *[None] * 6)

    def lora_shrink(x, a, h, mapping, *rest):
        *_, scaling = rest
        assert len(rest) == 7
        h[0] = torch.einsum("mk,mrk->mr", x, a[0][mapping, 0]).float() * scaling

    def lora_expand(h, b, y, mapping, *rest, offset_start=0, add_inputs=False):
        assert len(rest) == 6 and add_inputs and offset_start == 0
        y += torch.einsum("mr,mnr->mn", h[0], b[0][mapping, 0].float()).to(y.dtype)

    utils = SimpleNamespace(_LORA_A_PTR_DICT={}, _LORA_B_PTR_DICT={})
    names = {"LoRAKernelMeta": Meta, "lora_shrink": lora_shrink, "lora_expand": lora_expand, "utils": utils}
    return {"vllm.lora.ops.triton_ops": names}


def _sglang():
    def batch_info(use_cuda_graph, bs, num_segments, seg_indptr, weight_indices, lora_ranks, scalings, max_len, seg_lens,
                   permutation=None):  # fmt: skip
        return SimpleNamespace(**locals())

    def shrink(x, weights, batch, num_slices):
        h = torch.zeros(len(x), weights.shape[1] * num_slices, dtype=x.dtype)
        for rows, slot in _segments(batch):
            h[rows] = x[rows] @ weights[slot].mT
        return h

    def expand(h, weights, batch, slice_offsets, max_slice_size, base_output):
        assert slice_offsets.tolist() == [0, max_slice_size]
        for rows, slot in _segments(batch):
            base_output[rows] += batch.scalings[slot].to(h.dtype) * (h[rows] @ weights[slot].mT)
        return base_output

    class Runner:
        def __init__(self, workspace, *, max_loras, device):
            pass

        def begin_batch(self, *, token_slots, lora_ranks, scalings, num_tokens, phase, graph_mode):
            self.slots, self.scalings = token_slots.long(), scalings

        def plan_for(self, kind, max_rank, in_features, out_features, *, num_tokens):
            return out_features

        def apply(self, x, base_fn, plan, *, a, b, offsets):
            assert offsets == (0, plan)
            h = torch.einsum("mk,mrk->mr", x, a[self.slots]) * self.scalings[self.slots, None].to(x.dtype)
            return base_fn() + torch.einsum("mr,mnr->mn", h, b[self.slots])

    return {
        "sglang.kernels.ops.lora.dense.chunked_sgmv_shrink": {"chunked_sgmv_lora_shrink_forward": shrink},
        "sglang.kernels.ops.lora.dense.chunked_sgmv_expand": {"chunked_sgmv_lora_expand_forward": expand},
        "sglang.srt.lora.utils": {"LoRABatchInfo": batch_info, "Phase": SimpleNamespace(DECODE=0, PREFILL=1)},
        "sglang.srt.lora.dense.plan": {"DenseLoraKind": SimpleNamespace(LINEAR=0)},
        "sglang.srt.lora.dense.runner": {"DenseLoraRunner": Runner},
        "sglang.srt.lora.workspace": {"LoraWorkspace": object},
    }


def _segments(batch):
    assert batch.num_segments == len(batch.weight_indices) == len(batch.seg_indptr) - 1
    for i, slot in enumerate(batch.weight_indices.tolist()):
        first, last = batch.seg_indptr[i : i + 2].tolist()
        assert 0 < last - first <= batch.max_len
        yield batch.permutation[first:last], slot


PACKAGES = {"axolotl": _axolotl, "unsloth": _unsloth, "nemo": _nemo, "vllm": _vllm, "sglang": _sglang}
