"""Measures the speed of each model against the machine's own best, as a Markdown table.

Run it by hand, on an otherwise idle machine:

  python tests/benchmark.py [--device cuda]
  python tests/benchmark.py --until 20    also trains the DDPM to a Fréchet distance of 20
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
import compare  # noqa: E402
import ddpm  # noqa: E402
import vae  # noqa: E402


def per_call(job, device):
    """Seconds per call of job: the median over five seconds of calls, after one to warm up."""
    times = []
    while len(times) < 4 or sum(times) < 5:
        started = time.perf_counter()
        job()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def flops(job):
    """Floating-point operations of the matrix products and convolutions in a call of job."""
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def best(device, backward):
    """FLOP/s of the better of a large convolution and a large matrix product, in autocast."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, requires_grad=backward)
    b = torch.randn(side, side, device=device, requires_grad=backward)
    x = torch.randn(64, 256, 28, 28, device=device, requires_grad=backward)
    x = x.to(memory_format=torch.channels_last)
    w = torch.randn(256, 256, 3, 3, device=device, requires_grad=backward)

    def product():
        return a @ b

    def convolution():
        return F.conv2d(x, w, padding=1)

    def rate(job):
        def run():
            with common.autocast(device):
                y = job()
            if backward:
                y.sum().backward()

        return flops(run) / per_call(run, device)

    return max(rate(product), rate(convolution))


def jobs(device):
    """(name, images a step, model, its loss of as many) of each model."""
    for recipe, options in ddpm.RECIPES.items():
        settings = common.defaults(device) | ddpm.SETTINGS | options | {"shape": (1, 28, 28)}
        model = ddpm.build(settings).to(device)
        B = settings["batch_size"]
        x0 = torch.rand(B, 1, 28, 28, device=device)
        t = torch.randint(1, model.T + 1, (B,), device=device)
        yield f"ddpm.py, {recipe}", B, model, (lambda m=model, x=x0, t=t: m.loss(x, t))
    model = vae.VAE().to(device)
    B = vae.SETTINGS["batch_size"]
    x = torch.rand(B, 1, 28, 28, device=device)

    def minus_elbo():
        reconstruction, kl = model(x)
        return (kl - reconstruction).mean()

    yield "vae.py", B, model, minus_elbo


class ReachedError(Exception):
    """Ends the training of seconds_until."""


def seconds_until(distance, device):
    """Trains the DDPM of this device's recipe until samples have this Fréchet distance.

    -> seconds of training and of drawing samples; the distance after each epoch; their number.
    """
    with tempfile.TemporaryDirectory() as out:
        args = ddpm.parse(["--out", out, "--device", str(device)])
        settings = common.Namespace(**ddpm.defaults(args, device))
        data = common.load_data(settings, args, device)
        yardstick = compare.Yardstick(*data, seed=0, most=compare.CURVE_OF[device.type])
        curve = []

        def watch(model, epoch):
            curve.append(yardstick.distance(compare.draw_samples(model, yardstick.n, 0, device)))
            if curve[-1] <= distance:
                raise ReachedError(time.perf_counter() - started)
            return {}

        started = time.perf_counter()
        try:
            ddpm.train(args, device, watch)
            raise SystemExit(f"{distance:g} was not reached: {curve}")
        except ReachedError as reached:
            return reached.args[0], curve, yardstick.n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--until", type=float, help="Fréchet distance to train to (no training)")
    args = parser.parse_args()
    device = common.pick_device(args.device)
    torch.set_flush_denormal(True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | ms | images/s | of the machine's best |")
    print("|---" * 4 + "|")
    peaks = {backward: best(device, backward) for backward in (False, True)}
    for name, B, model, loss in jobs(device):
        optimizer = torch.optim.Adam(model.parameters(), fused=True)

        def forward(loss=loss):
            with torch.no_grad(), common.autocast(device):
                loss()

        def step(loss=loss, optimizer=optimizer):
            with common.autocast(device):
                value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()

        for backward, job in (False, forward), (True, step):
            what = "training step" if backward else "forward"
            seconds = per_call(job, device)
            share = flops(job) / seconds / peaks[backward]
            cells = f"{name}, {what}", f"{1000 * seconds:.1f}", f"{B / seconds:,.0f}"
            print(f"| {' | '.join(cells)} | {share:.0%} |", flush=True)
    if args.until:
        seconds, curve, n = seconds_until(args.until, device)
        shown = ", ".join(f"{each:.1f}" for each in curve)
        print(f"\nFréchet distance of {n} samples {args.until:g} or less after {seconds:.0f} s of")
        print(f"training and drawing samples; after each epoch: {shown}")


if __name__ == "__main__":
    main()
