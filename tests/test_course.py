"""The course networks: torchvision's ResNet-18 with exits, and an MLP whose first exits teach no trunk."""

import pytest
import torch

from anytime.backend import TorchNet
from anytime.cost import account
from anytime.dataset import torchvision
from anytime.errors import UsageError
from anytime.models.course import EarlyExitResNet18, ThreeExitMLP
from anytime.quant.graph import Widths, prepared


def cost_of(spec, shape, n_classes):
    return account(TorchNet(spec.build(shape, n_classes).eval(), {}, simulated=False), shape)


def test_the_last_exit_is_torchvisions_resnet18():
    torch.manual_seed(0)
    theirs = torchvision().models.resnet18(num_classes=10)
    ours = EarlyExitResNet18().build((3, 64, 64), 10)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        theirs(x)  # BatchNorm has seen something
        *trunk, weight, bias = theirs.state_dict().values()
        ours.stages.load_state_dict(dict(zip(ours.stages.state_dict(), trunk, strict=True)))
        ours.heads[-1][2].load_state_dict({"weight": weight, "bias": bias})
        assert torch.allclose(ours.eval()(x)[-1], theirs.eval()(x), atol=1e-5)


def test_resnet18_costs_what_is_published():
    """1.81 G MACs and 11.69 M parameters at 3x224x224 and 1,000 classes (torchvision's model card), without the exits."""
    model = EarlyExitResNet18().build((3, 224, 224), 1000)
    own = [*model.stages.parameters(), *model.heads[-1].parameters()]
    assert sum(p.numel() for p in own) == 11_689_512
    cost = cost_of(EarlyExitResNet18(), (3, 224, 224), 1000)
    assert f"{cost.path((3,), 3) / 1e9:.2f}" == "1.81"
    assert cost.head.macs.tolist() == [64e3, 128e3, 256e3, 512e3]


@pytest.mark.parametrize(
    "shape, macs", [((1, 28, 28), "7.84 16.23 24.62 33.02"), ((3, 32, 32), "11.85 20.24 28.63 37.02")], ids=["grey", "colour"]
)
def test_resnet18_costs_what_its_docstring_says(shape, macs):
    cost = cost_of(EarlyExitResNet18(), shape, 10)
    assert " ".join(f"{m / 1e6:.2f}" for m in cost.macs) == macs and f"{cost.every('params')[-1] / 1e6:.1f}" == "11.2"


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 96, 64)])
def test_resnet18_takes_grey_and_colour_images(shape):
    assert EarlyExitResNet18().build(shape, 7).eval()(torch.zeros(2, *shape)).shape == (4, 2, 7)


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 16, 16), (784,)])
def test_resnet18_says_what_it_cannot_take(shape):
    with pytest.raises(UsageError, match="1 or 3 channels and at least 28x28, the data set gives"):
        EarlyExitResNet18().build(shape, 10)


def test_the_mlp_by_hand():
    cost = cost_of(ThreeExitMLP(), (1, 28, 28), 47)
    assert cost.stage.macs.tolist() == [784 * 1024, 1024**2, 1024**2]
    assert cost.head.macs.tolist() == [1024 * 47] * 3
    assert cost.every("params")[-1] == 785 * 1024 + 2 * 1025 * 1024 + 3 * 1025 * 47


def test_a_narrower_mlp_by_hand():
    cost = cost_of(ThreeExitMLP(512), (1, 28, 28), 10)
    assert cost.stage.macs.tolist() == [784 * 512, 512**2, 512**2] and cost.head.macs.tolist() == [5120] * 3
    assert cost.every("params")[-1] == 942_622
    with pytest.raises(UsageError, match="width=0 is no number of neurons"):
        ThreeExitMLP(0)


@pytest.mark.parametrize("leave, taught", [(0, []), (1, []), (2, [0, 1, 2])])
def test_only_the_last_exit_teaches_the_trunk(leave, taught):
    model = ThreeExitMLP().build((1, 28, 28), 10)
    model(torch.randn(4, 1, 28, 28))[leave].sum().backward()
    moved = [[k for k, m in enumerate(links) if any(p.grad.any() for p in m.parameters() if p.grad is not None)]
             for links in (model.stages, model.heads)]  # fmt: skip
    assert moved == [taught, [leave]]


def test_a_detach_is_no_tensor_of_its_own_to_a_quantizer():
    """One quantizer for the input and one per hidden layer: the exits read the very tensor that the next layer reads."""
    torch.manual_seed(0)
    model = ThreeExitMLP().build((1, 28, 28), 10).eval()
    net = prepared(model, torch.rand(16, 1, 28, 28), Widths(8, 8), "u8s8", "minmax", "minmax")
    assert len(net.quantizers()) == 4
    assert net.sources["heads.0.1"] is net.sources["stages.1.0"]
    assert net.sources["heads.1.1"] is net.sources["stages.2.0"]
