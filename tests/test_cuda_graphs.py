"""docs/cuda-graphs.md: a whole training step as a CUDA graph, by hand and through torch.compile.

Its code runs here as it stands: on a GPU in CUDA's own graphs, elsewhere in one that PyTorch's operations are recorded
in and run again from. And nothing in a step is what capture forbids, on the kernels that a GPU would run.
"""

import re
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from graphs import DEVICE, NoHostTrips, as_on_a_gpu, captured, graphs_on_a_cpu
from standins import clip, images, seeded
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode

import fastheads
from fastheads import HeadConfig
from fastheads.ops import fused, mmd_triton

PAGE = (Path(__file__).parents[1] / "docs" / "cuda-graphs.md").read_text(encoding="utf-8")
STEP, BY_HAND, COMPILED = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
EAGERLY = 'for batch in loader:\n    loss = update(loss_of(*(t.to("cuda") for t in batch)))'
# What head_mmd is given besides.
MMD = {"heads": "features='heads'", "embedding": "features='embedding', embedding=features"}
FEATURES = pytest.mark.parametrize("features", MMD)
ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FORMS = {
    "stacked": {"impl": "stacked"},
    "delta": {"impl": "delta"},
    "one_pass": {"impl": "one_pass"},
    "dropout": {"impl": "delta", "config": HeadConfig(dropout=0.5)},
    "recomputed": {"impl": "stacked", "recompute": True},
    "reference": {"impl": "reference"},
}


def batch(n, seed=0, domains=3):
    """Images, class labels and domain ids: what a loader gives."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return images(n, seed=seed), order % 4, order % domains


class Page:
    """The page's code on a small model. mmd: what head_mmd is given besides; options: of `patch`."""

    def __init__(self, device=DEVICE, mmd=MMD["heads"], layers=2, **options):
        self.device, self.mmd = device, mmd
        with torch.device(device):
            classifier = torch.nn.functional.normalize(torch.ones(4, 24).cumsum(0).sin(), dim=-1)
            self.names = {"model": clip(layers=layers).train(), "classifier": classifier, "options": options}
        with seeded(1):
            self.run(STEP)

    def run(self, code, **names):
        code = code.replace('"cuda"', f'"{self.device}"').replace("patch(model)", "patch(model, **options)")
        code = code.replace("num_domains=3", f"num_domains=3, {self.mmd}")
        self.names |= names
        exec(compile(code, "docs/cuda-graphs.md", "exec"), self.names)
        return self

    def weights(self):
        model = self.names["model"]
        own = fastheads.lora_parameters(model) + fastheads.gate_parameters(model)
        return torch.cat([p.detach().flatten() for p in own])


def trained(code, features, device):
    """The weights before and after five batches, the last at half the rates, and its loss."""
    page = Page(device, MMD[features], layers=1)

    def loader():
        for seed in range(5):
            if seed == 4:
                torch._foreach_mul_(page.names["rates"], 0.5)
            yield batch(6, seed)

    before = page.weights()
    page.run(code, loader=loader())
    return before, page.weights(), page.names["loss"].detach()


def assert_trained_alike(found, expected, tolerance):
    """The distance between weights beside the way that training took them."""
    (_, got, loss), (before, want, eager) = found, expected
    assert (got - want).norm() <= tolerance * (want - before).norm()
    torch.testing.assert_close(loss, eager, rtol=tolerance, atol=0)


# ------------------------------------------------------------------------------------------------ the page's code


@pytest.fixture
def gpu(monkeypatch):
    as_on_a_gpu(monkeypatch)


@pytest.fixture
def dynamo(features):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=features == "embedding"):
        yield


@FEATURES
def test_a_graph_by_hand_trains_as_the_eager_step(features, gpu, monkeypatch):
    expected = trained(EAGERLY, features, "cpu")
    graphs_on_a_cpu(monkeypatch)
    assert_trained_alike(trained(BY_HAND, features, "cpu"), expected, 0)


