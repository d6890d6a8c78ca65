"""FP16 and BF16 on a CPU without their arithmetic: rounded where the real ones round."""

import torch
from torch import nn

from anytime.backends.float import _rounded
from anytime.model import AnytimeModel
from tests.worlds import Restarting


class Parts(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return (a * b).view(x.size(0), -1)


def test_sizes_and_parts_pass_and_tensors_are_rounded():
    twin = _rounded(AnytimeModel([nn.Sequential(nn.Conv2d(3, 4, 3))], [nn.Sequential(Parts(), nn.Linear(72, 5))]), torch.float16)
    x = torch.randn(2, 3, 8, 8)
    logits = twin(x)
    assert torch.equal(logits, logits.half().float()) and torch.equal(logits, twin(x.half().float()))


def test_every_stage_that_begins_anew_reads_the_image_rounded():
    torch.manual_seed(0)
    twin = _rounded(Restarting().build((3, 16, 16), 4).eval(), torch.bfloat16)
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(twin(x), twin(x.bfloat16().float()))
