"""scripts/compile_kernels.py: default configurations compile without a GPU, spill nothing and fit; the rest by make."""

import re
from dataclasses import replace

import pytest
import torch
from child_process import needs_triton

from memserve.jit import KernelResources

# What models in use need most, and the smallest of each other kind; `make compile-all` compiles all.
SELECTION = [
    ("paged_prefill", 128, torch.bfloat16, 90),
    ("paged_prefill", 64, torch.float16, 80),
    ("paged_decode", 128, torch.bfloat16, 90),
    ("paged_decode", 64, torch.float32, 80),
    ("kv_write", 80, torch.bfloat16, 90),
    ("norm", 4096, torch.bfloat16, 80),
    ("swiglu", 576, torch.float16, 90),
    ("few_rows", 4096, torch.bfloat16, 80),
    ("row_copy", 1024, torch.uint8, 80),
]


@needs_triton
@pytest.mark.parametrize(("kernel", "size", "dtype", "capability"), SELECTION)
def test_the_default_configuration_compiles_spills_nothing_and_fits(script, kernel, size, dtype, capability) -> None:
    chosen = [c for c in script("compile_kernels").cases(kernel, capability, [size]) if c.dtype == dtype]
    done = [script("compile_kernels").compile_case(case) for case in chosen]
    assert done and all(c.fits for c in done), [c.resources for c in done]


# SmolLM2 in float32, Llama 2 and Qwen2 in bfloat16; blocks of one token and of a number that is no power of two.
OTHER_SHAPES = [
    ("paged_prefill", 64, torch.float32, 90, 3, 16),
    ("paged_decode", 64, torch.bfloat16, 90, 1, 48),
    ("paged_decode", 128, torch.float32, 80, 8, 1),
    ("paged_prefill", 128, torch.bfloat16, 90, 7, 48),
]


@needs_triton
@pytest.mark.parametrize(("kernel", "size", "dtype", "capability", "num_groups", "block_size"), OTHER_SHAPES)
def test_so_it_does_for_other_groups_and_blocks(
    script, kernel, size, dtype, capability, num_groups, block_size
) -> None:
    module = script("compile_kernels")
    chosen = module.cases(kernel, capability, [size], module.CacheShape(num_groups, block_size))
    done = [module.compile_case(case) for case in chosen if case.dtype == dtype]
    assert done and all(c.fits for c in done), [c.resources for c in done]


@needs_triton
@pytest.mark.parametrize("capability", [86, 100, 120])
def test_gpus_without_rows_of_their_own_have_the_shared_memory_for_those_that_they_take(script, capability) -> None:
    """A kernel of the largest tiles; 100 KiB and more would not fit into a GPU of a desktop."""
    module = script("compile_kernels")
    case = next(c for c in module.cases("paged_prefill", capability, [128]) if c.dtype == torch.bfloat16)
    assert module.compile_case(case).resources.shared_bytes <= module.SHARED_KIB[capability] * 1024


@needs_triton
def test_a_group_that_the_runner_refuses_is_refused_before_anything_is_compiled(script, capsys) -> None:
    with pytest.raises(SystemExit, match="paged_prefill on sm_80: .* 32 query heads a kv head: expected at most 16"):
        script("compile_kernels").main(["--kernels", "paged_prefill", "--capabilities", "80", "--groups", "32"])
    assert capsys.readouterr().out == ""


