"""Training and sampling speed of the scripts beside the report's network, in one run: a table in markdown.

  python tests/benchmark.py [--device cuda]    by hand, on a machine that does nothing else
"""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import ddpm  # noqa: E402
import vae  # noqa: E402


class ReportNet(nn.Module):
    """The report's ε-network, rebuilt from its description: 16.9 M parameters; it does not look at t."""

    def __init__(self):
        super().__init__()
        widths = (1, 64, 128, 256, 512, 256, 128, 64)
        layers = [layer for cin, cout in zip(widths, widths[1:]) for layer in (
            nn.Conv2d(cin, cout, 7, padding=3), nn.BatchNorm2d(cout), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, xt, t):
        return self.layers(xt)  # (B, 1, 28, 28)


def per_call(job, device, seconds):
    """Seconds that a call of job takes: the median of at least three calls, after one to warm up."""
    times = []
    while len(times) < 4 or sum(times) < seconds:
        start = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def flops(job):
    """Floating-point operations of all matrix products and convolutions in a call of job."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def peak_flops(device, dtype, seconds):
    """FLOP/s of this device in its best large matrix product or convolution in this precision."""
    side, like = 8192 if device.type == "cuda" else 2048, dict(device=device, dtype=dtype)
    a, x = torch.randn(side, side, **like), torch.randn(16, 256, 28, 28, **like)
    small, large = (torch.randn(256, 256, k, k, **like) for k in (3, 7))
    conv = nn.functional.conv2d
    jobs = (lambda: a @ a), (lambda: conv(x, small, padding=1)), (lambda: conv(x, large, padding=3))
    return max(flops(job) / per_call(job, device, seconds / 2) for job in jobs)


def models(device):
    """(name, model, images per step, learning rate, whether in autocast) of all, the report's first."""
    yield "the report's network", ddpm.DDPM(ReportNet()), 128 if device.type == "cuda" else 16, 1e-3, False
    for name, recipe in ddpm.RECIPES.items():
        settings = dict(recipe=name, T=1000, schedule="linear", sigma="posterior", shape=(1, 28, 28))
        yield f"ddpm.py, {name}", ddpm.build(settings), recipe["batch_size"], recipe["lr"], True
    yield "vae.py", vae.VAE(), 256, 1e-3, True


def rows(name, model, batch, lr, cast, device, seconds):
    """(what, images per step, seconds a step, its operations, its precision) of training and of sampling."""
    optimizer = torch.optim.Adam(model.to(device).parameters(), lr=lr, fused=True)
    x, is_vae = torch.rand(batch, 1, 28, 28, device=device), isinstance(model, vae.VAE)
    t, z = torch.ones(batch, dtype=torch.int64, device=device), torch.randn(batch, 2, device=device)
    cast, focused = cast and common.has_bfloat16(device), "short" in name

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            loss = torch.stack(model.elbo_terms(x)).diff(dim=0).mean() if is_vae else model.loss(
                ddpm.to_model(x), model.draw_t(batch, focused))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def evaluate():
        with torch.autocast(device.type, torch.bfloat16, enabled=cast):
            model.decode(z) if is_vae else model.net(x, t)
    dtype = torch.bfloat16 if cast else torch.float32
    yield f"training {name}", batch, per_call(step, device, seconds), flops(step), dtype
    model.eval()
    yield f"sampling {name}", batch, per_call(evaluate, device, seconds), flops(evaluate), dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--seconds", type=float, default=5, help="that each row is measured for (default: 5)")
    args = parser.parse_args()
    device, peaks, first = common.pick_device(args.device), {}, {}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    print(gpu or f"CPU, {torch.get_num_threads()} threads, {platform.machine()}", end=", ")
    print(f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    print("| one step of | precision | batch | ms | images/s | times the report's | GFLOP/s | of the best |")
    print("|---" * 8 + "|")
    for entry in models(device):
        for what, batch, took, work, dtype in rows(*entry, device, args.seconds):
            peaks[dtype] = peaks.get(dtype) or peak_flops(device, dtype, args.seconds)
            rate = batch / took
            times = rate / first.setdefault(what.split()[0], rate)  # the report's network comes first
            print(f"| {what} | {str(dtype)[6:]} | {batch} | {1000 * took:.2f} | {rate:,.0f} | {times:.1f} | "
                  f"{work / took / 1e9:,.1f} | {work / took / peaks[dtype]:.0%} |", flush=True)


if __name__ == "__main__":
    main()
