"""Every path to the gradient of a child, against the dense product."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from peft_childtune.errors import ConfigError
from peft_childtune.kernels import Hull, hull_of, kernel_options, load_extension, use_kernels
from peft_childtune.kernels import sampled as module
from peft_childtune.kernels.weight_gradient import child_gradient, choose_path

_CPU = torch.device("cpu")
_SHAPE = (12, 20)


def _child(kind):
    """Return flat positions of a child of `_SHAPE`, drawn once from a fixed seed."""
    every = torch.arange(240).view(_SHAPE)
    generator = torch.Generator().manual_seed(3)
    if kind == "rows":
        return every[[1, 4, 5]].reshape(-1)
    if kind == "columns":
        return every[:, [0, 19]].reshape(-1)
    if kind == "clustered":  # 5 of the crossings of two rows and three columns
        return every[[2, 11]][:, [3, 4, 17]].reshape(-1)[[0, 1, 2, 3, 5]]
    if kind == "one":
        return torch.tensor([239])
    if kind == "all":
        return every.reshape(-1)
    return torch.randperm(240, generator=generator)[:30].sort().values


_KINDS = ["rows", "columns", "clustered", "one", "all", "random"]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])  # 300: several chunks, the last one cut off
@pytest.mark.parametrize("path", ["gather", "hull", "sampled", None])
@pytest.mark.parametrize("kind", _KINDS)
def test_every_path_returns_the_entries_of_the_dense_product(kind, path, tokens, index_dtype):
    indices = _child(kind)
    a, b = torch.randn(tokens, 12, dtype=torch.float64), torch.randn(tokens, 20, dtype=torch.float64)
    with use_kernels(weight_gradient=path):
        found = child_gradient(a, b, indices=indices.to(index_dtype), hull=hull_of(indices, _SHAPE))
    # sums in another order: some units in the last place of double precision
    torch.testing.assert_close(found, (a.t() @ b).view(-1)[indices], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["gather", "hull", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_served_by_every_path(path, dtype):
    indices = _child("random")
    a, b = torch.randn(64, 12).to(dtype), torch.randn(64, 20).to(dtype)
    with use_kernels(weight_gradient=path):
        found = child_gradient(a, b, indices=indices, hull=hull_of(indices, _SHAPE))
    assert found.dtype == dtype
    reference = (a.double().t() @ b.double()).view(-1)[indices]
    # one rounding of the result, and the summation's own error, both relative to the largest products
    torch.testing.assert_close(found.double(), reference, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("path", ["gather", "hull", "sampled"])
def test_an_entry_that_is_not_finite_shows_in_the_gradients_that_it_belongs_to(path):
    indices = torch.tensor([0, 25, 239])
    a, b = torch.ones(200, 12), torch.ones(200, 20)
    a[3, 1] = float("inf")
    with use_kernels(weight_gradient=path):
        found = child_gradient(a, b, indices=indices, hull=Hull(_SHAPE))
    assert found.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 15, 16, 17, 64, 129, 400])
@pytest.mark.parametrize("kind", _KINDS)
def test_the_extension_returns_the_entries_of_the_dense_product(kind, tokens, threads):
    indices = _child(kind)
    a, b = torch.randn(tokens, 12), torch.randn(tokens, 20)
    torch.set_num_threads(threads)
    try:
        with use_kernels(weight_gradient="sampled", extension=True):
            found = child_gradient(a, b, indices=indices, hull=hull_of(indices, _SHAPE))
    finally:
        torch.set_num_threads(1)
    # float32 sums of `tokens` products, none of which is much larger than 10
    expected = (a.double().t() @ b.double()).view(-1)[indices].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * tokens * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (1, 1), (1, 257), (130, 1)])
@pytest.mark.parametrize("density", [0.003, 0.5])
def test_matrices_of_all_shapes_are_sampled(shape, density):
    numel = shape[0] * shape[1]
    indices = torch.randperm(numel)[: max(1, int(density * numel))].sort().values
    a, b = torch.randn(150, shape[0]), torch.randn(150, shape[1])
    with use_kernels(weight_gradient="sampled", extension=True):
        found = child_gradient(a, b, indices=indices.int(), hull=Hull(shape))
    expected = (a.double().t() @ b.double()).view(-1)[indices].float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # 150 products of up to 20


def test_factors_of_different_lengths_are_refused_and_not_read():
    with use_kernels(weight_gradient="sampled", extension=True), pytest.raises(RuntimeError):
        child_gradient(torch.ones(5, 12), torch.ones(4, 20), indices=torch.tensor([0, 25]), hull=Hull(_SHAPE))


def test_factors_of_different_dtypes_are_not_taken_for_float32():
    a, b = torch.ones(5, 12), torch.ones(5, 20, dtype=torch.float64)
    with use_kernels(weight_gradient="sampled", extension=True):
        assert child_gradient(a, b, indices=torch.tensor([0, 25]), hull=Hull(_SHAPE)).tolist() == [5, 5]


@pytest.mark.parametrize("kind", _KINDS)
def test_without_the_extension_float32_is_sampled_by_torch(kind):
    indices = _child(kind)
    a, b = torch.randn(150, 12), torch.randn(150, 20)
    with use_kernels(weight_gradient="sampled", extension=False):
        found = child_gradient(a, b, indices=indices, hull=hull_of(indices, _SHAPE))
    torch.testing.assert_close(found, (a.t() @ b).view(-1)[indices], rtol=1e-4, atol=1e-4)


def test_strided_arguments_are_read_by_logical_position():
    indices = _child("random")
    a, b = torch.randn(12, 40).t(), torch.randn(40, 40)[:, ::2]
    for path in ("gather", "hull", "sampled"):
        with use_kernels(weight_gradient=path):
            found = child_gradient(a, b, indices=indices, hull=hull_of(indices, _SHAPE))
        # float32 sums of 40 products in another order
        torch.testing.assert_close(found, (a.t() @ b).reshape(-1)[indices], rtol=1e-5, atol=1e-5)


def test_a_device_without_the_sampled_product_falls_back_to_the_hull(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("no kernel")

    module._torch_can_sample.cache_clear()
    monkeypatch.setattr(torch.sparse, "sampled_addmm", refuse)
    try:
        with use_kernels(weight_gradient="sampled", extension=False):
            hull = hull_of(_child("random"), _SHAPE)
            assert choose_path(hull, nnz=30, tokens=8, dtype=torch.float32, device=_CPU) == "hull"
    finally:
        module._torch_can_sample.cache_clear()


def _path(indices, shape, *, tokens=2048, dtype=torch.float32, device=_CPU):
    return choose_path(
        hull_of(indices, shape), nnz=indices.numel(), tokens=tokens, dtype=dtype, device=torch.device(device)
    )


def _random(density, shape=(768, 768)):
    numel = shape[0] * shape[1]
    return torch.randperm(numel)[: int(density * numel)].sort().values


def test_the_cheapest_path_follows_density_structure_dtype_and_device():
    every = torch.arange(768 * 768).view(768, 768)
    assert _path(_random(0.01), (768, 768)) == "sampled"
    assert _path(_random(0.2), (768, 768)) == ("gather" if load_extension() is None else "sampled")
    assert _path(_random(0.5), (768, 768)) == "gather"
    with use_kernels(extension=False):
        assert _path(_random(0.01), (768, 768)) == "sampled"
        assert _path(_random(0.2), (768, 768)) == "gather"
    assert _path(every[::10].reshape(-1), (768, 768)) == "hull"
    assert _path(every[:, ::10].reshape(-1), (768, 768)) == "hull"
    assert _path(_random(0.01), (768, 768), dtype=torch.bfloat16) == "gather"
    assert _path(_random(0.01), (768, 768), device="cuda") == "gather"
    assert _path(every[::10].reshape(-1), (768, 768), dtype=torch.bfloat16, device="cuda") == "hull"
    assert _path(_random(0.01), (768, 768), tokens=1) == "gather"


def test_a_forced_path_is_forced_inside_the_block_only():
    before = kernel_options.weight_gradient, kernel_options.compose_cache
    with use_kernels(weight_gradient="gather", compose_cache=False):
        with use_kernels(weight_gradient="hull"):
            assert (kernel_options.weight_gradient, kernel_options.compose_cache) == ("hull", False)
            with use_kernels(compose_cache=True):
                assert (kernel_options.weight_gradient, kernel_options.compose_cache) == ("hull", True)
        assert kernel_options.weight_gradient == "gather"
    assert (kernel_options.weight_gradient, kernel_options.compose_cache) == before


def test_an_unknown_path_is_refused():
    with pytest.raises(ConfigError, match="weight_gradient='fast' is unknown; use one of gather, hull, sampled"):
        use_kernels(weight_gradient="fast").__enter__()


@pytest.mark.parametrize("kind", _KINDS)
def test_the_hull_holds_every_position(kind):
    indices = _child(kind)
    hull = hull_of(indices, _SHAPE)
    row, column = hull.place(indices)
    rows = torch.arange(12) if hull.rows is None else hull.rows
    columns = torch.arange(20) if hull.columns is None else hull.columns
    assert torch.equal(rows[row] * 20 + columns[column], indices)


def test_no_row_or_column_of_the_hull_is_without_entries_where_some_are_left_out():
    indices = _child("clustered")
    hull = hull_of(indices, _SHAPE)
    assert hull.rows.tolist() == [2, 11]
    assert hull.columns.tolist() == [3, 4, 17]


def test_torch_s_warning_about_sparse_tensors_reaches_nobody():
    script = (
        "import warnings, torch; warnings.simplefilter('error')\n"
        "from peft_childtune.kernels import Hull, use_kernels\n"
        "from peft_childtune.kernels.weight_gradient import child_gradient\n"
        "with use_kernels(weight_gradient='sampled'):\n"
        "    child_gradient(torch.ones(2, 2), torch.ones(2, 2), indices=torch.tensor([1]), hull=Hull((2, 2)))\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("tokens", [31, 32, 65, 600])
def test_more_threads_give_the_same_entries(tokens):
    indices = _child("random")
    a, b = torch.randn(tokens, 12, dtype=torch.float64), torch.randn(tokens, 20, dtype=torch.float64)
    torch.set_num_threads(2)
    try:
        with use_kernels(weight_gradient="sampled"):
            found = child_gradient(a, b, indices=indices, hull=hull_of(indices, _SHAPE))
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found, (a.t() @ b).view(-1)[indices], rtol=1e-12, atol=1e-12)


def test_a_backward_within_autocast_rounds_no_entry():
    indices = _child("random")
    a, b = torch.randn(64, 12), torch.randn(64, 20)
    torch.set_num_threads(2)
    try:
        with use_kernels(weight_gradient="sampled"):
            expected = child_gradient(a, b, indices=indices, hull=Hull(_SHAPE))
            with torch.autocast("cpu", torch.bfloat16):
                found = child_gradient(a, b, indices=indices, hull=Hull(_SHAPE))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, expected)