WARPGROUP_PRODUCT, PRODUCT, COPY = "HGMMA.", "HMMA.16816", "LDGSTS.E.BYPASS.128"  # tensor cores; cache to shared memory
SWIZZLED = r"maxPhase = 8|swizzlingByteWidth = 128"
WIDE_LOAD, WIDE_STORE = "LDG.E.128", "STG.E.128"


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "size", "dtype", "capability", "wanted"),
    [
        ("paged_prefill", 128, torch.bfloat16, 90, [WARPGROUP_PRODUCT, COPY]),
        ("paged_prefill", 128, torch.bfloat16, 80, [PRODUCT, COPY]),
        ("paged_decode", 128, torch.bfloat16, 90, [PRODUCT, COPY]),
        ("kv_write", 128, torch.bfloat16, 90, [WIDE_LOAD, WIDE_STORE]),
        ("norm", 4096, torch.bfloat16, 90, [WIDE_LOAD, WIDE_STORE]),
        ("swiglu", 4096, torch.bfloat16, 90, [WIDE_LOAD, WIDE_STORE]),
        ("few_rows", 4096, torch.bfloat16, 90, [PRODUCT, COPY]),
        ("row_copy", 1024, torch.uint8, 90, [WIDE_LOAD, WIDE_STORE]),
    ],
)
def test_machine_code_has_the_instructions_that_make_it_fast(script, kernel, size, dtype, capability, wanted) -> None:
    """16 bytes a thread and access, asynchronous copies of KV and weights, products on tensor cores."""
    case = next(c for c in script("compile_kernels").cases(kernel, capability, [size]) if c.dtype == dtype)
    found = script("compile_kernels").compile_case(case).resources.instructions()
    assert [name for name in wanted if not any(i.startswith(name) for i in found)] == []


@needs_triton
@pytest.mark.parametrize(("kernel", "size"), [("few_rows", 4096), ("paged_decode", 128), ("paged_prefill", 128)])
def test_factors_lie_in_shared_memory_so_that_tensor_cores_read_them_at_full_rate(script, kernel, size) -> None:
    """Rows of 128 bytes and more, one below the other, are read eight times as slowly."""
    for case in script("compile_kernels").cases(kernel, 90, [size]):
        if case.dtype == torch.bfloat16:
            tiles = script("compile_kernels").compile_case(case).resources.tiles()
            slow = [t for t, lies in tiles.items() if t.endswith("bf16") and not re.search(SWIZZLED, lies)]
            assert slow == [] and (tiles or "combine" in case.kernel), case.what


OF_A_STEP = [("few_rows", 4096), ("kv_write", 128), ("paged_decode", 128), ("norm", 4096), ("swiglu", 4096)]


@needs_triton
@pytest.mark.parametrize(("kernel", "size"), OF_A_STEP)
def test_a_kernel_that_is_launched_early_touches_nothing_before_its_wait(script, kernel, size) -> None:
    """But weights, which it asks into the L2 cache; and the next one is let in after the wait, whose own is for all."""
    chosen = [c for c in script("compile_kernels").cases(kernel, 90, [size]) if c.dtype == torch.bfloat16]
    for case in chosen:
        done = script("compile_kernels").compile_case(replace(case, launch=replace(case.launch, early=True)))
        names = done.resources.instructions()
        wait, lets_in = names.index("ACQBULK"), names.index("PREEXIT")
        assert done.fits and wait < lets_in and names.count("ACQBULK") == names.count("PREEXIT") == 1
        assert not [n for n in names[:wait] if n.startswith(("LD", "ST", "ATOM", "EXIT")) and not n.startswith("LDC")]
        assert any(n.startswith("CCTL") for n in names[:wait]) == (kernel == "few_rows")


@needs_triton
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, torch.bfloat16), (80, torch.float32)])
def test_the_cache_write_exchanges_nothing_between_threads(script, head_dim, dtype) -> None:
    """Queries, keys and their angles lie alike in the threads' registers: no shared memory, no waiting for others."""
    case = next(c for c in script("compile_kernels").cases("kv_write", 90, [head_dim]) if c.dtype == dtype)
    got = script("compile_kernels").compile_case(case).resources
    assert got.shared_bytes == 0 and not any(name.startswith("BAR.") for name in got.instructions())


@needs_triton
def test_a_kernel_that_spills_or_takes_too_much_shared_memory_does_not_fit(script) -> None:
    module = script("compile_kernels")
    case = next(module.cases("row_copy", 80, [1024]))
    fits = [module.Compiled(case, KernelResources(255, *got)).fits for got in ((0, 163 * 1024), (8, 0), (0, 166913))]
    assert fits == [True, False, False]


@pytest.mark.parametrize("option", ["--groups", "--block-sizes"])
def test_a_cache_of_no_heads_or_no_tokens_is_refused_by_name(script, capsys, option) -> None:
    with pytest.raises(SystemExit):
        script("compile_kernels").main([option, "0", "--kernels", "swiglu", "--capabilities", "90"])
    assert f"{option}: 0: expected an integer >= 1" in capsys.readouterr().err
