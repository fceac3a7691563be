"""Which precision a call has: its own or torch's, in the fused kernels and in plain PyTorch."""

import functools
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import softvq
from softvq.kernels import streaming
from softvq.kernels.products import float32_product, float32_products, torch_precision
from tests.kernels.results import (
    DEVICE,
    TRITON,
    Graphs,
    assert_same,
    every_result,
    inputs,
    needs_triton,
    with_gradients,
)

SETTING = (torch.backends.cuda if DEVICE == "cuda" else torch.backends.mkldnn).matmul


@pytest.fixture
def set_precision():
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@functools.cache  # inside a test, whose fixtures it needs
def explicit() -> tuple[tuple[torch.Tensor, ...], dict[str, list[torch.Tensor]]]:
    """Inputs, and the fused results by the name of their precision; different from one another."""
    tensors, names = inputs(), ("highest", "high", "medium")
    results = {
        name: with_gradients(every_result, *tensors, backend="triton", precision=name)
        for name in names
    }
    assert not torch.equal(results["highest"][0], results["high"][0])
    assert not torch.equal(results["high"][0], results["medium"][0])
    return tensors, results


@needs_triton
def test_precision_follows_the_setting_of_torch(set_precision):
    tensors, results = explicit()
    for name, expected in results.items():
        set_precision(name)
        assert_same(with_gradients(every_result, *tensors, backend="triton"), expected)
    chosen = with_gradients(every_result, *tensors, backend="triton", precision="highest")
    assert_same(chosen, results["highest"])


@needs_triton
def test_nearest_follows_the_setting_too(set_precision):
    codebook = torch.randn(1, 16, device=DEVICE) + 1e-4 * torch.randn(30, 16, device=DEVICE)
    codebook = torch.cat([codebook, -codebook])  # far from its mean, where float16 is coarse
    z = codebook + 1e-5 * torch.randn_like(codebook)
    found = {name: softvq.nearest_codes(z, codebook, backend="triton", precision=name)[0]
             for name in ("highest", "medium")}  # fmt: skip
    assert not torch.equal(found["highest"], found["medium"])
    for name, expected in found.items():
        set_precision(name)
        assert torch.equal(softvq.nearest_codes(z, codebook, backend="triton")[0], expected)


@needs_triton
@pytest.mark.parametrize(("newer", "name"), [("tf32", "high"), ("ieee", "highest")])
def test_precision_set_by_the_newer_name(set_precision, newer, name):
    tensors, results = explicit()
    SETTING.fp32_precision = newer
    assert_same(with_gradients(every_result, *tensors, backend="triton"), results[name])


REDUCED = {"high": {"tf32"}, "medium": {"tf32"}}
if DEVICE == "cpu":
    REDUCED = {"high": {"ieee"}, "medium": {"ieee", "bf16"}}


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
@pytest.mark.parametrize("precision", ["highest", "high", "medium", None])
def test_plain_products_follow_the_call(set_precision, monkeypatch, setting, precision):
    """Whatever torch is set to, and then it still is; scores lose nothing: a GPU has them of parts
    that tf32 holds."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function in (torch.ops.aten.mm.out, torch.ops.aten.mm.default,
                            torch.ops.aten.addmm.out, torch.ops.aten.addmm_.default):  # fmt: skip
                seen.append((function, SETTING.fp32_precision))
            return function(*arguments, **(keywords or {}))

    def watched(function):
        def call(*arguments):
            with Products():
                return function(*arguments)

        return call

    for name in ("soft_forward", "soft_backward", "probability_sums", "nearest"):
        monkeypatch.setattr(streaming, name, watched(getattr(streaming, name)))
    set_precision(setting)
    before = SETTING.fp32_precision
    with_gradients(every_result, *inputs(), backend="streaming", precision=precision)
    assert SETTING.fp32_precision == before and torch.get_float32_matmul_precision() == setting
    precision = precision or setting
    assert {how for _, how in seen} == REDUCED.get(precision, {"ieee"})
    of_scores = "tf32" if DEVICE == "cuda" and precision != "highest" else "ieee"
    assert {how for function, how in seen if function == torch.ops.aten.mm.out} == {of_scores}


@pytest.mark.parametrize("torchs", ["highest", "medium"])
@pytest.mark.parametrize("first", ["highest", "medium"])
def test_another_thread_waits_for_the_setting(set_precision, torchs, first):
    """Also for one that has changed nothing, and with what a call without precision follows."""
    device = torch.device(DEVICE)
    set_precision(torchs)
    before, seen = SETTING.fp32_precision, []
    second = "medium" if first == "highest" else "highest"
    allowed = {"highest": {"ieee", "none"}, "medium": REDUCED["medium"] - {"ieee"}}

    def multiply() -> None:
        seen.append(torch_precision(device))
        with float32_products(second, device):
            seen.append(SETTING.fp32_precision)

    other = threading.Thread(target=multiply)
    with float32_products(first, device):
        other.start()
        other.join(0.2)
        assert SETTING.fp32_precision in allowed[first] and not seen
    other.join()
    assert seen[0] == torchs and seen[1] in allowed[second]
    assert SETTING.fp32_precision == before


@pytest.mark.parametrize("backend", ["streaming", "reference", TRITON])
def test_results_hardly_depend_on_what_torch_is_set_to(set_precision, backend):
    """On a machine that can round operands; on others the setting changes nothing."""
    tensors = inputs()
    how = {"backend": backend, "precision": "highest"}
    expected = with_gradients(every_result, *tensors, **how)
    for name in ("high", "medium"):
        set_precision(name)
        assert_same(with_gradients(every_result, *tensors, **how), expected)


@needs_triton
def test_a_compiled_graph_follows_the_setting(set_precision):
    tensors, expected = explicit()
    graphs = Graphs(every_result)
    # torch itself guards on "is it highest?", so that one more graph would be its own doing.
    for name in ("high", "medium", "high"):
        set_precision(name)
        assert_same(with_gradients(graphs.run, *tensors, backend="triton"), expected[name])
    assert graphs.count == 1


def test_opcheck_of_the_product():
    a, b = (torch.randn(2, *shape, device=DEVICE) for shape in ((6, 5), (5, 10)))
    torch.library.opcheck(float32_product, (a.requires_grad_(), b.requires_grad_()))
