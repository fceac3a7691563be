"""What all quantizers share: the call, layouts, heads, codes and indices, compiling."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import softvq
from softvq.quantizers import EMAVQ, VQ, GumbelVQ, SoftVQ

DIM, CODES = 6, 10
ALL = [SoftVQ, VQ, EMAVQ, GumbelVQ]
each = pytest.mark.parametrize("kind", ALL)


def layer(kind, **options):
    return kind(DIM, CODES, **options)


def state(vq):
    return {name: value.clone() for name, value in vq.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each
@pytest.mark.parametrize("heads", [{}, {"heads": 3}, {"heads": 3, "separate": True}], ids=str)
@pytest.mark.parametrize("codebook_dim", [None, 4])
@pytest.mark.parametrize(
    ("options", "shape", "positions"),
    [
        ({}, (2, 7, DIM), (2, 7)),
        ({}, (2, 3, 4, DIM), (2, 3, 4)),
        ({}, (2, DIM), (2,)),
        ({"channel_last": False}, (2, DIM, 7), (2, 7)),
        ({"accept_image_fmap": True}, (2, DIM, 4, 5), (2, 4, 5)),
    ],
    ids=str,
)
def test_shapes(kind, heads, codebook_dim, options, shape, positions):
    count, separate = heads.get("heads", 1), heads.get("separate", False)
    vq = layer(
        kind,
        heads=count,
        separate_codebook_per_head=separate,
        codebook_dim=codebook_dim,
        **options,
    )
    quantized, indices, loss = vq(torch.randn(shape))
    assert quantized.shape == shape and loss.shape == ()
    assert indices.shape == (positions if count == 1 else (*positions, count))
    assert indices.dtype == torch.int64 and indices.min() >= 0 and indices.max() < CODES
    code = (CODES, codebook_dim or DIM // count)
    assert vq.codebook.shape == ((count, *code) if separate else code)
    vq.eval()
    if kind is SoftVQ:
        vq.estimator = "straight_through"
    quantized, indices, _ = vq(torch.randn(shape))
    torch.testing.assert_close(vq.get_output_from_indices(indices), quantized)


@each
def test_the_layouts_differ_in_nothing_but_the_order_of_the_axes(kind):
    last, first, image = (
        layer(kind, **options)
        for options in ({}, {"channel_last": False}, {"accept_image_fmap": True})
    )
    first.load_state_dict(last.state_dict())
    image.load_state_dict(last.state_dict())
    x = torch.randn(2, 4, 5, DIM)
    results = []
    for vq, given in ((last, x), (first, x.movedim(-1, 1)), (image, x.movedim(-1, 1))):
        torch.manual_seed(1)
        results.append(vq(given))
    for quantized, indices, loss in results[1:]:
        assert torch.equal(quantized.movedim(1, -1), results[0][0])
        assert torch.equal(indices, results[0][1]) and torch.equal(loss, results[0][2])


@each
def test_heads_that_share_a_codebook_are_more_rows(kind):
    shared, single = layer(kind, heads=3), kind(DIM // 3, CODES)
    single.load_state_dict(shared.state_dict())
    x = torch.randn(4, 5, DIM)
    results = []
    for vq, given in ((shared, x), (single, x.unflatten(-1, (3, -1)))):
        torch.manual_seed(1)
        results.append(vq(given))
    (quantized, indices, loss), (wanted, wanted_indices, wanted_loss) = results
    torch.testing.assert_close(quantized, wanted.flatten(-2))
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(loss, wanted_loss)
    assert same_state(state(shared), state(single))


@each
def test_separate_codebooks_quantise_their_own_features(kind):
    vq = layer(kind, heads=3, separate_codebook_per_head=True).eval()
    x = torch.randn(4, 5, DIM)
    quantized, indices, _ = vq(x)
    for head in range(3):
        features = slice(2 * head, 2 * head + 2)
        alone = kind(2, CODES).eval()
        alone.codebook = vq.codebook[head]
        wanted, wanted_indices, _ = alone(x[..., features])
        torch.testing.assert_close(quantized[..., features], wanted)
        assert torch.equal(indices[..., head], wanted_indices)


@each
def test_codes_are_read_and_written(kind):
    vq, codes = layer(kind), torch.randn(CODES, DIM)
    with torch.no_grad():
        vq.codebook.copy_(codes)
    assert torch.equal(vq.codebook, codes)
    vq.codebook = 2 * codes
    assert torch.equal(vq.codebook, 2 * codes)
    indices = torch.tensor([[3, -1, 9]])
    found = vq.get_codes_from_indices(indices)
    assert torch.equal(found[0, ::2], 2 * codes[[3, 9]])
    assert torch.equal(found[0, 1], torch.zeros(DIM))  # -1, a masked position
    with pytest.raises(ValueError, match=r"codebook must be \(10, 6\), got \(9, 6\)"):
        vq.codebook = codes[1:]
    with pytest.raises(TypeError, match="codebook must be a floating-point tensor, got a list"):
        vq.codebook = codes.tolist()


@each
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_a_codebook_is_assigned_to_another_quantizer(kind, separate, cosine):
    options = {"heads": 3, "separate_codebook_per_head": separate, "use_cosine_sim": cosine}
    one, other = layer(kind, **options), layer(kind, **options)
    one.codebook = other.codebook
    torch.testing.assert_close(one.codebook, other.codebook)
    assert kind is EMAVQ or other.codebook.requires_grad
    with torch.no_grad():
        other.codebook.zero_()
        assert one.codebook.abs().min() > 0
        assert cosine or other.codebook.abs().max() == 0


@each
def test_kmeans_leaves_codes_that_were_assigned(kind):
    vq = layer(kind, kmeans_init=True)
    vq.codebook = 50 + torch.randn(CODES, DIM)
    assert vq.initialised
    vq(torch.randn(40, DIM))
    assert vq.codebook.mean() > 40


def test_a_masked_position_has_no_output_even_through_a_projection():
    vq = layer(VQ, codebook_dim=4, heads=2)
    output = vq.get_output_from_indices(torch.tensor([[0, 1], [-1, -1]]))
    assert output[0].abs().min() > 0 and torch.equal(output[1], torch.zeros(DIM))


@each
def test_cosine_similarity_is_about_directions(kind):
    vq = layer(kind, use_cosine_sim=True).eval()
    vq.codebook = 3 * torch.randn(CODES, DIM)
    x = torch.randn(50, DIM, requires_grad=True)
    torch.testing.assert_close(vq.codebook.norm(dim=-1), torch.ones(CODES))
    quantized, indices, _ = vq(x)
    assert torch.equal(indices, (normalize(x, dim=-1) @ vq.codebook.T).argmax(-1))
    longer = vq(x * (1 + 5 * torch.rand(50, 1)))
    assert torch.equal(longer[1], indices)
    torch.testing.assert_close(longer[0], quantized)
    torch.testing.assert_close(vq.get_codes_from_indices(indices), vq.codebook[indices])
    (grad,) = torch.autograd.grad(quantized.square().sum() + quantized.sum(), x)
    torch.testing.assert_close((grad * x).sum(-1), torch.zeros(50), atol=1e-5, rtol=0)


@each
@pytest.mark.parametrize("cosine", [False, True])
def test_training_keeps_cosine_codes_on_the_sphere(kind, cosine):
    vq = layer(kind, use_cosine_sim=cosine)
    optimizer = torch.optim.SGD(vq.parameters(), lr=1.0) if kind is not EMAVQ else None
    for _ in range(3):
        quantized, _, loss = vq(3 * torch.randn(50, DIM))
        if optimizer:
            (loss + quantized.square().mean()).backward()
            optimizer.step()
    lengths = vq.codebook.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(CODES)) == cosine


@pytest.mark.parametrize("kind", [EMAVQ, GumbelVQ])
def test_distances_that_nobody_reads_are_not_computed(kind, monkeypatch):
    monkeypatch.setattr("softvq.kernels.autograd.CodesAt.apply", None)
    vq, x = layer(kind, kmeans_init=True), torch.randn(40, DIM)
    vq(x)
    vq.eval()(x)
    with pytest.raises(TypeError):
        softvq.nearest_codes(x, vq.codebook)


@each
def test_evaluation_changes_nothing_and_repeats(kind):
    vq = layer(kind, kmeans_init=True, entropy_weight=0.1).eval()
    before, x = state(vq), torch.randn(4, 5, DIM)
    first, second = vq(x), vq(x)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert same_state(state(vq), before)


@each
def test_state_dict_round_trip(kind):
    vq, other = layer(kind, kmeans_init=True), layer(kind, kmeans_init=True)
    x = torch.randn(40, DIM)
    vq(x)
    other.load_state_dict(vq.state_dict())
    assert same_state(state(vq), state(other))
    for a, b in zip(vq.eval()(x), other.eval()(x), strict=True):
        assert torch.equal(a, b)


SEPARATE = {"heads": 3, "separate_codebook_per_head": True}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SoftVQ, {}),
        (VQ, {"entropy_weight": 0.1}),
        (EMAVQ, {"threshold_ema_dead_code": 2.0}),
        (GumbelVQ, {"straight_through": True, **SEPARATE}),
        (VQ, {"use_cosine_sim": True, **SEPARATE}),
        (EMAVQ, {"use_cosine_sim": True, "codebook_dim": 4, "rotation_trick": True, **SEPARATE}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_compiles_without_a_break(kind, options):
    torch.compiler.reset()
    vq, other = layer(kind, **options), layer(kind, **options)
    other.load_state_dict(vq.state_dict())
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x = torch.randn(40, DIM, requires_grad=True)
    for step in range(2):
        results = []
        for module in (vq, compiled):
            torch.manual_seed(step)
            quantized, indices, loss = module(x)
            (grad,) = torch.autograd.grad(quantized.square().sum() + loss, x)
            results.append((quantized, indices, loss, grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    for name, value in state(vq).items():
        torch.testing.assert_close(value, other.state_dict()[name])


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("heads", [{}, SEPARATE], ids=str)
def test_compiled_everything_reads_the_codes_that_the_same_call_then_moves(heads):
    """A copy that the compiler sees through would not keep them."""
    torch.compiler.reset()
    vq = layer(EMAVQ, decay=0.5, entropy_weight=1.0, **heads)
    other = layer(EMAVQ, decay=0.5, entropy_weight=1.0, **heads)
    other.load_state_dict(vq.state_dict())
    x = torch.randn(64, DIM, requires_grad=True)
    compiled = torch.compile(other, fullgraph=True)  # by inductor
    results = [module(x) for module in (vq, compiled)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    grads = [torch.autograd.grad(loss, x)[0] for _, _, loss in results]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_exported_for_inference():
    """An exported graph has the forward alone, also where gradients are on."""
    vq, x = layer(SoftVQ).eval(), torch.randn(40, DIM, requires_grad=True)
    exported = torch.export.export(vq, (x,)).module()
    for a, b in zip(exported(x), vq(x), strict=True):
        torch.testing.assert_close(a, b)


@each
@pytest.mark.parametrize("entropy_weight", [0.0, 0.1])
def test_exported_for_any_number_of_rows(kind, entropy_weight):
    vq = layer(kind, entropy_weight=entropy_weight).eval()
    shapes, x = {"x": {0: torch.export.Dim.DYNAMIC}}, torch.randn(7, 5, DIM)
    exported = torch.export.export(vq, (x,), dynamic_shapes=shapes, strict=False).module()
    x = torch.randn(11, 5, DIM)
    for a, b in zip(exported(x), vq(x), strict=True):
        torch.testing.assert_close(a, b)


def test_print_shows_the_sizes():
    text = str(VQ(DIM, 9, heads=2, separate_codebook_per_head=True))
    assert f"dim={DIM}, codebook_size=9, codebook_dim={DIM // 2}, heads=2, codebooks=2" in text


def test_indices_of_any_whole_number():
    vq, indices = layer(VQ), torch.tensor([1, 0, 2])
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(vq.get_codes_from_indices(indices.to(dtype)), vq.codebook[indices])
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(TypeError, match=f"indices must be whole numbers, got {dtype}"):
            vq.get_codes_from_indices(indices.to(dtype))
    with pytest.raises(TypeError, match="indices must be whole numbers, got a list"):
        vq.get_output_from_indices([1, 0, 2])
    with pytest.raises(ValueError, match=r"\(\.\.\., heads\) with heads = 3, got \(4, 2\)"):
        layer(VQ, **SEPARATE).get_output_from_indices(torch.zeros(4, 2, dtype=torch.int64))
    for index in (-2, CODES):
        with pytest.raises(ValueError, match=rf"indices must lie in \[-1, {CODES}\), got {index}"):
            vq.get_codes_from_indices(torch.tensor([index]))


@each
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads must be a whole number, got 2.0"),
        ({"heads": True}, TypeError, "heads must be a whole number, got True"),
        ({"heads": 4}, ValueError, "dim 6 does not divide into 4 heads; give codebook_dim"),
        ({"entropy_weight": None}, TypeError, "entropy_weight must be a finite .* got None"),
        ({"entropy_temperature": "1"}, TypeError, "entropy_temperature must be a .* got '1'"),
        ({"kmeans_iters": -1}, ValueError, "kmeans_iters must be at least 0, got -1"),
        ({"entropy_weight": -1.0}, ValueError, "entropy_weight must be .* got -1.0"),
        ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature must be .* got 0.0"),
        ({"rotation": True}, TypeError, "unexpected keyword argument 'rotation'"),
    ],
    ids=str,
)
def test_bad_options_are_named(kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(**{"dim": DIM, "codebook_size": CODES} | options)


@each
def test_sizes_may_be_numpys_whole_numbers(kind):
    vq = kind(np.int64(DIM), np.int32(CODES), codebook_dim=np.int64(4), heads=np.int16(2))
    quantized, indices, _ = vq(torch.randn(5, DIM))
    assert quantized.shape == (5, DIM) and indices.shape == (5, 2)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (2, 5), r"x must be \(B, ..., dim\) with dim = 6, got \(2, 5\)"),
        ({}, (6,), r"x must be \(B, ..., dim\) with dim = 6, got \(6,\)"),
        ({"channel_last": False}, (2, 5, 6), r"x must be \(B, dim, ...\) with dim = 6"),
        ({"accept_image_fmap": True}, (2, 6, 5), r"x must be \(B, dim, H, W\), got \(2, 6, 5\)"),
    ],
    ids=str,
)
def test_bad_shapes_are_named(options, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(VQ, **options)(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.int64"):
        layer(VQ)(torch.zeros(2, DIM, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got a ndarray"):
        layer(VQ)(torch.zeros(2, DIM).numpy())
