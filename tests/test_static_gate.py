"""The static gate catches every planted defect, passes the kernels that are right, and has a record of all of ours."""

import json
from dataclasses import replace

import planted
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_kernels import configs, formats, machine_code, static_gate
from lora_kernels.configs import Config

pytestmark = pytest.mark.compile

M, N, K, R = 8192, 4096, 4096, 64


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def descriptors(config, *rest):
    shapes = ((M, K), (config.block_m, config.block_k)), ((N, K), (config.block_n, config.block_k))
    x, w = (TensorDescriptor.from_tensor(empty(*shape), list(block)) for shape, block in shapes)
    return x, w, TensorDescriptor.from_tensor(empty(M, N), [config.block_m, config.block_n]), K, *rest


def pointers(config):
    return empty(M, K), empty(N, K), empty(M, N), K, K, K, N


def chosen(config):
    x, w, y, _ = descriptors(config)
    h, b = (TensorDescriptor.from_tensor(empty(rows, R), [config.block_m, config.block_k]) for rows in (M, N))
    return x, w, h, b, y, K, R


def persistent(config):
    x, w, _, _ = descriptors(config)
    return x, w, empty(M, N), M, N, K


def gate(kernel, arguments, config, capability):
    constants = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k)
    code = machine_code.compile_launch(kernel, arguments(config), constants, config, capability)
    figures = machine_code.measure(code)
    return figures, machine_code.judge(code, figures)


SQUARE = Config(128, 128, 64, num_warps=8, num_stages=3)
WIDE = Config(128, 256, 64, num_warps=8, num_stages=4)


@pytest.mark.parametrize(
    ("kernel", "arguments", "config", "capability", "mma"),
    [
        (planted.pointer_gemm, pointers, replace(SQUARE, block_k=32), 80, {"HMMA.16816": 32}),
        (planted.pointer_gemm, pointers, SQUARE, 90, {"HGMMA.64x128x16": 4}),
        (planted.descriptor_gemm, descriptors, SQUARE, 90, {"HGMMA.64x128x16": 4}),
        (planted.descriptor_gemm, descriptors, WIDE, 90, {"HGMMA.64x256x16": 4}),
        (planted.descriptor_gemm, descriptors, SQUARE, 100, {"UTCHMMA": 4}),
    ],
)
def test_a_good_kernel_passes(kernel, arguments, config, capability, mma):
    figures, problems = gate(kernel, arguments, config, capability)
    assert not problems
    assert figures.mma == mma
    assert figures.wait_depth == (1 if capability == 90 else None)
    assert figures.buffers >= config.num_stages - 1
    assert figures.narrowest_load == (16 if kernel is planted.pointer_gemm else None)


@pytest.mark.parametrize(
    ("kernel", "arguments", "config", "capability", "expected"),
    [
        (planted.zero_trip_loop, descriptors, SQUARE, 90, ["C7515", "waits for all wgmma"]),
        (planted.unknown_alignment, pointers, WIDE, 90, ["spills", "not pipelined", "a load of 2 B"]),
        (planted.unknown_alignment, pointers, replace(SQUARE, block_k=32), 80, ["not pipelined", "a load of 2 B"]),
        (planted.descriptor_gemm, descriptors, replace(WIDE, num_stages=5), 90, ["shared memory 245800 B > 232448 B"]),
        (planted.chosen_descriptor, chosen, SQUARE, 90, ["not pipelined", "waits for all wgmma"]),
        (planted.chosen_descriptor, chosen, SQUARE, 100, ["not pipelined"]),
        (planted.warp_specialised, persistent, replace(SQUARE, num_warps=4), 90, ["TMA box 128x64 != tile 64x64"]),
        (planted.double_precision, descriptors, SQUARE, 90, ["fp64"]),
        (planted.descriptor_gemm, descriptors, replace(WIDE, num_warps=4), 90, ["spills"]),
    ],
)
def test_a_planted_defect_is_caught(kernel, arguments, config, capability, expected):
    _, problems = gate(kernel, arguments, config, capability)
    for part in expected:
        assert any(part in problem for problem in problems), (part, problems)


