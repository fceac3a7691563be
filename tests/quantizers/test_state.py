"""What quantizers hold and where it comes from: built without memory, copied in, assigned."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from softvq.quantizers import EMAVQ, VQ, GumbelVQ, SoftVQ

DIM, CODES = 6, 10
each = pytest.mark.parametrize("kind", [SoftVQ, VQ, EMAVQ, GumbelVQ])


@each
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}], ids=str)
def test_a_module_without_memory_takes_a_checkpoint_and_moves(kind, options):
    vq = kind(DIM, CODES, **options).eval()
    with torch.device("meta"):
        other = kind(DIM, CODES, **options).eval()
    other.load_state_dict(vq.state_dict(), assign=True)
    other.to("cpu", torch.float64)
    _, indices, _ = vq(torch.randn(4, 5, DIM))
    output = other.get_output_from_indices(indices)
    assert output.dtype == torch.float64
    torch.testing.assert_close(output.float(), vq.get_output_from_indices(indices))


@each
def test_a_module_without_memory_takes_a_part_of_a_checkpoint(kind):
    state = kind(DIM, CODES).state_dict()
    del state[kind.codes_name], state["initialised"]
    with torch.device("meta"):
        vq = kind(DIM, CODES)
    vq.load_state_dict(state, assign=True, strict=False)
    assert vq.initialised.is_meta and vq.codebook.is_meta


@each
def test_a_checkpoint_is_said_to_be_placed_where_its_codes_are(kind):
    """Not where tensors are made by default, and in the dtype of a converted model."""
    state = kind(DIM, CODES).half().state_dict()
    del state["initialised"]
    vq = kind(DIM, CODES, kmeans_init=True).half()
    with torch.device("meta"):
        vq.load_state_dict(state, assign=True)
    assert vq.initialised and vq.initialised.dtype == torch.float16


@each
@pytest.mark.parametrize("strict", [True, False])
def test_kmeans_leaves_a_checkpoint_that_does_not_say_that_codes_are_placed(kind, strict):
    """Another library's, renamed: it has codes and no such buffer."""
    model = torch.nn.ModuleList([kind(DIM, CODES, kmeans_init=True)])
    state = model.state_dict()
    del state["0.initialised"]
    model.load_state_dict(state, strict=strict)
    assert "0.initialised" not in state
    model[0](50 + torch.randn(40, DIM))
    assert model[0].initialised and model[0].codebook.max() < 40


@each
@pytest.mark.parametrize("options", [{}, {"codebook_dim": 4}], ids=str)
def test_an_assigned_checkpoint_brings_its_precision(kind, options):
    vq, other = kind(DIM, CODES, **options).bfloat16().eval(), kind(DIM, CODES, **options).eval()
    other.load_state_dict(vq.state_dict(), assign=True)
    indices = torch.tensor([1, 0, 2])
    output = other.get_output_from_indices(indices)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, vq.get_output_from_indices(indices))


@each
@pytest.mark.parametrize("training", [True, False])
def test_without_memory_there_are_shapes(kind, training):
    with torch.device("meta"):
        vq = kind(DIM, CODES, heads=2, codebook_dim=4, entropy_weight=0.1).train(training)
        quantized, indices, loss = vq(torch.randn(4, 5, DIM))
    assert quantized.is_meta and quantized.shape == (4, 5, DIM)
    assert indices.shape == (4, 5, 2) and loss.shape == ()


@each
def test_kmeans_leaves_codes_that_were_copied_in(kind):
    """Tensor by tensor, as data-parallel training and averaged models do: no hook says so."""
    vq, other = (kind(DIM, CODES, kmeans_init=True) for _ in range(2))
    for _ in range(3):
        vq(torch.randn(40, DIM))
    with torch.no_grad():
        for name, value in other.state_dict(keep_vars=True).items():
            value.copy_(vq.state_dict()[name])
    latents = 50 + torch.randn(40, DIM)
    for layer in (vq, other):
        torch.manual_seed(1)
        layer(latents)
    assert other.codebook.max() < 40
    for name, value in other.state_dict().items():
        assert torch.equal(value, vq.state_dict()[name]), name


@each
@pytest.mark.parametrize("average", [get_swa_multi_avg_fn(), get_ema_multi_avg_fn(0.9)])
def test_models_are_averaged_with_their_buffers(kind, average):
    vq = kind(DIM, CODES, kmeans_init=True)
    averaged = AveragedModel(vq, multi_avg_fn=average, use_buffers=True)
    averaged.update_parameters(vq)
    vq(torch.randn(40, DIM))
    averaged.update_parameters(vq)
    averaged.module(50 + torch.randn(40, DIM))
    assert averaged.module.initialised and averaged.module.codebook.max() < 40


@each
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_may_say_by_a_bool_that_codes_are_placed(kind, placed, assign):
    vq = kind(DIM, CODES, kmeans_init=True)
    vq.load_state_dict(vq.state_dict() | {"initialised": torch.tensor(placed)}, assign=assign)
    vq(50 + torch.randn(40, DIM))
    assert vq.initialised and (vq.codebook.max() < 40) == placed
    assert vq.get_output_from_indices(torch.tensor([0])).dtype == torch.float32


@each
@pytest.mark.parametrize("cosine", [False, True])
def test_a_parameter_is_copied_into_the_codebook(kind, cosine):
    vq, codes = kind(DIM, CODES, use_cosine_sim=cosine), torch.nn.Embedding(CODES, DIM).weight
    before = [name for name, _ in vq.named_parameters()]
    vq.codebook = codes
    wanted = torch.nn.functional.normalize(codes, dim=-1) if cosine else codes
    torch.testing.assert_close(vq.codebook.detach(), wanted.detach())
    assert [name for name, _ in vq.named_parameters()] == before