@FEATURES
def test_a_compiled_step_is_one_graph_and_trains_as_the_eager_one(features, dynamo, monkeypatch):
    graphs, compiler = [], torch.compile

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def without_inductor(function, mode, fullgraph):
        assert mode == "reduce-overhead"
        return compiler(function, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", without_inductor)
    # bfloat16, rounded elsewhere
    assert_trained_alike(trained(COMPILED, features, "cpu"), trained(EAGERLY, features, "cpu"), 0.05)
    assert len(graphs) == 2  # forward and backward, once each
    for graph in graphs:
        assert get_first_incompatible_cudagraph_node(graph) is None
        assert not any(node.target is torch.ops.aten.copy_.default for node in graph.graph.nodes)  # into an input


@ON_GPU
@pytest.mark.gpu
@FEATURES
@pytest.mark.parametrize("form", ["stacked", "delta", "one_pass"])
def test_cudas_graph_trains_as_the_eager_step(form, features, monkeypatch):
    monkeypatch.setenv("FASTHEADS_IMPL", form)
    # products may be made otherwise in a graph
    assert_trained_alike(trained(BY_HAND, features, "cuda"), trained(EAGERLY, features, "cuda"), 0.1)


@ON_GPU
@pytest.mark.gpu
@FEATURES
def test_reduced_overhead_is_cudas_graph(features, dynamo):
    counters.clear()
    assert_trained_alike(trained(COMPILED, features, "cuda"), trained(EAGERLY, features, "cuda"), 0.1)
    assert not counters["inductor"]["cudagraph_skips"]


# --------------------------------------------------------------------------------------- what capture forbids


def asked_for(page, *batches):
    """What each step asks of a GPU."""
    found = []
    for given in batches:
        given = [t.to(DEVICE) for t in given]
        with captured() as trips:
            page.names["update"](page.names["loss_of"](*given))
        found.append(trips.seen)
    return found


# Above 128 samples the MMD goes by panels.
@pytest.mark.parametrize(
    "form, features, n",
    [
        ("stacked", "heads", 12),
        ("stacked", "embedding", 140),
        ("delta", "embedding", 12),
        ("dropout", "heads", 12),
        ("one_pass", "heads", 140),
        ("recomputed", "heads", 12),
        ("reference", "heads", 140),
    ],
)
def test_a_step_waits_for_nothing_and_asks_for_the_same_each_time(form, features, n, gpu):
    impl = "reference" if form == "reference" else "triton"
    page = Page(mmd=f"{MMD[features]}, impl='{impl}'", **FORMS[form])
    # the optimizer makes its state in the first; in the last all samples are of one domain
    _, second, third = asked_for(page, *(batch(n, seed, domains=3 - seed) for seed in range(3)))
    assert second == third
    kernels = {"attention_bwd_at_once_kernel", "mmd_tile_kernel" if n > 128 else "mmd_small_kernel"}
    assert kernels & {name for name, *_ in second} == (set() if form == "reference" else kernels)


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # then there is no autocast
@pytest.mark.parametrize("form", FORMS)
def test_the_forward_pass_stays_on_the_gpu(form, gpu):
    """Of fake CUDA tensors, which know what is a copy; their gradients would need a GPU."""
    with FakeTensorMode():
        page = Page("cuda", **FORMS[form])
        given = torch.empty(12, 3, 32, 32, device="cuda"), *torch.empty(2, 12, device="cuda").long()
        with NoHostTrips("cuda"):
            page.names["loss_of"](*given)


PLANTED = {
    "an item": lambda x: x.sum().item(),
    "a list": lambda x: x.new_tensor([1.0]),
    "a boolean index": lambda x: x[x > 0],
    "a copy": lambda x: x.cpu(),
    "no device": lambda x: x + torch.ones(1),
}
PLACES = {"forward": (fused, "_project"), "backward": (fused, "_dx"), "MMD": (mmd_triton, "points")}


@pytest.mark.parametrize(
    "what, where", [*((what, "backward") for what in PLANTED), ("an item", "forward"), ("an item", "MMD")]
)
def test_what_capture_forbids_is_seen_inside_the_operators(what, where, gpu, monkeypatch):
    module, name = PLACES[where]
    before = getattr(module, name)

    def planted(first, *rest, **options):
        PLANTED[what](getattr(first, "x", first))
        return before(first, *rest, **options)

    page = Page(mmd="impl='triton'", impl="stacked")
    monkeypatch.setattr(module, name, planted)
    with pytest.raises((AssertionError, RuntimeError), match="waits|copy|host counts it|two different devices"):
        asked_for(page, batch(140 if where == "MMD" else 12))


def test_a_graph_is_told_how_many_domains_there_are(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode():
        x, domains = torch.empty(12, 8, device="cuda"), torch.empty(12, device="cuda").long()
        with pytest.raises(ValueError, match="num_domains: got None while a CUDA graph is captured"):
            fastheads.mmd(x, domains)
