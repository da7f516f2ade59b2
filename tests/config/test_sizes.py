import pytest

from memserve.cluster.build import build_instance
from memserve.cluster.engine import build_engine
from memserve.compose import load_config
from memserve.config.errors import ConfigError
from memserve.config.sizes import bytes_text, parse_bytes
from memserve.request import Role

SIMULATED = ["exec=simulated", "kvcache.num_hbm_blocks=null"]


@pytest.mark.parametrize(
    ("written", "num_bytes"),
    [(4096, 4096), ("4096", 4096), ("512MiB", 2**29), ("2 GiB", 2**31), ("1.5GB", 1_500_000_000), ("0", 0)],
)
def test_sizes_are_read_as_people_write_them(written, num_bytes):
    assert parse_bytes(written) == num_bytes


@pytest.mark.parametrize("written", ["", "MiB", "-1", "1e9", "1GiBs", "1gib", True, 1.5e300])
def test_what_is_no_size_is_refused(written):
    with pytest.raises(ValueError, match="expected bytes"):
        parse_bytes(written)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (2**20 - 1, "1024.00 KiB"), (3 * 2**19, "1.50 MiB"),
     (2**30, "1.00 GiB"), (9000 * 2**30, "9000.00 GiB")],
)  # fmt: skip
def test_sizes_are_written_in_the_largest_unit_of_which_there_is_one(num_bytes, text):
    assert bytes_text(num_bytes) == text


def built(*words):
    cfg = load_config([*SIMULATED, *words])
    return build_instance(cfg, build_engine(cfg), "one", Role.COLOCATED, 0)


def test_bytes_give_as_many_blocks_as_fit():
    blocks = built("tokens=hash", "kvcache.hbm_bytes=1MiB", "kvcache.dram_bytes=300000").scheduler.pool
    block_bytes = 2 * 2 * 16 * 8  # layers, keys and values, tokens, int64
    assert blocks.num_blocks == 2**20 // block_bytes
    assert blocks.allocator.num_dram_blocks == 300000 // block_bytes


def test_bytes_that_hold_no_block_are_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="hbm_bytes=100: expected at least the 512 bytes of one block"):
        built("tokens=hash", "kvcache.hbm_bytes=100")
