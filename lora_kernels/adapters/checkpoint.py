"""Adapters as PEFT's files: `adapter_model.safetensors` and `adapter_config.json`, in both directions.

Files come from strangers: nothing is unpickled, no regular expression of theirs is run, and every name, shape, dtype
and config field is checked before the model is touched.
"""

import json
import math
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_kernels.functional import DTYPES
from lora_kernels.modules import (
    LoRALinear,
    check_adapter,
    freeze_base,
    linears_by_name,
    lora_layers,
    name_matches,
    replace_linears,
)

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(.{1,500})\.lora_([AB])\.weight")
_PLAIN_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])+")
_CONFIG_BYTES = 2**22  # of which a pattern for each expert of each layer takes most

# What the loader reads, and what does not change the result. Any other field must be off.
_READ = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "bias", "init_lora_weights",
}  # fmt: skip
_IGNORED = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITS = (None, True, False, "gaussian", "orthogonal")  # the others change the base weights as well


class _Adapter(NamedTuple):
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> Path:
    """Write the adapters of `model`'s LoRALinear layers to `directory`, as PEFT does; return the directory.

    `PeftModel.from_pretrained(base_model, directory)` reads it. Tensors keep their dtype. Each file is written beside
    its place and then renamed, so that no reader sees half of one.
    Raises ValueError if there is nothing to save, or if layers differ in `use_rslora` or `lora_dropout`, for which
    PEFT's config has one value; ImportError without safetensors.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("model: has no LoRALinear layer, so there is no adapter to save; see lora_kernels.apply_lora")
    if "" in layers:
        raise ValueError("model: is a LoRALinear itself, expected a model that holds it under a name")
    config = _config_of(model, layers)
    tensors = {
        f"{_PREFIX}{name}.lora_{which}.weight": getattr(layer, f"lora_{which}").weight.detach().contiguous()
        for name, layer in layers.items()
        for which in "AB"
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as temporary:
        _safetensors().torch.save_file(tensors, Path(temporary, WEIGHTS_NAME), metadata={"format": "pt"})
        Path(temporary, CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            os.replace(Path(temporary, name), directory / name)
    return directory


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Load an adapter that `save_adapter` or PEFT wrote into `model`, in place; return `model`.

    `nn.Linear` layers that the file names become `LoRALinear`; layers that are `LoRALinear` already keep rank and
    dtype and take the file's values, `lora_alpha`, `lora_dropout` and `use_rslora`. All but the adapters is frozen.

    Everything is checked first; where this raises, the model is as it was:
    FileNotFoundError    a file is missing
    ValueError           a name, shape, dtype or config field is wrong, or the adapter does not fit the model
    NotImplementedError  the adapter uses a PEFT feature that LoRALinear lacks (DoRA, biases, modules_to_save, ...)
    RuntimeError         a layer is merged
    ImportError          safetensors is not installed
    """
    config, tensors, adapters = read_adapter(directory)
    layers = _find_layers(model, tensors, adapters, config)

    made = {
        layer: LoRALinear.from_linear(layer, *adapters[name])
        for name, layer in layers.items()
        if not isinstance(layer, LoRALinear)
    }
    replace_linears(model, made)
    for name, layer in layers.items():
        layer = made.get(layer, layer)
        layer.lora_alpha, layer.lora_dropout, layer.use_rslora = adapters[name][1:]
        with torch.no_grad():
            layer.lora_A.weight.copy_(tensors[name][0])
            layer.lora_B.weight.copy_(tensors[name][1])
    freeze_base(model)
    return model


def read_adapter(directory: str | os.PathLike) -> tuple[dict, dict[str, tuple[Tensor, Tensor]], dict[str, _Adapter]]:
    """The config, and for each layer `(A, B)` and the settings; sound by themselves, not yet held against a model.

    Raises as `load_adapter` does.
    """
    directory = Path(directory)
    config = _read_config(directory)
    tensors = _read_tensors(directory)
    return config, tensors, {name: _adapter_of(name, config) for name in tensors}


def is_target(name: str, config: dict) -> bool:
    """Whether target_modules lists the layer; False where a regular expression, which is not run, would have to say."""
    targets = config["target_modules"]
    return not isinstance(targets, str) and not config.get("exclude_modules") and name_matches(name, targets)


def _config_of(model, layers) -> dict:
    shared = {}
    for field in ("lora_dropout", "use_rslora"):
        values = {getattr(layer, field) for layer in layers.values()}
        if len(values) > 1:
            raise ValueError(f"model: its layers differ in {field} ({sorted(values)}), but PEFT's config has one value")
        shared[field] = values.pop()
    r = Counter(layer.r for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.lora_alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {f"^{name}": layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != alpha},
        "target_modules": _target_modules(model, layers),
        **shared,
    }


