import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors(*tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: it notes the kernels of what runs inside, and replay() runs them again.

    On the same memory, and with all that was no tensor fixed.  As with the real one, recording changes
    nothing, and what reads a value back or draws a random number is refused.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.before = [], {}

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        assert kernel is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        assert torch.Tag.nondeterministic_seeded not in kernel.tags, "random"
        for x in tensors(args, kwargs):
            self.before.setdefault((x.data_ptr(), x.shape, x.stride()), (x, x.detach().clone()))
        out = kernel(*args, **(kwargs or {}))
        self.kernels.append((kernel, args, kwargs or {}, tensors(out)))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for x, value in self.before.values():
                if not torch.equal(x, value):
                    x.copy_(value)

    @torch.no_grad()
    def replay(self):
        for kernel, args, kwargs, out in self.kernels:
            for held, new in zip(out, tensors(kernel(*args, **kwargs))):
                if held.data_ptr() != new.data_ptr():
                    held.copy_(new)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def cuda_graphs(monkeypatch):
    """CUDA's graphs and streams, replaced by Graph above -> the list of the graphs made."""
    made = []
    fakes = {"CUDAGraph": lambda: made.append(Graph()) or made[-1], "graph": lambda graph, stream: graph,
             "Stream": Stream, "current_stream": Stream, "stream": lambda stream: contextlib.nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


class OnDevice(TorchDispatchMode):
    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        out = kernel(*args, **(kwargs or {}))
        devices = {x.device.type for x in tensors(args, kwargs, out)}
        assert devices <= {"meta"}, f"{kernel} on {devices}"
        return out


@pytest.fixture
def on_device(monkeypatch):
    """Inside, nothing may come from the host or go there: a CUDA graph could not repeat it. -> a context.

    For tensors on the device "meta", from which nothing can be read.
    """
    @contextlib.contextmanager
    def check():
        def refuse(*_, **__):
            raise AssertionError("a copy from the host")
        with monkeypatch.context() as patch, OnDevice():
            for name in "tensor", "as_tensor", "from_numpy":  # "meta" hides their copies
                patch.setattr(torch, name, refuse)
            yield
    return check