def test_a_lost_mma_is_caught():
    code = machine_code.compile_launch(
        planted.descriptor_gemm, descriptors(SQUARE), dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64), SQUARE, 90
    )
    figures = replace(machine_code.measure(code), mma={"HMMA.16816": 64})
    assert machine_code.judge(code, figures) == ["no HGMMA.64x128x16 in the main loop, only HMMA.16816"]


def test_a_loop_is_found_by_dominance():
    """A spin-wait placed behind the kernel jumps back into the loop, but is not one itself with what lies between."""
    program = [
        ("LDC", ""), ("SYNCS", ""), ("BRA", "0x60", True), ("HGMMA.64x8x16", ""), ("BRA", "0x10", True), ("EXIT", ""),
        ("SYNCS", ""), ("BRA", "0x60", True), ("BRA", "0x30"), ("BRA", "0x90"),
    ]  # fmt: skip
    instructions = [
        machine_code._Instruction(16 * i, bool(guard), opcode, operands)
        for i, (opcode, operands, *guard) in enumerate(program)
    ]
    loops = [[i.address // 16 for i in loop] for loop in machine_code._loops(instructions)]
    assert sorted(loops) == [[1, 2, 3, 4, 6, 7, 8], [6, 7], [9]]


@pytest.fixture(scope="module")
def variants():
    return static_gate.variants()


def test_the_variants_use_every_row(variants):
    for capability in configs.ARCHITECTURES:
        used = {(v.kernel.__name__.removesuffix("_kernel"), v.config) for v in variants if v.capability == capability}
        for row in configs.architecture(capability).ROWS:
            # Without its base layer the kernel of `extended` is that of `chained`.
            kernel = "batched_extended" if row.kernel == "batched_chained" else row.kernel.removeprefix("quantized_")
            assert (kernel, row.config) in used


def test_the_variants_use_every_dtype_and_switch(variants):
    words = {word for v in variants if v.kernel.__name__ == "extended_kernel" for word in v.name.split()}
    assert {"bf16", "fp16", "fp32", "PRECISION=tf32", "DROPOUT", "HAS_BIAS", "KN", "TMA", "HALVES"} <= words
    assert any(word.startswith("odd=") for word in words)


def test_the_record_has_every_variant(variants):
    record = json.loads(static_gate.RECORD.read_text())
    assert record["variants"].keys() == {v.name for v in variants}
    assert all(not figures["spills"] and not figures["stack"] for figures in record["variants"].values())


def test_what_a_weight_costs_in_the_k_loop(variants):
    """Instructions a weight while decoding, in every format and on every architecture; the model counts on no more."""
    record = json.loads(static_gate.RECORD.read_text())["variants"]
    found = {}
    for v in variants:
        if "one_launch" in v.kernel.__name__ and v.config.block_m == 16 and "per_weight" in record[v.name]:
            found.setdefault((v.capability, v.constants["LOAD"].__name__), []).append(record[v.name]["per_weight"])
    kernels = [name for name, kind in formats.FORMATS.items() if kind.INSTRUCTIONS]
    assert found.keys() == {(capability, name) for capability in configs.ARCHITECTURES for name in kernels}
    for (_, name), figures in found.items():
        assert (
            len(figures) == len(formats.FORMATS[name].VARIANTS) and max(figures) <= formats.FORMATS[name].INSTRUCTIONS
        )


def test_headline(variants):
    """The tile that the model of sm_90 counts on: 128x256x64 in four stages, beside a rank of up to 128."""
    tile = "sm_90 extended_kernel bf16 BLOCK_M=128 BLOCK_N=256 BLOCK_K=64"
    names = [v.name for v in variants if v.name.startswith(tile) and "TMA" in v.name]
    assert {"BLOCK_R=16 RANK_BLOCKS=1", "BLOCK_R=64 RANK_BLOCKS=1", "BLOCK_R=64 RANK_BLOCKS=2"} <= {
        " ".join(name.split()[6:8]) for name in names
    }
    record = json.loads(static_gate.RECORD.read_text())["variants"]
    for figures in map(record.get, names):
        assert figures["buffers"] == 4
        assert figures["shared"] < 232_448
        assert figures["spills"] == figures["stack"] == 0
        assert figures["mma"] == {"HGMMA.64x256x16": 4}


@pytest.mark.parametrize(
    ("figure", "value", "is_worse"),
    [
        ("registers", 169, True), ("registers", 167, False), ("shared", 1001, True), ("wait_depth", 0, True),
        ("wait_depth", None, True), ("async_copies", 1, True), ("async_copies", 3, False), ("narrowest_load", 8, True),
        ("mma", {"HMMA.16816": 4}, True), ("loop_length", 91, True), ("buffers", 3, True), ("spills", 4, True),
    ],
)  # fmt: skip
def test_regressions(figure, value, is_worse):
    recorded = dict(
        registers=168, spills=0, stack=0, shared=1000, mma={"HGMMA.64x256x16": 4}, buffers=4, wait_depth=1,
        async_copies=2, narrowest_load=16, loop_length=90,
    )  # fmt: skip
    assert static_gate.regressions(recorded, recorded) == []
    assert bool(static_gate.regressions({**recorded, figure: value}, recorded)) == is_worse


def test_regressions_name_the_way_to_record():
    assert "--update" in static_gate.regressions({}, None)[0]


def test_command_line(tmp_path, capsys):
    record = tmp_path / "record.json"
    chosen = ["--arch", "90", "-k", "drop_kernel bf16", "--record", str(record)]
    assert static_gate.main(chosen) == 1
    assert static_gate.main([*chosen, "--update"]) == 0
    assert static_gate.main(chosen) == 0
    written = json.loads(record.read_text())
    assert written["versions"] == static_gate.versions()
    (figures,) = written["variants"].values()
    figures["registers"] -= 1
    record.write_text(json.dumps(written))
    assert static_gate.main(chosen) == 1
    assert "registers was" in " ".join(capsys.readouterr().out.split())
    written["versions"]["ptxas"] = "0.0"
    record.write_text(json.dumps(written))
    assert static_gate.main(chosen) == 0
    assert "not compared" in " ".join(capsys.readouterr().out.split())


def test_command_line_rejects_what_matches_nothing(capsys):
    with pytest.raises(SystemExit):
        static_gate.main(["-k", "no_such_kernel"])
    assert "no variant matches" in capsys.readouterr().err


def test_every_variant_passes():
    """`make compile` compiles all; here those that differ from the record in what they are compiled from."""
    assert static_gate.main(["--changed"]) == 0


def test_a_change_is_compiled(tmp_path, monkeypatch, variants):
    names = [variant.name for variant in variants]
    digests = {variant.name: {"digest": static_gate.digest(variant)} for variant in variants}
    record = {"versions": static_gate.versions(), "variants": digests | {names[1]: {}}}
    copy = tmp_path / "record.json"
    copy.write_text(json.dumps(record))
    compiled = []
    monkeypatch.setattr(static_gate, "_check_all", lambda chosen: compiled.extend(v.name for v in chosen) or [])
    static_gate.main(["--changed", "--record", str(copy)])
    assert names[1] in compiled
    assert len(compiled) < len(names) / 10
    record["versions"]["ptxas"] = "0.0"
    copy.write_text(json.dumps(record))
    compiled.clear()
    static_gate.main(["--changed", "--record", str(copy)])
    assert compiled == names


def test_the_digest_follows_the_source_and_the_launch(variants, monkeypatch):
    one = variants[0]
    assert len({static_gate.digest(v) for v in variants}) == len(variants)
    assert static_gate.digest(one._replace(config=replace(one.config, num_stages=7))) != static_gate.digest(one)
    before = static_gate.digest(one)
    monkeypatch.setattr(one.kernel, "hash", "another source")
    assert static_gate.digest(one) != before