def _target_modules(model, layers) -> list[str] | str:
    """The layers' last names where these say it all, else a regular expression of the full names."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if {name for name, _ in model.named_modules() if name_matches(name, ends)} == set(layers):
        return ends
    return "|".join(map(re.escape, layers))


def _read_config(directory) -> dict:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, expected a directory that PEFT or save_adapter wrote")
    if (size := path.stat().st_size) > _CONFIG_BYTES:
        raise ValueError(f"{path}: has {size} bytes, expected at most {_CONFIG_BYTES}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: got a {type(config).__name__}, expected an object with LoraConfig's fields")

    if config.get("peft_type") != "LORA":
        raise NotImplementedError(f"{path}: peft_type is {config.get('peft_type')!r}, only 'LORA' can be loaded")
    if config.get("bias", "none") != "none":
        raise NotImplementedError(f"{path}: bias is {config['bias']!r}, only 'none' can be loaded")
    if (init := config.get("init_lora_weights")) not in _INITS:
        raise NotImplementedError(f"{path}: init_lora_weights is {init!r}, which changes the base weights")
    for field in sorted(config.keys() - _READ - _IGNORED):
        if config[field] not in (None, False, [], {}):
            raise NotImplementedError(f"{path}: {field} is {_short(config[field])}, a feature that cannot be loaded")

    targets = config.get("target_modules")
    if not isinstance(targets, str) and not _is_list_of_names(targets):
        raise ValueError(f"{path}: target_modules is {_short(targets)}, expected a list of names or a string")
    if not isinstance(config.setdefault("use_rslora", False), bool):
        raise ValueError(f"{path}: use_rslora is {_short(config['use_rslora'])}, expected true or false")
    for field in ("rank_pattern", "alpha_pattern"):
        config[field] = _plain_pattern(path, field, config.get(field) or {})
    try:
        check_adapter(config.get("r"), config.get("lora_alpha"), config.setdefault("lora_dropout", 0.0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def _object(pairs) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{_short(twice)} is there twice")
    return fields


def _plain_pattern(path, field, pattern) -> dict:
    """`{name: (position, value)}` without escapes: where several match a layer, the first counts."""
    if not isinstance(pattern, dict):
        raise ValueError(f"{path}: {field} is {_short(pattern)}, expected an object from names to numbers")
    plain = {}
    for position, (name, value) in enumerate(pattern.items()):
        if not _PLAIN_NAME.fullmatch(name):
            raise NotImplementedError(f"{path}: {field} has {_short(name)}, but only plain names can be read")
        plain.setdefault(name.replace("\\", ""), (position, value))
    return plain


def _adapter_of(name, config) -> _Adapter:
    parts = name.split(".")
    keys = [f"^{name}", *(".".join(parts[i:]) for i in range(len(parts)))]
    values = []
    for field, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        matches = [config[pattern][key] for key in keys if key in config[pattern]]
        values.append(min(matches)[1] if matches else config[field])
    try:
        check_adapter(*values, config["lora_dropout"])
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{CONFIG_NAME}: for {_short(name)}: {error}") from None
    return _Adapter(*values, config["lora_dropout"], config["use_rslora"])


def _read_tensors(directory) -> dict[str, tuple[Tensor, Tensor]]:
    """`{layer name: (A, B)}`."""
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if list(directory.glob("adapter_model*.bin")):
            raise ValueError(
                f"{directory}: holds a pickle (.bin), which can run any code when opened; only {WEIGHTS_NAME} is read. "
                "Convert it where you trust it: PeftModel.save_pretrained(..., safe_serialization=True)"
            )
        raise FileNotFoundError(f"{path}: not there, expected a directory that PEFT or save_adapter wrote")
    safetensors = _safetensors()
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    found = {"A": {}, "B": {}}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            expected = f"{_PREFIX}<layer>.lora_A.weight and .lora_B.weight"
            raise ValueError(f"{path}: holds {_short(key)}, expected only {expected}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{path}: {_short(key)} is {tensor.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        found[match[2]][match[1]] = tensor
    if alone := sorted(found["A"].keys() ^ found["B"].keys()):
        raise ValueError(f"{path}: {_short(alone[0])} has only one of lora_A and lora_B")
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return {name: (a, found["B"][name]) for name, a in found["A"].items()}


def _find_layers(model, tensors, adapters, config) -> dict[str, nn.Module]:
    """The model's layer for each of the adapter's; all of them fit, and none is left over."""
    modules = linears_by_name(model)
    for name, (a, b) in tensors.items():
        if name not in modules:
            raise ValueError(f"model: has no nn.Linear {_short(name)}, which the adapter adapts; is it the right base?")
        _check_layer(name, modules[name], list(a.shape), list(b.shape), adapters[name].r)
    layers = {name: modules[name] for name in tensors}
    covered = set(layers.values())
    if len(covered) < len(layers):
        raise ValueError("model: holds one layer under two names, for which the adapter has different tensors")
    for name, layer in modules.items():
        if layer not in covered and (isinstance(layer, LoRALinear) or is_target(name, config)):
            raise ValueError(f"{WEIGHTS_NAME}: has no tensors for {name}, which the model or target_modules adapts")
    return layers


def _check_layer(name, layer, shape_a, shape_b, r):
    expected_a, expected_b = [r, layer.in_features], [layer.out_features, r]
    if shape_a != expected_a or shape_b != expected_b:
        raise ValueError(
            f"{WEIGHTS_NAME}: {name} has lora_A {shape_a} and lora_B {shape_b}, expected {expected_a} and {expected_b} "
            f"from r = {r} in {CONFIG_NAME} and the model's layer"
        )
    if isinstance(layer, LoRALinear):
        if layer.r != r:
            raise ValueError(f"model: {name} has rank {layer.r}, but the adapter has {r}; load it into the plain model")
        if layer.merged:
            raise RuntimeError(f"model: {name} is merged; call unmerge() before loading another adapter")


def _is_list_of_names(value) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(name, str) for name in value)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("adapter files need the safetensors package: pip install safetensors") from None
    return safetensors
