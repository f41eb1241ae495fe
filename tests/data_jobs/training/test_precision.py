from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
timm = pytest.importorskip("timm", reason="needs the train extra")

pytestmark = pytest.mark.torch


def _trunk() -> torch.nn.Module:
    torch.manual_seed(5)
    return timm.create_model("tf_efficientnet_lite0", num_classes=8, drop_path_rate=0.0).eval()


def _answers(trunk: torch.nn.Module, *, bfloat16: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of their squares by parameter."""
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = trunk(pixels)
    logits.float().square().sum().backward()
    return logits.detach().float(), {
        name: p.grad for name, p in trunk.named_parameters() if p.grad is not None
    }


def test_nothing_changes_without_autocast() -> None:
    from data_jobs.training.precision import DepthwiseConv2d, speed_up_depthwise

    plain = _trunk()
    quick = copy.deepcopy(plain)
    assert speed_up_depthwise(quick) == 16 == sum(isinstance(m, DepthwiseConv2d) for m in quick.modules())
    assert list(quick.state_dict()) == list(plain.state_dict())
    expected, gradients = _answers(plain, bfloat16=False)
    logits, found = _answers(quick, bfloat16=False)
    assert torch.equal(logits, expected)
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())


def test_in_bfloat16_the_gradients_are_those_of_torch() -> None:
    """As far as bfloat16 reaches: no further from float32's than torch's own bfloat16 gradients are."""
    from data_jobs.training.precision import speed_up_depthwise

    plain = _trunk()
    usual, quick = copy.deepcopy(plain), copy.deepcopy(plain)
    speed_up_depthwise(quick)
    expected, gradients = _answers(plain, bfloat16=False)
    _, rounded = _answers(usual, bfloat16=True)
    logits, found = _answers(quick, bfloat16=True)
    assert logits == pytest.approx(expected, rel=0.1, abs=0.05 * float(expected.abs().max()))
    assert found.keys() == gradients.keys()

    def error(of: dict[str, torch.Tensor]) -> float:
        return sum(float((of[n] - g).norm() / g.norm()) for n, g in gradients.items()) / len(gradients)

    assert error(found) <= 1.2 * error(rounded)


def test_frozen_depthwise_convolutions_take_no_gradient() -> None:
    from data_jobs.training.precision import speed_up_depthwise

    trunk = _trunk()
    speed_up_depthwise(trunk)
    trunk.blocks[0].requires_grad_(requires_grad=False)
    _, gradients = _answers(trunk, bfloat16=True)
    assert not any(name.startswith("blocks.0.") for name in gradients)
    assert "blocks.1.0.conv_dw.weight" in gradients


def test_a_kind_of_convolution_that_it_would_change_is_refused() -> None:
    from data_jobs.training.precision import speed_up_depthwise

    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8, bias=True))
    with pytest.raises(ValueError, match="0: a depthwise convolution with bias"):
        speed_up_depthwise(network)
