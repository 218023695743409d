"""The algebra of ΔW: what is exact is exact, what is cut is the best of its rank."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

from expunge import adapters, backbones
from expunge.errors import UserError
from expunge.exporting import deltas, interference
from expunge.exporting.deltas import Delta
from expunge.low_rank import nearest


def linear(rank: int, alpha: float, seed: int = 0) -> Delta:
    g = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(12, rank, generator=g), torch.randn(rank, 10, generator=g), alpha)


def convolution(rank: int, alpha: float, seed: int = 0) -> Delta:
    g = torch.Generator().manual_seed(seed)
    B, A = torch.randn(6, rank, 1, 1, generator=g), torch.randn(rank, 5, 3, 3, generator=g)
    return Delta(B, A, alpha)


BOTH = pytest.mark.parametrize("kind", [linear, convolution])


@pytest.mark.parametrize("group", ["x", "all"])
def test_what_is_read_is_what_peft_adds(tiny_sd1, make_lora, in_place, group) -> None:
    pipeline = in_place(tiny_sd1, make_lora(tiny_sd1, group, rank=6, alpha=3.7))
    (name,) = pipeline.unet.peft_config
    layers = deltas.read(pipeline, name)
    assert sorted(layers) == sorted(
        backbones.modules_of(backbones.load_pipeline(tiny_sd1).unet, group)
    )
    assert {delta.alpha for delta in layers.values()} == {3.7}
    shapes = set()
    for layer, delta in layers.items():
        tuner = pipeline.unet.get_submodule(layer)
        torch.testing.assert_close(delta.weight, tuner.get_delta_weight(name))
        shapes.add(delta.weight.shape[2:])
    assert (group == "all") == (torch.Size([3, 3]) in shapes)


def test_the_strength_is_part_of_it(tiny_sd1, make_lora) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    names = adapters.load(pipeline, [str(make_lora(tiny_sd1, alpha=16.0))], 0.25)
    assert {delta.alpha for delta in deltas.read(pipeline, names[0]).values()} == {4.0}


@BOTH
def test_the_sum_is_exact_and_ranks_add_up(kind) -> None:
    one, other = kind(4, 16.0, 1), kind(2, 1.0, 2)
    both = deltas.total([{"a": one, "b": one}, {"a": other}])
    assert list(both) == ["a", "b"]
    assert (both["a"].rank, both["a"].alpha) == (6, 6.0)
    torch.testing.assert_close(both["a"].weight, one.weight + other.weight)
    torch.testing.assert_close(both["b"].weight, one.weight)
    assert deltas.total([{"a": one}]) == {"a": one}


@BOTH
def test_one_rank_and_alpha_for_all_changes_nothing(kind) -> None:
    layers = {"a": kind(4, 16.0, 1), "b": kind(2, 5.0, 2)}
    same = deltas.uniform(layers)
    assert {(delta.rank, delta.alpha) for delta in same.values()} == {(4, 4.0)}
    for name in layers:
        torch.testing.assert_close(same[name].weight, layers[name].weight)
    assert deltas.uniform({"a": layers["a"]})["a"] is layers["a"]


@BOTH
def test_what_is_cut_is_the_nearest_and_the_loss_is_true(kind) -> None:
    layers = {"a": kind(5, 3.0, 1), "b": kind(5, 2.0, 2)}
    lost = []
    for rank in (1, 2, 4, 5, 7):
        shorter, share = deltas.cut(layers, rank)
        square = norm = 0.0
        for name, delta in layers.items():
            W = delta.weight.flatten(1).double()
            σ = torch.linalg.svdvals(W)
            error = (shorter[name].weight.flatten(1) - W).square().sum()
            torch.testing.assert_close(error, σ[rank:].square().sum(), atol=1e-6, rtol=1e-4)
            square, norm = square + error, norm + W.square().sum()
            assert shorter[name].rank == rank
            assert shorter[name].A.shape[1:] == delta.A.shape[1:]
        assert share == pytest.approx(float((square / norm).sqrt()), abs=1e-6)
        lost.append(share)
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > 0.1
    assert lost[-1] < 1e-6


def test_nearest_never_multiplies_out() -> None:
    """A product of 200 000 × 200 000 would not fit into memory."""
    g = torch.Generator().manual_seed(0)
    P, Q = torch.randn(200_000, 3, generator=g), torch.randn(3, 200_000, generator=g)
    B, A, lost = nearest(P, Q, 3)
    torch.testing.assert_close(B[:50] @ A[:, :50], (P[:50] @ Q[:, :50]).double(), atol=1e-3, rtol=0)
    assert lost < 1e-6


@BOTH
def test_interference_agrees_with_the_matrices(kind) -> None:
    one, other = {"a": kind(4, 16.0, 1), "b": kind(3, 1.0, 3)}, {"a": kind(2, 1.0, 2)}
    found = interference.in_weights(one, other)
    x, y = one["a"].weight.flatten(), other["a"].weight.flatten()
    row = found["layers"]["a"]
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-5)
    assert row["norm_one"] == pytest.approx(float(x.norm()), rel=1e-5)
    assert row["norm_other"] == pytest.approx(float(y.norm()), rel=1e-5)
    assert row["norm_sum"] == pytest.approx(float((x + y).norm()), rel=1e-5)
    # Over all layers: where only one acts, the other is zero.
    x, y = (
        torch.cat([x, one["b"].weight.flatten()]),
        torch.cat([y, torch.zeros(one["b"].weight.numel())]),
    )
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, 0)), abs=1e-5)
    assert found["norm_sum"] == pytest.approx(float((x + y).norm()), rel=1e-5)
    assert (found["shared_layers"], found["worst_layer"]) == (1, "a")


def test_the_ends_of_the_scale_of_interference() -> None:
    one = {"a": linear(4, 4.0, 1)}
    against = {"a": Delta(-one["a"].B, one["a"].A, 4.0)}
    assert interference.in_weights(one, one)["cosine"] == pytest.approx(1)
    found = interference.in_weights(one, against)
    assert found["cosine"] == pytest.approx(-1)
    assert found["norm_sum"] == pytest.approx(0, abs=1e-3)
    apart = interference.in_weights(one, {"b": one["a"]})
    assert (apart["shared_layers"], apart["cosine"], apart["worst_layer"]) == (0, 0.0, None)
    base, alone, together = torch.zeros(3), torch.tensor([2.0, 0, 0]), torch.tensor([2.0, 1, 0])
    assert interference.in_latents(base, alone, together) == 0.5


def test_put_in_place_is_what_the_adapter_does(tiny_sd1, make_lora, in_place, latents) -> None:
    pipeline = in_place(tiny_sd1, make_lora(tiny_sd1, "all"))
    expected = latents(pipeline)
    deltas.put_in_place(pipeline.unet, deltas.read(pipeline, "erase_0"))
    assert all(m.disable_adapters for m in pipeline.unet.modules() if isinstance(m, BaseTunerLayer))
    torch.testing.assert_close(latents(pipeline), expected, atol=1e-4, rtol=1e-4)
    assert (latents(backbones.load_pipeline(tiny_sd1)) - expected).abs().max() > 1e-2


def test_what_is_no_plain_lora_of_the_unet_is_refused(tiny_sd1) -> None:
    pipeline = backbones.load_pipeline(tiny_sd1)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], use_dora=True), "dora")
    with pytest.raises(UserError, match="magnitude_vector"):
        deltas.read(pipeline, "dora")
    pipeline = backbones.load_pipeline(tiny_sd1)
    for network, layer in ((pipeline.unet, "to_k"), (pipeline.text_encoder, "q_proj")):
        network.add_adapter(LoraConfig(r=2, target_modules=[layer]), "both")
    with pytest.raises(UserError, match="changes text_encoder too"):
        deltas.read(pipeline, "both")
