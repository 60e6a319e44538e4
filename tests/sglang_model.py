"""A small model under SGLang's own LoRA manager and pool, on a machine without a GPU: with its backends and with ours."""

import types

import engines  # noqa: F401  before SGLang
import torch
from sglang.srt.layers import linear
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.lora import lora_manager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig

SLOTS, RANK, K, VOCAB = 4, 16, 64, 50
RANKS = {"wide": 16, "narrow": 3, "half": 8}
RAGGED = [("narrow", 9), (None, 4), ("wide", 1), ("half", 13), ("narrow", 2), (None, 1)]
CONFIG = LlamaConfig(hidden_size=K, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCAB)
CONFIG.q_lora_rank = 32
KINDS = {
    "qkv_proj": (linear.QKVParallelLinear, (K, 16, 4, 2), [64, 32, 32]),
    "gate_up_proj": (linear.MergedColumnParallelLinear, (K, [40, 40]), [40, 40]),
    "in_proj": (linear.MergedColumnParallelLinear, (K, [24, 16, 8]), [24, 16]),  # the last has no adapters
    "q_b_proj": (linear.ColumnParallelLinear, (K, 48), [48]),
    "o_proj": (linear.RowParallelLinear, (K, 48), [48]),
    "fused_qkv_a_proj_with_mqa": (linear.ReplicatedLinear, (K, 48), [32, 16]),
}
WHOLE = tuple(kind for kind in KINDS if kind != "in_proj")  # whose base layers have no columns without adapters
PARTS = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"], "in_proj": ["gate_proj", "x_proj"],
    "fused_qkv_a_proj_with_mqa": ["q_a_proj", "kv_a_proj_with_mqa"],
}  # fmt: skip


class Unpinned(TorchFunctionMode):
    """Of SGLang's own the one thing that is stood in for: without a GPU there is no pinned memory."""

    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        if function is torch.Tensor.pin_memory:
            return args[0]
        return function(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


def parallel(rank, size):
    group = types.SimpleNamespace(rank_in_group=rank, world_size=size, is_last_rank=True, all_reduce=lambda y: y)
    return get_parallel().override(
        tp_rank=rank, tp_size=size, attn_tp_rank=rank, attn_tp_size=size, attn_dp_enabled=False, moe_ep_size=1, moe_ep_rank=0,
        moe_tp_size=size, moe_tp_rank=rank, tp_group=group, attn_tp_group=group, pp_group=group, attn_cp_size=1,
        dcp_replicate_q_proj=False,
    )  # fmt: skip


class Model(nn.Module):
    """A layer of each kind, an embedding and an lm_head, under the names by which SGLang finds them."""

    config = CONFIG

    def __init__(self, dtype, kinds, base):
        super().__init__()
        made = {name: KINDS[name][0](*KINDS[name][1], bias=True, params_dtype=dtype) for name in kinds}
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.ModuleDict(made)])
        self.model.embed_tokens = VocabParallelEmbedding(VOCAB, K, params_dtype=dtype)
        self.lm_head = ParallelLMHead(VOCAB, K, params_dtype=dtype, padding_size=1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(K**-0.5 * base).bfloat16())
        self.requires_grad_(False)

    def get_hidden_dim(self, name, layer):
        return (VOCAB, K) if name == "embed_tokens" else (K, VOCAB) if name == "lm_head" else (K, sum(KINDS[name][2]))

    def get_stacked_multiply(self, name):
        return len(KINDS[name][2]) if name in KINDS else 1


def manager(backend, dtype=torch.float32, kinds=WHOLE, extra=(), base=1.0):
    """SGLang's manager of a model, its adapters loaded into host memory."""
    made = lora_manager.LoRAManager(
        Model(dtype, kinds, base), CONFIG, SLOTS, None, dtype, None, backend, RANK, {*kinds, *extra}
    )
    for name, r in RANKS.items():
        load(made, name, r, kinds, extra)
    return made


def load(made, name, r, kinds=WHOLE, extra=(), seed=None):
    """One adapter under PEFT's names; "narrow" lacks some layers."""
    generator, tensors = torch.Generator().manual_seed(seed or r), {}

    def add(path, n):
        a, b = torch.randn(r, K, generator=generator) * K**-0.5, torch.randn(n, r, generator=generator) * r**-0.5
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a.bfloat16(), b.bfloat16()

    for kind in kinds:
        if name == "narrow" and kind in ("gate_up_proj", "o_proj"):
            continue
        for part, width in zip(PARTS.get(kind, [kind]), KINDS[kind][2], strict=True):
            add(f"base_model.model.model.layers.0.{part}", width)
    if "lm_head" in extra:
        add("base_model.model.lm_head", VOCAB)
    if "embed_tokens" in extra:
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(r, VOCAB, generator=generator)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(K, r, generator=generator)
    config = dict(peft_type="LORA", r=r, lora_alpha=2 * r + 1, target_modules=[*kinds, *extra])
    result = made.load_lora_adapter_from_tensors(LoRARef(name, name, name, pinned=False), tensors, config)
    assert result.success, result.error_message


def step(made, segments=RAGGED, decode=False):
    """What SGLang does before each forward pass; a decoding step has one row a request."""
    ids, lengths = zip(*segments, strict=True)
    batch = types.SimpleNamespace(
        batch_size=len(ids), lora_ids=list(ids), forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        extend_seq_lens_cpu=list(lengths), extend_seq_lens=torch.tensor(lengths), extend_num_tokens=sum(lengths),
        return_logprob=False, spec_info=None,
    )  # fmt: skip
    made.fetch_new_loras(set(ids))
    made.prepare_lora_batch(batch)


def layer(made, kind):
    return made.base_model.model.layers[0][kind]


def forward(made, kind, x):
    y = layer(made, kind)(x)
    return y[0] if isinstance(y, tuple) else y


def inputs(segments=RAGGED, dtype=torch.float32):
    rows = sum(length for _, length in segments)
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(3)).bfloat16().to(dtype)
