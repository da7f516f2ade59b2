"""Attention kernels against their reference in float64; run by test_interpreter.py under Triton's interpreter."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernels.interpreted import TOLERANCE, Paged, paged

from memserve.model.attention.reference import ReferenceAttention
from memserve.model.attention.triton import TritonAttention
from memserve.model.batch import ForwardBatch
from memserve.model.kernels.configs import DecodeConfig, paged_decode_config, paged_prefill_config
from memserve.model.kernels.kv_write import kv_write_reference
from memserve.model.kernels.paged_decode import MAX_SPLITS, num_programs, num_splits, paged_decode_launches
from memserve.model.kernels.paged_prefill import PrefillTiles, attention_reference, paged_prefill_launch, tokens_a_tile

CAPABILITY = 80
BLOCK = 4
# (in the cache, new): no prefix, one token, block - 1, a block, many; lone first tokens; partial last blocks
RAGGED = [(0, 7), (1, 6), (BLOCK - 1, 5), (BLOCK, 4), (41, 9), (0, 1), (0, 2)]
DECODE = [(0, 1), (1, 1), (BLOCK - 1, 1), (BLOCK, 1), (40, 1), (70, 1)]
CPU = torch.device("cpu")
DECODE_CONFIG = paged_decode_config(16, torch.float32, CAPABILITY)


def computed(case: Paged, decode: DecodeConfig | None = None) -> torch.Tensor:
    """By the kernels, as the backend uses them, into an output full of NaN. decode: another configuration than that."""
    num_kv_heads, head_dim = case.kv_2NBKD.shape[3:]
    out_THD = torch.full_like(case.q_THD, torch.nan)
    prefilling, decoding = np.flatnonzero(case.num_new > 1), np.flatnonzero(case.num_new == 1)
    prefill = paged_prefill_config(head_dim, case.q_THD.dtype, CAPABILITY)
    decode = decode or paged_decode_config(head_dim, case.q_THD.dtype, CAPABILITY)
    tokens = tokens_a_tile(case.q_THD.shape[1] // num_kv_heads, prefill)
    tiles = PrefillTiles.of(case.num_new, case.num_kv, prefilling, tokens, CPU)
    paged_prefill_launch(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, case.starts_R1, case.lens_R, tiles, prefill
    ).run()
    splits = int(num_splits(case.num_kv[decoding], decode).max(initial=0))
    rows = case.starts_R1[:-1][torch.from_numpy(decoding)]
    requests = torch.from_numpy(decoding)
    for launch in paged_decode_launches(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, case.lens_R, requests, rows, splits, decode
    ):
        launch.run()
    return out_THD


def check(case: Paged, decode: DecodeConfig | None = None) -> None:
    expected = attention_reference(
        case.q_THD.double(), case.kv_2NBKD.double(), case.tables_RM, case.starts_R1, case.lens_R
    )
    assert not expected.isnan().any() and case.kv_2NBKD.isnan().any()
    bound = TOLERANCE[case.q_THD.dtype]
    torch.testing.assert_close(computed(case, decode).double(), expected, atol=bound, rtol=bound)


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("dtype", "num_groups"),
    [(torch.float32, 1), (torch.float32, 3), (torch.float32, 8), (torch.float16, 2), (torch.bfloat16, 4)],
)
def test_ragged_batches_with_cached_prefixes_in_every_group_size(dtype, num_groups, lengths) -> None:
    check(paged(lengths, dtype, num_kv_heads=1, num_groups=num_groups, block_size=BLOCK))


# All pairs of these: head dim and dtype, and each of both with the block sizes and the layouts; every group size.
SHAPES = list(itertools.product((64, 80, 96, 128, 256), (torch.float32, torch.float16, torch.bfloat16)))
BLOCK_SIZES, LAYOUT_NAMES = (1, 5, 16, 48, 128), ("discrete", "aggregated")


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_every_head_dim_in_every_dtype_with_blocks_of_any_size_in_either_layout(number) -> None:
    """With prefixes of nothing, one token, a block less one, a block, and many, for both kernels."""
    head_dim, dtype = SHAPES[number]
    block = BLOCK_SIZES[number % len(BLOCK_SIZES)]
    lengths = [(0, 3), (1, 2), (block - 1, 2), (block, 2), (block, 1), (block - 1, 1), (2 * block + 3, 1)]
    check(
        paged(
            lengths, dtype, 1, num_groups=number % 8 + 1, head_dim=head_dim, block_size=block,
            layout=LAYOUT_NAMES[number % 2],
        )
    )  # fmt: skip


def test_a_head_dim_that_no_configuration_names_is_padded() -> None:
    check(paged([(5, 3), (9, 1)], torch.float32, num_kv_heads=1, head_dim=24))


def test_the_chunks_of_a_prompt_see_what_the_whole_of_it_sees() -> None:
    """Each chunk starts within a block, and its last block is partly full."""
    whole = paged([(0, 45)], torch.float32, num_kv_heads=1, block_size=8)
    out_THD = computed(whole)
    for start, stop in ((0, 13), (13, 14), (14, 39), (39, 45)):
        numbers = np.array([stop - start]), np.array([stop])
        starts_R1 = torch.tensor([0, stop - start])
        chunk = Paged(whole.q_THD[start:stop], whole.kv_2NBKD, whole.tables_RM, starts_R1, *numbers)
        torch.testing.assert_close(computed(chunk), out_THD[start:stop], atol=1e-6, rtol=1e-6)


def test_a_prompt_of_several_tiles_sees_only_what_came_before() -> None:
    check(paged([(33, 70), (0, 65)], torch.float32, num_kv_heads=1, num_groups=4))


def test_long_requests_are_cut_and_put_together() -> None:
    check(paged([(255, 1), (256, 1), (600, 1), (3, 1)], torch.float32, num_kv_heads=1, block_size=16))


@pytest.mark.parametrize(("split_tokens", "programs"), [(64, 4), (512, 1)])
def test_splits_of_another_length_give_the_same(split_tokens, programs) -> None:
    """Shorter ones are as many as there may be, and then grow."""
    config = replace(DECODE_CONFIG, split_tokens=split_tokens, programs=programs)
    splits = num_splits(np.array([0, 1, 64, 65, 2049]), config)
    assert splits.tolist() == ([0, 1, 1, 2, 17] if split_tokens == 64 else [0, 1, 1, 1, 5])
    check(paged([(2048, 1), (64, 1), (63, 1)], torch.float32, 1, block_size=16), config)


def test_few_programs_take_many_splits_in_turn() -> None:
    lengths = [(1100, 1), (600, 1)] + [(3, 1)] * 14
    assert num_programs(MAX_SPLITS, len(lengths), wanted_programs=DECODE_CONFIG.programs) == 1
    check(paged(lengths, torch.float32, num_kv_heads=1, num_groups=2, block_size=16))


@pytest.mark.parametrize(("rows", "programs"), [(1, 32), (16, 16), (64, 4), (256, 1), (4096, 1)])
def test_programs_fill_a_gpu_and_are_no_more_than_the_splits(rows, programs) -> None:
    assert num_programs(MAX_SPLITS, rows * 8, wanted_programs=16 * 132) == programs
    assert num_programs(1, rows * 8, wanted_programs=16 * 132) == 1


def test_a_padding_row_has_output_zero_and_reads_no_cache() -> None:
    case = paged([(6, 1), (0, 1)], torch.float32)
    out_THD = torch.full_like(case.q_THD, torch.nan)
    both = torch.arange(2)
    lens_R = torch.tensor([7, 0])
    config = paged_decode_config(case.q_THD.shape[2], case.q_THD.dtype, CAPABILITY)
    for launch in paged_decode_launches(
        case.q_THD, case.kv_2NBKD, out_THD, case.tables_RM, lens_R, both, both, MAX_SPLITS, config
    ):
        launch.run()
    assert (out_THD[1] == 0).all() and not out_THD[0].isnan().any()


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch() -> None:
    together, alone = (paged(lengths, torch.float32) for lengths in ([(20, 1), (300, 1)], [(20, 1)]))
    assert num_splits(together.num_kv, DECODE_CONFIG).max() > num_splits(alone.num_kv, DECODE_CONFIG).max()
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


@pytest.mark.parametrize("new", [1, 2], ids=["decode", "prefill"])
def test_kv_heads_past_two_to_the_31st_element_are_reached(new) -> None:
    near = paged([(5, new)], torch.float16, num_kv_heads=3)
    memory = torch.empty(3 * 2**30, dtype=torch.float16)  # never touched but where the heads lie
    far_2NBKD = memory.as_strided(near.kv_2NBKD.shape, (2**20, 4096, 16, 2**30, 1)).copy_(near.kv_2NBKD)
    assert torch.equal(computed(near), computed(replace(near, kv_2NBKD=far_2NBKD)))


def test_what_a_table_holds_behind_the_last_block_of_a_request_is_not_looked_at() -> None:
    """Nor is its width; the rows of a table may lie in a wider one."""
    case = paged([(5, 3), (9, 1), (0, 1)], torch.float32, num_groups=3)
    wide_RM = torch.full((3, case.tables_RM.shape[1] + 5), 2**40)
    for wide, table, num_kv in zip(wide_RM, case.tables_RM, case.num_kv.tolist(), strict=True):
        wide[: -(-num_kv // BLOCK)] = table[: -(-num_kv // BLOCK)]
    assert torch.equal(computed(replace(case, tables_RM=wide_RM[:, :-2])), computed(case))


def test_numbers_that_do_not_lie_together_are_refused() -> None:
    case = paged([(5, 3), (9, 1)], torch.float32)
    with pytest.raises(AssertionError, match="blocks lie together"):
        computed(replace(case, tables_RM=case.tables_RM.T.contiguous().T))
    with pytest.raises(AssertionError):
        computed(replace(case, starts_R1=case.starts_R1.repeat_interleave(2)[::2]))


# Of the whole backend: (in the cache, new) with requests that compute nothing, and no request at all
DRAWN = {"some compute nothing": [(4, 0), (5, 3), (9, 1), (0, 0)], "nobody computes": [(3, 0)], "nobody": []}


@pytest.mark.parametrize("lengths", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_the_backend_takes_views_of_any_strides_and_batches_with_nothing_to_do(num_kv_heads, lengths) -> None:
    near = paged(lengths or [(4, 0)], torch.float32, num_kv_heads, num_groups=3)
    kv_2NBKD = near.kv_2NBKD.permute(3, 1, 0, 2, 4).contiguous().permute(2, 1, 3, 0, 4)  # kv heads outermost
    num_tokens, num_heads, head_dim = near.q_THD.shape
    slots = [
        table[position // BLOCK] * BLOCK + position % BLOCK
        for table, (old, new) in zip(near.tables_RM.tolist(), lengths, strict=False)
        for position in range(old, old + new)
    ]
    R = len(lengths)
    batch = ForwardBatch(
        torch.zeros(num_tokens, dtype=torch.int64), np.zeros(num_tokens, dtype=np.int64), np.array(slots, np.int64),
        near.tables_RM.numpy()[:R], near.starts_R1.numpy()[: R + 1], near.num_kv[:R], np.zeros(0, np.int64), BLOCK, CPU,
    )  # fmt: skip
    qk_THD = torch.randn(num_heads + num_kv_heads, num_tokens, head_dim).transpose(0, 1)
    v_TKD = torch.randn(num_kv_heads, num_tokens, 2 * head_dim).transpose(0, 1)[..., ::2]
    cos, sin = torch.randn(2, num_tokens, 1, 1, head_dim // 2)
    rotation = cos.repeat(1, 1, 2, 1), torch.cat((-sin, sin), 2)
    expected_kv = kv_2NBKD.double()
    backend = TritonAttention(batch, [kv_2NBKD], num_heads)
    q_THD = backend.rotate_and_write(0, qk_THD, v_TKD, rotation)
    twice = [x.double() for x in (qk_THD, v_TKD, *rotation)]
    expected_q = kv_write_reference(*twice, expected_kv, batch.slot_mapping_T)
    torch.testing.assert_close(q_THD.double(), expected_q, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(kv_2NBKD.double(), expected_kv, atol=2e-6, rtol=2e-6, equal_nan=True)
    out_THD = backend.attend(0, q_THD.transpose(0, 1).contiguous().transpose(0, 1))
    if not lengths:
        assert out_THD.shape == (0, num_heads, head_dim)
        return
    expected = ReferenceAttention(batch, [expected_kv], num_heads).attend(0, expected_q)
    torch.testing.assert_close(out_THD.double(), expected, atol=4e-6, rtol=4e-6)
