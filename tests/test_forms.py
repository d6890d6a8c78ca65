"""Functional networks: what torch calls by function and by method is what its modules are, in torch and in ONNX."""

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anytime.model import Segment
from anytime.models.attached import Attached
from anytime.quant.graph import traced
from anytime.quant.onnx_graph import OnnxChain

HERE = __name__


class Base(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.wide, self.thin = nn.Linear(6 * 2 * 2, num_classes), nn.Linear(6, num_classes)

    def forward(self, x):
        return self.end(F.relu(self.two(F.relu(self.one(x)))))


class Maximum(Base):  # PyTorch's own MNIST example
    def end(self, x):
        return self.wide(torch.flatten(F.dropout(F.max_pool2d(x, 4), 0.25, training=self.training), 1))


class Viewed(Base):  # PyTorch's CIFAR-10 tutorial, as it was for years
    def end(self, x):
        return self.wide(F.max_pool2d(x, (3, 3), stride=4, padding=1).view(-1, 24))


class Sized(Base):
    def end(self, x):
        return self.wide(F.avg_pool2d(x, kernel_size=4).reshape(x.size(0), -1))


class Mean(Base):
    def end(self, x):
        return self.thin(x.mean((2, 3)))


class Kept(Base):
    def end(self, x):
        return self.thin(torch.mean(F.relu6(x), dim=[-1, -2], keepdim=True).flatten(1))


class Adaptive(Base):
    def end(self, x):
        return self.thin(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), start_dim=1))


@pytest.mark.parametrize("factory", [Maximum, Viewed, Sized, Mean, Kept, Adaptive])
def test_a_functional_network_is_cut_and_written(factory):
    x = torch.randn(3, 3, 8, 8)
    torch.manual_seed(0)
    whole = factory(num_classes=5).eval()
    torch.manual_seed(0)
    model = Attached(f"{HERE}:{factory.__name__}", ("one",)).build((3, 8, 8), 5).eval()
    with torch.no_grad():
        want, had = whole(x), model(x)
    assert torch.allclose(had[-1], want, atol=1e-6)
    body = OnnxChain(traced(model), (3, 8, 8), False).write(Segment(0, 2, 1)).SerializeToString()
    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-5)


@pytest.mark.parametrize("factory", [Maximum, Viewed, Sized])
def test_it_trains_channels_last(factory):
    model = Attached(f"{HERE}:{factory.__name__}", ("one",)).build((3, 8, 8), 5).to(memory_format=torch.channels_last)
    model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)).sum().backward()
    assert all(p.grad is not None for p in (*model.stages.parameters(), *model.heads.parameters()))


def test_dropout_acts_in_training_only():
    model, x = Attached(f"{HERE}:Maximum", ("one",)).build((3, 8, 8), 5), torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.train()(x)[-1], model(x)[-1])
    assert torch.equal(model.eval()(x)[-1], model(x)[-1])


def test_nodes_keep_their_names():
    model = Attached(f"{HERE}:Maximum", ("max_pool2d",)).build((3, 8, 8), 5)
    assert model.stages[0](torch.randn(2, 3, 8, 8)).shape == (2, 6, 2, 2)
