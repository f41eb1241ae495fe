"""bfloat16 on a CPU: the same answers, no worse gradients; and who augments for whom."""

from __future__ import annotations

import copy
import os

import pytest
import timm
import torch

from data_jobs.training.machine import DepthwiseConv2d, Machine, speed_up_depthwise

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    torch.manual_seed(5)
    return timm.create_model("tf_efficientnet_lite0", num_classes=8, drop_path_rate=0.0).eval()


def answers(trunk: torch.nn.Module, *, bfloat16: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of their squares by parameter."""
    trunk.zero_grad()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = trunk(pixels)
    logits.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}
    return logits.detach().float(), found


def test_it_is_the_same_without_autocast_and_as_near_as_torchs_own_with_it(plain: torch.nn.Module) -> None:
    quick = copy.deepcopy(plain)
    assert speed_up_depthwise(quick) == 16 == sum(isinstance(m, DepthwiseConv2d) for m in quick.modules())
    assert list(quick.state_dict()) == list(plain.state_dict())
    expected, gradients = answers(plain, bfloat16=False)
    logits, found = answers(quick, bfloat16=False)
    assert torch.equal(logits, expected)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in gradients.items())

    _, rounded = answers(copy.deepcopy(plain), bfloat16=True)
    logits, found = answers(quick, bfloat16=True)
    assert logits == pytest.approx(expected, rel=0.1, abs=0.05 * float(expected.abs().max()))

    def error(of: dict[str, torch.Tensor]) -> float:
        return sum(float((of[n] - g).norm() / g.norm()) for n, g in gradients.items()) / len(gradients)

    assert error(found) <= 1.2 * error(rounded)
    quick.blocks[0].requires_grad_(requires_grad=False).zero_grad()
    _, found = answers(quick, bfloat16=True)
    assert not any(name.startswith("blocks.0.") for name in found)
    assert "blocks.1.0.conv_dw.weight" in found


def test_a_kind_of_convolution_that_it_would_change_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8, bias=True))
    with pytest.raises(ValueError, match="0: a depthwise convolution with bias"):
        speed_up_depthwise(network)


def test_a_gpu_is_fed_by_every_core() -> None:
    assert (Machine.of("cpu").workers, Machine.of("cuda").workers) == (1, os.cpu_count())
    assert (Machine.of("cpu").bfloat16, Machine.of("cuda").bfloat16) == (False, True)
    assert (Machine.of("cpu", 3).workers, Machine.of("cuda", 0).workers) == (3, 0)
