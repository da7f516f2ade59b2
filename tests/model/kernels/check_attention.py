"""Attention kernels against their reference in float64; run by test_interpreter.py under Triton's interpreter."""

import numpy as np
import pytest
import torch
from kernels.interpreted import TOLERANCE, Paged, paged, widen_bfloat16_products

from memserve.model.kernels.paged_decode import MAX_SPLITS, num_splits, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, attention_reference, paged_prefill_launch, tokens_a_tile

CAPABILITY = 80
BLOCK = 4
# (in the cache, new): no prefix, one token, block - 1, a block, many; lone first tokens; partial last blocks
RAGGED = [(0, 7), (1, 6), (BLOCK - 1, 5), (BLOCK, 4), (41, 9), (0, 1), (0, 2)]
DECODE = [(0, 1), (1, 1), (BLOCK - 1, 1), (BLOCK, 1), (40, 1), (70, 1)]
CPU = torch.device("cpu")

widen_bfloat16_products()


def computed(case: Paged) -> torch.Tensor:
    """By the kernels, as the backend uses them, into an output full of NaN."""
    num_kv_heads, head_dim = case.kv_2NBKD.shape[3:]
    out_THD = torch.full_like(case.q_THD, torch.nan)
    prefilling, decoding = np.flatnonzero(case.num_new > 1), np.flatnonzero(case.num_new == 1)
    tokens = tokens_a_tile(case.q_THD.shape[1] // num_kv_heads, head_dim, case.q_THD.dtype, CAPABILITY)
    tiles = PrefillTiles.of(case.num_new, case.num_kv, prefilling, tokens, CPU)
    paged_prefill_launch(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, case.starts_R1, case.lens_R, tiles, CAPABILITY
    ).run()
    splits = int(num_splits(case.num_kv[decoding]).max(initial=0))
    rows = case.starts_R1[:-1][torch.from_numpy(decoding)]
    requests = torch.from_numpy(decoding)
    for launch in paged_decode_launches(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, case.lens_R, requests, rows, splits, CAPABILITY
    ):
        launch.run()
    return out_THD


def check(case: Paged) -> None:
    expected = attention_reference(
        case.q_THD.double(), case.kv_2NBKD.double(), case.tables_RM, case.starts_R1, case.lens_R
    )
    assert not expected.isnan().any() and case.kv_2NBKD.isnan().any()
    bound = TOLERANCE[case.q_THD.dtype]
    torch.testing.assert_close(computed(case).double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("dtype", "num_groups"),
    [(torch.float32, 1), (torch.float32, 3), (torch.float32, 8), (torch.float16, 2), (torch.bfloat16, 4)],
)
def test_ragged_batches_with_cached_prefixes_in_every_group_size(dtype, num_groups, lengths) -> None:
    check(paged(lengths, dtype, num_kv_heads=1, num_groups=num_groups, block_size=BLOCK))


@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_head_dims_that_are_no_power_of_two_are_padded(head_dim) -> None:
    check(paged([(5, 3), (9, 1)], torch.float32, num_kv_heads=1, head_dim=head_dim))


@pytest.mark.parametrize("block_size", [1, 5, 16, 48, 128])
def test_blocks_of_any_size_in_either_layout(block_size) -> None:
    for layout in ("discrete", "aggregated"):
        check(paged([(49, 3), (127, 1)], torch.float32, num_groups=1, block_size=block_size, layout=layout))


def test_a_prompt_of_several_tiles_sees_only_what_came_before() -> None:
    check(paged([(33, 70), (0, 65)], torch.float32, num_kv_heads=1, num_groups=4))


def test_long_requests_are_cut_and_put_together() -> None:
    check(paged([(255, 1), (256, 1), (600, 1), (3, 1)], torch.float32, num_kv_heads=1, block_size=16))


def test_a_padding_row_has_output_zero_and_reads_no_cache() -> None:
    case = paged([(6, 1), (0, 1)], torch.float32)
    out_THD = torch.full_like(case.q_THD, torch.nan)
    both = torch.arange(2)
    lens_R = torch.tensor([7, 0])
    for launch in paged_decode_launches(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, lens_R, both, both, MAX_SPLITS, CAPABILITY
    ):
        launch.run()
    assert (out_THD[1] == 0).all() and not out_THD[0].isnan().any()


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch() -> None:
    together, alone = (paged(lengths, torch.float32) for lengths in ([(20, 1), (300, 1)], [(20, 1)]))
    assert num_splits(together.num_kv).max() > num_splits(alone.num_kv).max()
    kv = together.kv_2NBKD
    out = computed(together)[:1]
    same = Paged(together.q_THD[:1], kv, together.tables_RM[:1], alone.starts_R1, alone.num_new, alone.num_kv)
    assert torch.equal(out, computed(same))


def test_offsets_past_two_to_the_31st_element_are_reached() -> None:
    near = paged([(5, 1)], torch.float16, num_kv_heads=1)
    blocks = near.tables_RM.max() + 1
    stride = 2**31 // 2
    memory = torch.empty(int(blocks) * stride + 4096, dtype=torch.float16)  # never touched but where the blocks lie
    far = memory.as_strided(near.kv_2NBKD.shape, (2048, stride, 16, 16, 1))
    far[:, near.tables_RM[0]] = near.kv_2NBKD[:, near.tables_RM[0]]
    moved = Paged(near.q_THD, far, near.tables_RM, near.starts_R1, near.num_new, near.num_kv)
    assert torch.equal(computed(near), computed(moved))
