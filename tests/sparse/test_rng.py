"""Counter-based random numbers: an independent reference, statistics, golden numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from peft_childtune.errors import BudgetError
from peft_childtune.sparse import bernoulli_mask, hash_positions

N = 1 << 18
SIGNIFICANCE = 1e-4  # seeds are fixed: a test that passes once passes always


def reference_hash(position: int, seed: int, stream: int, step: int) -> int:
    """The formula of FORMAT.md in Python's unbounded integers."""
    top = 2**64

    def mix(h: int) -> int:
        h = (h ^ (h >> 33)) * 0xFF51AFD7ED558CCD % top
        h = (h ^ (h >> 33)) * 0xC4CEB9FE1A85EC53 % top
        return h ^ (h >> 33)

    weyl = 0x9E3779B97F4A7C15
    key = mix((seed * weyl + 1) % top)
    key = mix(key ^ (stream * weyl % top))
    before = mix(key ^ (step * weyl % top))
    return mix(mix((position * weyl + before) % top) ^ mix(before ^ 0xD1B54A32D192ED03)) % 2**63


def uniform(**counters: int) -> np.ndarray:
    return hash_positions(torch.arange(N), **counters).numpy() / 2.0**63


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 7, 2**40])
@pytest.mark.parametrize("step", [0, 1, 2**40])
def test_hashes_follow_the_formula(seed, stream, step):
    positions = [0, 1, 2, 12345, 2**31, 2**40 + 3, 2**62 - 1]
    got = hash_positions(torch.tensor(positions), seed=seed, stream=stream, step=step)
    assert got.tolist() == [reference_hash(position, seed, stream, step) for position in positions]


def test_hashes_are_the_same_in_every_release():
    got = hash_positions(torch.tensor([0, 1, 2, 2**40]), seed=42, stream=3, step=5).tolist()
    assert got == [1252981740395553998, 2464573768041785005, 2870590421261649287, 2521394648043366551]


def test_a_mask_is_the_same_in_every_release():
    bits = bernoulli_mask(64, 0.3, seed=42, stream=3, step=5)
    assert (
        "".join("x" if bit else "." for bit in bits.tolist())
        == "xx..x..x....xx..x..x......x....xx....x....x.x....xx..x.x......xx"
    )


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_step_in_a_tensor_gives_the_same_as_a_number(shape):
    positions = torch.arange(100)
    expected = hash_positions(positions, seed=1, stream=2, step=9)
    assert torch.equal(hash_positions(positions, seed=1, stream=2, step=torch.full(shape, 9)), expected)


def test_hashing_leaves_positions_and_step_as_they_were():
    positions, step = torch.arange(10), torch.tensor([3])
    hash_positions(positions, seed=1, stream=2, step=step)
    assert positions.tolist() == list(range(10)) and step.tolist() == [3]


def test_hashes_are_the_same_for_any_part_of_the_positions():
    whole = hash_positions(torch.arange(1000), seed=5, stream=0)
    assert torch.equal(hash_positions(torch.arange(300, 700), seed=5, stream=0), whole[300:700])


def test_masks_of_several_chunks_follow_the_formula():
    numel, density = 200_003, 0.25
    mask = bernoulli_mask(numel, density, seed=3, stream=1, step=2)
    sample = range(0, numel, 997)
    assert [bool(mask[i]) for i in sample] == [reference_hash(i, 3, 1, 2) < density * 2**63 for i in sample]


@pytest.mark.parametrize("density", [0.001, 0.1, 0.3, 0.9])
def test_masks_keep_their_density(density):
    kept = int(bernoulli_mask(N, density, seed=0, stream=0).sum())
    assert stats.binomtest(kept, N, density).pvalue > SIGNIFICANCE


def test_a_density_of_one_keeps_everything():
    assert bool(bernoulli_mask(1000, 1.0, seed=0, stream=0).all())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(BudgetError, match="0 < density <= 1"):
        bernoulli_mask(10, density, seed=0, stream=0)


def test_an_empty_mask_is_empty():
    assert bernoulli_mask(0, 0.5, seed=0, stream=0).shape == (0,)


@pytest.mark.parametrize("seed", [0, 1, 2, 12345])
def test_hashes_are_uniform(seed):
    counts = np.bincount((uniform(seed=seed, stream=0) * 1024).astype(int), minlength=1024)
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("bit", range(0, 63, 7))
def test_every_bit_is_balanced(bit):
    bits = (hash_positions(torch.arange(N), seed=9, stream=4) >> bit) & 1
    assert stats.binomtest(int(bits.sum()), N, 0.5).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("lag", [1, 2, 64, 768, 1024])
def test_hashes_of_neighbours_are_not_correlated(lag):
    numbers = uniform(seed=7, stream=0)
    assert stats.pearsonr(numbers[:-lag], numbers[lag:]).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("counter", ["seed", "stream", "step"])
@pytest.mark.parametrize("distance", [1, 2, 256])
def test_sequences_of_other_counters_are_independent(counter, distance):
    here = {"seed": 0, "stream": 0, "step": 0}
    first, second = uniform(**here), uniform(**(here | {counter: distance}))
    table = np.histogram2d(first, second, bins=32)[0].ravel()
    assert stats.chisquare(table).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("counter", ["seed", "stream", "step"])
def test_sequences_of_other_counters_are_not_shifts_of_one_another(counter):
    here = {"seed": 0, "stream": 0, "step": 0}
    first = set(hash_positions(torch.arange(N), **here).tolist())
    second = set(hash_positions(torch.arange(N), **(here | {counter: 1})).tolist())
    assert len(first & second) == 0


def test_each_entry_is_kept_in_its_share_of_the_steps():
    steps = torch.stack([bernoulli_mask(256, 0.3, seed=1, stream=0, step=step) for step in range(2000)])
    kept = steps.sum(0).numpy()
    spread = ((kept - 600.0) ** 2 / (2000 * 0.3 * 0.7)).sum()
    assert stats.chi2.sf(spread, 256) > SIGNIFICANCE and stats.chi2.cdf(spread, 256) > SIGNIFICANCE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same_mask():
    step = torch.tensor([11])
    here = bernoulli_mask(300_000, 0.3, seed=8, stream=2, step=step)
    there = bernoulli_mask(300_000, 0.3, seed=8, stream=2, step=step.cuda(), device="cuda")
    assert torch.equal(there.cpu(), here)
