"""What does a step of quantization-aware training cost over a step in float? ResNet-20, CIFAR-10 shapes, batch 128.

    python benchmarks/qat.py [rounds] [threads]

fp32 and channels_last everywhere. BatchNorm is folded before in ours, and with "BN" stays behind its convolution and is trained, as
in float and in the peers. All of them take turns, one step each a round; medians, and their ratios to the float step of the same
run. Beside ours stand a plain STE, as people write it (every input and weight of a layer on one scale, ``x + (q(x) - x).detach()``),
and the field's own where they are installed: torch.ao's FX form, and torchao's PT2E, for which every call of a ReLU gets a module.
"""

import copy
import statistics
import sys
import time
import warnings

import torch
from keep import keep
from torch import nn
from torch.nn.functional import cross_entropy

from anytime.backends.torchao import own_relus
from anytime.models.resnet import ResNet20
from anytime.quant.graph import Widths, prepared
from anytime.quant.learned import learn
from anytime.quant.trace import traced


def ours(model, x, learns, fold_bn=True):
    net = prepared(model, x, Widths(4, 4), "u8s8", "mse", "mse", fold_bn=fold_bn)
    learn(net, learns)
    return net.model


class Plain(nn.Module):
    """Rounding to 4 bits with the straight-through estimator in one line; the scale follows the largest value, gradients pass."""

    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        scale = x.detach().abs().max() / self.high
        return x + ((x / scale).round().clamp(self.low, self.high) * scale - x).detach()


def plain_ste(model, x):
    """Every convolution and linear layer rounds its weight and its input; BatchNorm stays behind it."""
    inputs = Plain(0, 15)
    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        nn.utils.parametrize.register_parametrization(module, "weight", Plain(-7, 7))
        module.register_forward_pre_hook(lambda _, x: inputs(*x))
    return model


def torch_ao(model, x):
    """The default QAT of torch.ao's x86 engine; BatchNorm is folded inside its fused modules."""
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    flat = nn.Sequential(*model.stages, *model.heads).train()
    return prepare_qat_fx(flat, get_default_qat_qconfig_mapping("x86"), (x,))


def pt2e(model, x):
    """torchao's PT2E with the X86 Inductor quantizer."""
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    chain = own_relus(traced(model, fold_bn=False))
    flat = nn.Sequential(*chain.stages, *chain.heads).train()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    return move_exported_model_to_train(prepare_qat_pt2e(torch.export.export(flat, (x,)).module(), quantizer))


def main() -> None:
    """Time all in turn and print a table."""
    rounds, threads = (int(a) for a in (*sys.argv[1:], *("30", "2")[len(sys.argv) - 1 :]))
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(10, (128,))
    model = ResNet20().build((3, 32, 32), 10)
    makers = {
        "float": lambda m: m,
        "STE": lambda m: ours(m, x, "ste"),
        "LSQ": lambda m: ours(m, x, "lsq"),
        "STE, BN": lambda m: ours(m, x, "ste", False),
        "LSQ, BN": lambda m: ours(m, x, "lsq", False),
        "PACT": lambda m: ours(m, x, "pact"),
        "DoReFa": lambda m: ours(m, x, "dorefa"),
        "plain STE": lambda m: plain_ste(m, x),
        "torch.ao FX": lambda m: torch_ao(m, x),
        "torchao PT2E": lambda m: pt2e(m, x),
    }
    nets, times = {}, {}
    for name, make in makers.items():
        try:
            net = make(copy.deepcopy(model))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        if name != "torchao PT2E":  # an exported graph has no train(); it was moved above
            net.train()
        net.to(memory_format=torch.channels_last)
        nets[name] = net, torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)
        times[name] = []
    for turn in range(rounds + 3):
        for name, (net, optimizer) in nets.items():
            started = time.perf_counter()
            logits = net(x)
            cross_entropy(logits[0] if logits.ndim == 3 else logits, y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if turn >= 3:  # the first ones warm up
                times[name].append(time.perf_counter() - started)
    base = statistics.median(times["float"])
    print(f"ResNet-20, batch 128, fp32, channels_last, {threads} threads, {rounds} rounds")
    ratios = {name: statistics.median(each) / base for name, each in times.items()}
    for name, ratio in ratios.items():
        print(f"{name:14} {1e3 * ratio * base:7.1f} ms a step, {ratio:.2f} of float")
    keep("qat", {"float_ms": 1e3 * base} | ratios)


if __name__ == "__main__":
    main()
